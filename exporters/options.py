"""The options of an export, each declared once and checked before anything is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from gralora_fx.core.config.option import ADAPTERS, COMPARISON, NUMBERS, WRITTEN, Option, check_options
from gralora_fx.errors import ExportError, option
from gralora_fx.exporters.formats import (
    BLOCK_BITS,
    DYNAMIC,
    FLOAT,
    KEPT,
    MEAN_BITS,
    Blocks,
    Columns,
    Format,
    accuracy_level_problem,
    bits_problem,
    block_size_problem,
)
from gralora_fx.format.adapter_inputs import AS_DATA, EARLIER_MODES
from gralora_fx.format.tasks import is_encoder_decoder

if TYPE_CHECKING:
    from gralora_fx.core.methods import AdapterMethod

LEVELS = ("quick", "full")
# in which kind companions are stored where it is not the decoder's; None for their own
_OF_COMPANIONS: dict[str | None, Any] = {None: FLOAT, "int4": "int8", KEPT: None}
_CHOOSING = ("int4", DYNAMIC)  # kinds whose bits are chosen by running the model


def _tokenizer_problem(value: Any) -> str | None:
    if isinstance(value, (str, Path, type(None))) or hasattr(value, "save_pretrained"):
        return None
    return f"{value!r:.80} is not a tokenizer; give one of transformers, or the directory of one"


def _texts_problem(value: Any) -> str | None:
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(text, str) for text in value):
        return f"{option('texts')} must be a sequence of texts, but got {value!r:.80}"
    return None if value else "texts is empty; give at least one text, or leave it out to compare on others"


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of an export: the keywords of `export_onnx`, which documents them."""

    adapters: Annotated[
        Literal["merged", "data", "inputs"],
        Option(
            "Merge the adapter into the weights, or keep adapters as data or as inputs, of which each call chooses one "
            f"and others can be added; both need {option(adapter=...)}.",
            ADAPTERS,
        ),
    ] = "merged"
    dora: Annotated[
        bool,
        Option(
            "Take DoRA adapters, as data, at every layer that takes adapters; without it only where an adapter of the "
            "model is one.",
            ADAPTERS,
        ),
    ] = False
    precision: Annotated[
        Literal["fp32", "fp16", "bf16"], Option("Store weights and cache in this precision.", NUMBERS)
    ] = "fp32"
    quantize: Annotated[
        Literal["int4", "int8", "int8-dynamic", "kept", "float"] | None,
        Option(
            "Store weights as small integers: int8 is closest to floats, int4 smallest, and int8-dynamic reads prompts "
            "fastest, as it rounds activations too. kept keeps those of a quantized checkpoint; left out, they are "
            "kept where there are any, and floats stay floats.",
            NUMBERS,
        ),
    ] = None
    quantize_companions: Annotated[
        Literal["int4", "int8", "int8-dynamic", "float"] | None,
        Option(
            "Store weights of what runs beside a decoder, such as a vision encoder, in another form.",
            NUMBERS,
            left_out="as the decoder's, but int8 beside int4",
        ),
    ] = None
    bits: Annotated[
        float | None,
        Option(
            "Spend this many bits on a weight of int4 in the mean, from 4 to 8: more where rounding costs most.",
            NUMBERS,
            metavar="BITS",
            left_out="4.5",
            problem=bits_problem,
        ),
    ] = None
    block_size: Annotated[
        int | None,
        Option(
            "Let this many values of int8 or int4 share a scale: a power of two, 16 or more.",
            NUMBERS,
            metavar="N",
            left_out="32",
            problem=block_size_problem,
        ),
    ] = None
    accuracy_level: Annotated[
        int | None,
        Option(
            "Multiply weights of int8 or int4 so: 0 as the runtime chooses, 1 in float32, 2 in float16, 3 in bfloat16, "
            "4 in int8, the fastest.",
            NUMBERS,
            metavar="[0|1|2|3|4]",
            left_out="4",
            problem=accuracy_level_problem,
        ),
    ] = None
    logits: Annotated[
        Literal["last", "all"],
        Option("Return the logits of the last position or of all, for a model that generates.", NUMBERS),
    ] = "last"
    keep_padding: Annotated[
        bool, Option("Compute positions of padding too, for an encoder; else they are zero.", NUMBERS)
    ] = False
    tokenizer: Annotated[Any, Option(problem=_tokenizer_problem)] = None
    verify: Annotated[
        bool | Literal["quick", "full"],
        Option("Compare with PyTorch on few inputs, or on many and long ones.", COMPARISON, left_out="quick"),
    ] = True
    overwrite: Annotated[
        bool, Option("Replace an earlier export, even one of another base or task, or with more adapters.", WRITTEN)
    ] = False
    texts: Annotated[Sequence[str] | None, Option(problem=_texts_problem)] = None
    dump: Annotated[
        str | Path | None,
        Option("Write the graph to this directory after each step of the conversion.", WRITTEN, metavar="DIR"),
    ] = None

    def __post_init__(self) -> None:
        """Check every option, alone and in combination with the others."""
        if isinstance(self.adapters, str):
            object.__setattr__(self, "adapters", EARLIER_MODES.get(self.adapters, self.adapters))
        check_options(self, ExportError)
        if self.dora and self.adapters not in AS_DATA:
            raise ExportError(
                f"{option(dora=True)} has no effect with {option(adapters=self.adapters)}, which takes no adapters "
                f"later; give {option(adapters='data')} too, or leave it out"
            )
        if self.bits is not None and self.quantize != "int4":
            has = "nothing is quantized"
            if self.quantize == KEPT:
                has = f"{option(quantize=KEPT)} has the bits of the checkpoint"
            elif self.quantize in ("int8", DYNAMIC):
                has = f"{option(quantize=self.quantize)} has 8 bits everywhere"
            raise ExportError(
                f"{option(bits=self.bits)} is the budget of {option(quantize='int4')}, and {has}; leave it out, or "
                f"take {option(quantize='int4')}, some of whose layers have 8 bits"
            )
        if self.quantize == DYNAMIC:
            self._check_dynamic()
        if self.quantize == FLOAT:
            self._check_float()
        if self.texts is not None:
            self._check_texts()

    def _check_dynamic(self) -> None:
        given = {"block_size": self.block_size, "accuracy_level": self.accuracy_level}
        if unused := [option(**{name: value}) for name, value in given.items() if value is not None]:
            raise ExportError(
                f"{' and '.join(unused)} has no effect with {option(quantize=DYNAMIC)}, which has a scale for each "
                "column and multiplies in int8; leave it out"
            )
        if self.precision != "fp32":
            raise ExportError(
                f"{option(quantize=DYNAMIC)} rounds float32 activations, so it does not go with "
                f"{option(precision=self.precision)}; take {option(precision='fp32')}"
            )

    def _check_float(self) -> None:
        given = {"block_size": self.block_size, "accuracy_level": self.accuracy_level}
        if unused := [option(**{name: value}) for name, value in given.items() if value is not None]:
            raise ExportError(
                f"{' and '.join(unused)} has no effect with {option(quantize=FLOAT)}, which has no blocks; leave it out"
            )

    def _check_texts(self) -> None:
        if self.quantize in (None, FLOAT):
            raise ExportError(
                f"{option(texts=...)} has no effect without {option(quantize=...)}: a quantized export is "
                "compared with the model on them; leave them out"
            )
        if self.precision == "bf16":
            raise ExportError(
                f"{option(texts=...)} does not go with {option(precision='bf16')}, which ONNX Runtime's CPU provider "
                "does not run; leave one of them out"
            )
        if self.quantize in _CHOOSING and self.level is not None and len(self.texts or ()) == 1:
            raise ExportError(
                f"{option(texts=...)} has one text, and {self.quantize} needs two: every second one chooses bits, and "
                "the export is compared on the others; give more, or leave it out"
            )
        if self.tokenizer is None:
            raise ExportError(
                f"{option(texts=...)} needs {option(tokenizer=...)}; give it too, or leave {option(texts=...)} out"
            )
        if self.level is None and self.quantize not in _CHOOSING:
            raise ExportError(
                f"{option(texts=...)} has no effect with {option(verify=False)}, which compares nothing; leave one of "
                "them out"
            )

    def check_model(self, *, methods: Mapping[str, AdapterMethod], task: str | None) -> None:
        """Check that the options fit a model's adapters and task."""
        as_data = self.adapters in AS_DATA
        if as_data and not methods:
            raise ExportError(
                f"{option(adapters=self.adapters)} needs a model with an adapter: the export takes other adapters "
                f"at the same layers; give {option(adapter=...)}, or {option(adapters='merged')}"
            )
        for name, method in methods.items() if as_data else ():
            method.check_can_be_data(f"adapter {name!r}", option(adapters=self.adapters))
        if is_encoder_decoder(task) and self.texts is not None:
            raise ExportError(
                f"{option(texts=...)} is for decoders and models without a cache, and the task {task} is an "
                "encoder-decoder's with one; leave it out"
            )

    def for_base(self, *, is_in_few_bits: bool) -> ExportOptions:
        """Return the options for a base; a checkpoint with weights in few bits keeps its integers by default."""
        if self.quantize == KEPT and not is_in_few_bits:
            raise ExportError(
                f"{option(quantize=KEPT)} keeps the integers of a quantized checkpoint, and this base is of floats, or "
                f"of a form without integers; take {option(quantize='int4')} or {option(quantize='int8')}, or leave it "
                "out"
            )
        kept = KEPT if is_in_few_bits and self.quantize is None else self.quantize
        if kept in (None, FLOAT) and self.quantize_companions is not None:
            raise ExportError(
                f"{option(quantize_companions=self.quantize_companions)} is for a quantized decoder, and nothing is "
                f"quantized; give {option(quantize=...)} too, or leave it out"
            )
        return dataclasses.replace(self, quantize=None if kept == FLOAT else kept)

    def of_companions(self) -> ExportOptions:
        """Return the options of an export's companions, given those for its base."""
        kind = self.quantize_companions or _OF_COMPANIONS.get(self.quantize, self.quantize)
        has_blocks = kind in (*BLOCK_BITS, None)
        return dataclasses.replace(
            self,
            quantize=kind,
            quantize_companions=None,
            bits=self.bits if kind == self.quantize else None,
            block_size=self.block_size if has_blocks else None,
            accuracy_level=self.accuracy_level if has_blocks else None,
            logits="last",
            tokenizer=None,
            texts=None,
            dump=None,
        )

    @property
    def format(self) -> Format | None:
        """The format of quantized matrices, or None for floats; of those that are rounded beside kept integers."""
        if self.quantize in (None, FLOAT):
            return None
        if self.quantize == DYNAMIC:
            return Columns()
        block_size = Blocks.block_size if self.block_size is None else self.block_size
        level = Blocks.accuracy_level if self.accuracy_level is None else self.accuracy_level
        blocks = Blocks(BLOCK_BITS.get(self.quantize or "", 8), block_size, level)
        if self.quantize != "int4":
            return blocks
        return dataclasses.replace(blocks, rounding="searched", scale_bits=16)  # every bit counts

    @property
    def mean_bits(self) -> float:
        """The mean bits of an integer that int4 may spend."""
        return MEAN_BITS if self.bits is None else self.bits

    @property
    def choosing_texts(self) -> Sequence[str] | None:
        """The texts that choose bits: every second of the given ones, or all if nothing is compared."""
        if self.texts is None or self.quantize not in _CHOOSING:
            return None
        return self.texts if self.level is None else self.texts[::2]

    @property
    def compared_texts(self) -> Sequence[str] | None:
        """The texts on which a quantized export is compared: those not used to choose bits."""
        return self.texts[1::2] if self.texts is not None and self.quantize in _CHOOSING else self.texts

    @property
    def measures_quality(self) -> bool:
        """True if the effect of quantization is measured; not in bfloat16, which the CPU provider cannot run."""
        return self.level is not None and self.quantize is not None and self.precision != "bf16"

    @property
    def level(self) -> Literal["quick", "full"] | None:
        """The level of the comparison with the model, or None if it is skipped."""
        return ("quick" if self.verify else None) if isinstance(self.verify, bool) else self.verify


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Check that a value is among the choices."""
    if value not in choices:
        raise ExportError(f"{option(**{name: value})} is not available; take {' or '.join(map(repr, choices))}")

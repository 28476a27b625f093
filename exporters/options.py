"""The options of an export, each declared once and checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from gralora_fx.config.option import ADAPTERS, COMPARISON, NUMBERS, WRITTEN, Option, check_options
from gralora_fx.config.tasks import ENCODER_DECODERS
from gralora_fx.errors import ExportError
from gralora_fx.runtime.adapter_inputs import AS_DATA, EARLIER_MODES

if TYPE_CHECKING:
    from gralora_fx.methods import AdapterMethod

DYNAMIC = "int8-dynamic"
LEVELS = ("quick", "full")
_SMALLEST_BLOCK = 16
_BITS = {"int4": 4, "int8": 8}


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _block_size_problem(value: Any) -> str | None:
    if _is_int(value) and value >= _SMALLEST_BLOCK and not value & (value - 1):
        return None
    return f"block_size={value!r} is not a block size; take a power of two, 16 or more, such as 32"


def _accuracy_level_problem(value: Any) -> str | None:
    if _is_int(value) and 0 <= value <= 4:
        return None
    return (
        f"accuracy_level={value!r} is not an accuracy level; take 0 (the runtime's choice), 1 (float32), 2 (float16), "
        "3 (bfloat16) or 4 (int8)"
    )


def _tokenizer_problem(value: Any) -> str | None:
    if isinstance(value, (str, Path, type(None))) or hasattr(value, "save_pretrained"):
        return None
    return f"{value!r:.80} is not a tokenizer; give one of transformers, or the directory of one"


def _texts_problem(value: Any) -> str | None:
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(text, str) for text in value):
        return f"texts must be a sequence of texts, but got {value!r:.80}"
    return None if value else "texts is empty; give at least one text, or leave it out to compare on others"


@dataclass(frozen=True)
class Quantization:
    """How weights alone are quantized, in blocks.

    Attributes:
        kind: `"int4"` or `"int8"`.
        block_size: Values of a matrix's input axis that share a scale; a power of two, at least 16.
        accuracy_level: How ONNX Runtime multiplies: 0 its own choice, 1 float32, 2 float16, 3 bfloat16, 4 int8.
        zero_points: Whether a block has a zero point too; without one, zero is half of the integers' range.
    """

    kind: str
    block_size: int = 32
    accuracy_level: int = 4
    zero_points: bool = True

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ExportError: The quantized operators do not take a value; the message says which there are.
        """
        if self.kind not in _BITS:
            choices = " or ".join(map(repr, _BITS))
            raise ExportError(f"quantize={self.kind!r} is not a kind of blocks; take {choices}")
        problem = _block_size_problem(self.block_size) or _accuracy_level_problem(self.accuracy_level)
        if problem is not None:
            raise ExportError(problem)

    @property
    def bits(self) -> int:
        """Bits of a quantized value."""
        return _BITS[self.kind]


@dataclass(frozen=True)
class DynamicQuantization:
    """Weights in int8 with a scale a column, activations rounded to uint8 as they come.

    Attributes:
        kind: `"int8-dynamic"`.
    """

    kind: str = DYNAMIC

    def __post_init__(self) -> None:
        """Check the kind.

        Raises:
            ExportError: It is another; the message says which there is.
        """
        check_choice("quantize", self.kind, (DYNAMIC,))


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How a model is exported: the keywords of `export_onnx`, whose documentation says what each of them means."""

    adapters: Annotated[
        Literal["merged", "data", "inputs"],
        Option(
            "Fold the adapter into the weights (merged), or keep adapters apart as data that every run chooses: "
            "these need adapter=..., at whose layers the export then takes others too.",
            ADAPTERS,
        ),
    ] = "merged"
    precision: Annotated[Literal["fp32", "fp16", "bf16"], Option("Precision of weights and cache.", NUMBERS)] = "fp32"
    quantize: Annotated[
        Literal["int4", "int8", "int8-dynamic"] | None,
        Option(
            "Store matrices as blocks of small integers; int8-dynamic: multiply in int8, activations rounded too. "
            "Left out: none.",
            NUMBERS,
        ),
    ] = None
    block_size: Annotated[
        int | None,
        Option(
            "Values of int8 or int4 that share a scale: a power of two, 16 or more.",
            NUMBERS,
            metavar="N",
            left_out="32",
            problem=_block_size_problem,
        ),
    ] = None
    accuracy_level: Annotated[
        int | None,
        Option(
            "How int8 or int4 weights multiply: 0 the runtime's choice, 1 float32, 2 float16, 3 bfloat16, 4 int8, "
            "the fastest.",
            NUMBERS,
            metavar="[0|1|2|3|4]",
            left_out="4",
            problem=_accuracy_level_problem,
        ),
    ] = None
    logits: Annotated[
        Literal["last", "all"], Option("Of a model with a cache: logits of the last position, or all.", NUMBERS)
    ] = "last"
    keep_padding: Annotated[
        bool, Option("Of an encoder, compute positions of padding too; else they are zero.", NUMBERS)
    ] = False
    tokenizer: Annotated[Any, Option(problem=_tokenizer_problem)] = None
    verify: Annotated[
        bool | Literal["quick", "full"],
        Option("How thoroughly to compare with PyTorch.", COMPARISON, left_out="quick"),
    ] = True
    overwrite: Annotated[
        bool, Option("Replace an earlier export of another base or task, or with more adapters.", WRITTEN)
    ] = False
    texts: Annotated[Sequence[str] | None, Option(problem=_texts_problem)] = None
    dump: Annotated[
        str | Path | None, Option("Write the graph to this directory after each pass.", WRITTEN, metavar="DIR")
    ] = None

    def __post_init__(self) -> None:
        """Check every option, by itself and beside the others.

        Raises:
            ExportError: A value is not one that the option takes, or does not go with another one.
        """
        if isinstance(self.adapters, str):
            object.__setattr__(self, "adapters", EARLIER_MODES.get(self.adapters, self.adapters))
        check_options(self, ExportError)
        if self.quantize == DYNAMIC:
            self._check_dynamic()
        if self.texts is not None:
            self._check_texts()

    def _check_dynamic(self) -> None:
        given = {"block_size": self.block_size, "accuracy_level": self.accuracy_level}
        if unused := [f"{name}={value}" for name, value in given.items() if value is not None]:
            raise ExportError(
                f"{' and '.join(unused)} has no effect with quantize={DYNAMIC!r}, which has a scale for each column "
                "and multiplies in int8; leave it out"
            )
        if self.precision != "fp32":
            raise ExportError(
                f"quantize={DYNAMIC!r} rounds float32 activations, so it does not go with "
                f"precision={self.precision!r}; take precision='fp32'"
            )
        if self.adapters in AS_DATA:
            raise ExportError(
                f"quantize={DYNAMIC!r} folds adapters first, so it does not go with adapters={self.adapters!r}; "
                "take quantize='int8' or 'int4', over which adapters stay float"
            )

    def _check_texts(self) -> None:
        if self.quantize is None:
            raise ExportError(
                "texts=... has no effect without quantize=...: they are what a quantized export is compared on; leave "
                "them out"
            )
        if self.precision == "bf16":
            raise ExportError(
                "texts=... does not go with precision='bf16', which ONNX Runtime's CPU provider does not run; leave "
                "one of them out"
            )
        if self.tokenizer is None:
            raise ExportError("texts=... needs tokenizer=...; give it too, or leave texts=... out")
        if self.level is None:
            raise ExportError(
                "texts=... has no effect with verify=False, which compares nothing; leave one of them out"
            )

    def check_model(self, *, methods: Mapping[str, AdapterMethod], task: str | None) -> None:
        """Check that the options fit a model, as far as its adapters and its task tell.

        Args:
            methods: The methods of its adapters by their names; empty for a model without any.
            task: Its task, or None where that is not known.

        Raises:
            ExportError: They do not.
        """
        as_data = self.adapters in AS_DATA
        if as_data and not methods:
            raise ExportError(
                f"adapters={self.adapters!r} needs a model with an adapter, at whose layers the export then takes "
                "others; give adapter=..., or adapters='merged'"
            )
        for name, method in methods.items() if as_data else ():
            method.check_lora_form(f"adapter {name!r}", f"adapters={self.adapters!r}", ExportError)
        if task in ENCODER_DECODERS and self.texts is not None:
            raise ExportError(
                f"texts=... is for decoders and models without a cache, and the task {task} is an encoder-decoder's "
                "with one; leave it out"
            )

    @property
    def quantization(self) -> Quantization | DynamicQuantization | None:
        """How weights are quantized, or None."""
        if self.quantize is None:
            return None
        if self.quantize == DYNAMIC:
            return DynamicQuantization()
        block_size = Quantization.block_size if self.block_size is None else self.block_size
        level = Quantization.accuracy_level if self.accuracy_level is None else self.accuracy_level
        return Quantization(self.quantize, block_size, level)

    @property
    def level(self) -> Literal["quick", "full"] | None:
        """How thoroughly the export is compared with the model, or None where it is not."""
        return ("quick" if self.verify else None) if isinstance(self.verify, bool) else self.verify


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Check that a value is among the choices.

    Raises:
        ExportError: It is not; the message lists them.
    """
    if value not in choices:
        raise ExportError(f"{name}={value!r} is not available; take {' or '.join(map(repr, choices))}")

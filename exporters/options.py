"""The options of an export, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gralora_fx.config.tasks import ENCODER_DECODERS
from gralora_fx.errors import ExportError
from gralora_fx.runtime.adapter_inputs import AS_DATA, EARLIER_MODES

PRECISIONS = ("fp32", "fp16", "bf16")
DYNAMIC = "int8-dynamic"
QUANTIZATIONS = ("int4", "int8", DYNAMIC)
LOGITS = ("last", "all")
LEVELS = ("quick", "full")
ADAPTER_MODES = ("merged", *AS_DATA)
_SMALLEST_BLOCK = 16
_BLOCK_SIZE, _ACCURACY_LEVEL = 32, 4  # if none are given
_BITS = {"int4": 4, "int8": 8}


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
    block_size: int = _BLOCK_SIZE
    accuracy_level: int = _ACCURACY_LEVEL
    zero_points: bool = True

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ExportError: The quantized operators do not take a value; the message says which there are.
        """
        if self.kind not in _BITS:
            choices = " or ".join(map(repr, _BITS))
            raise ExportError(f"quantize={self.kind!r} is not a kind of blocks; take {choices}")
        _check_blocks(self.block_size, self.accuracy_level)

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


@dataclass(frozen=True)
class ExportOptions:
    """How a model is exported; `export_onnx` says what each option means.

    Attributes:
        adapters: How adapters are held.
        precision: Precision of weights, activations and the cache.
        quantize: Kind of quantization; None for none.
        block_size: Values that share a scale, of int4 and int8; None for 32.
        accuracy_level: How ONNX Runtime multiplies with int4 and int8; None for 4.
        logits: Whether a decoder with a cache gives the last position's logits or all.
        keep_padding: Whether an encoder computes positions of padding too.
        tokenizer: A tokenizer, a processor, or the directory of a tokenizer; None for none.
        verify: Whether to compare the export with the model: a level, True for `"quick"`, or False.
        overwrite: Whether an earlier export of another base or task may be replaced.
        texts: Texts on which a quantized export is compared with the float32 model; None for texts that a decoder
            draws, and for random inputs of other models.
        dump: The directory to write the graph to after each pass; None for that of the environment, or none.
    """

    adapters: str = "merged"
    precision: str = "fp32"
    quantize: str | None = None
    block_size: int | None = None
    accuracy_level: int | None = None
    logits: str = "last"
    keep_padding: bool = False
    tokenizer: Any = None
    verify: bool | Literal["quick", "full"] = True
    overwrite: bool = False
    texts: Sequence[str] | None = None
    dump: str | Path | None = None

    def __post_init__(self) -> None:
        """Check every option.

        Raises:
            ExportError: A value is not one that the option takes; the message says which there are.
        """
        if isinstance(self.adapters, str):
            object.__setattr__(self, "adapters", EARLIER_MODES.get(self.adapters, self.adapters))
        check_choice("adapters", self.adapters, ADAPTER_MODES)
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("logits", self.logits, LOGITS)
        if not isinstance(self.verify, bool):
            check_choice("verify", self.verify, LEVELS)
        for name in ("overwrite", "keep_padding"):
            if not isinstance(getattr(self, name), bool):
                raise ExportError(f"{name} must be True or False, but got {getattr(self, name)!r:.80}")
        if not (self.dump is None or isinstance(self.dump, (str, Path))):
            raise ExportError(f"dump must be the path of a directory or None, but got {self.dump!r:.80}")
        if not (isinstance(self.tokenizer, (str, Path, type(None))) or hasattr(self.tokenizer, "save_pretrained")):
            raise ExportError(
                f"{self.tokenizer!r:.80} is not a tokenizer; give one of transformers, or the directory of one"
            )
        _check_blocks(self._block_size, self._accuracy_level)
        if self.quantize is not None and self.quantize not in QUANTIZATIONS:
            choices = " or ".join(map(repr, QUANTIZATIONS))
            raise ExportError(f"quantize={self.quantize!r} is not available; take {choices}, or leave it out")
        if self.quantize == DYNAMIC:
            self._check_dynamic()
            if self.adapters in AS_DATA:
                raise ExportError(
                    f"quantize={DYNAMIC!r} folds adapters first, so it does not go with adapters={self.adapters!r}; "
                    "take quantize='int8' or 'int4', over which adapters stay float"
                )
        if self.texts is not None:
            self._check_texts(self.texts)

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

    def _check_texts(self, texts: Any) -> None:
        if isinstance(texts, str) or not isinstance(texts, Sequence) or not all(isinstance(t, str) for t in texts):
            raise ExportError(f"texts must be a sequence of texts, but got {texts!r:.80}")
        if not texts:
            raise ExportError("texts is empty; give at least one text, or leave it out to compare on others")
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

    def check_model(self, *, peft_types: Collection[str], task: str | None) -> None:
        """Check that the options fit a model, as far as its adapters and its task tell.

        Args:
            peft_types: PEFT's names of the methods of its adapters; empty for a model without any.
            task: Its task, or None where that is not known.

        Raises:
            ExportError: They do not.
        """
        as_data = self.adapters in AS_DATA
        if as_data and not peft_types:
            raise ExportError(
                f"adapters={self.adapters!r} needs a model with an adapter, at whose layers the export then takes "
                "others; give adapter=..., or adapters='merged'"
            )
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
        return Quantization(self.quantize, self._block_size, self._accuracy_level)

    @property
    def _block_size(self) -> int:
        return _BLOCK_SIZE if self.block_size is None else self.block_size

    @property
    def _accuracy_level(self) -> int:
        return _ACCURACY_LEVEL if self.accuracy_level is None else self.accuracy_level

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


def _check_blocks(block_size: Any, accuracy_level: Any) -> None:
    if not _is_int(block_size) or block_size < _SMALLEST_BLOCK or block_size & (block_size - 1):
        raise ExportError(f"block_size={block_size!r} is not a block size; take a power of two, 16 or more, such as 32")
    if not _is_int(accuracy_level) or not 0 <= accuracy_level <= 4:
        raise ExportError(
            f"accuracy_level={accuracy_level!r} is not an accuracy level; take 0 (the runtime's choice), "
            "1 (float32), 2 (float16), 3 (bfloat16) or 4 (int8)"
        )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

"""GPTQ, AWQ, compressed-tensors and FP8 as a base quantization, read from a checkpoint's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gralora_fx.base.sources.base_quantization import BaseQuantization
from gralora_fx.errors import ConfigError, listed, shown

METHODS = {"gptq": "GPTQ", "awq": "AWQ", "compressed-tensors": "compressed-tensors", "fp8": "FP8"}
# by method: the field that names a layout, its default, and the supported layouts
_LAYOUTS = {
    "gptq": ("checkpoint_format", "gptq", ("gptq", "gptq_v2")),
    "awq": ("version", "gemm", ("gemm",)),
    "compressed-tensors": ("format", None, ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")),
}
BITS = {"gptq": (2, 3, 4, 8), "awq": (4,)}


@dataclass(frozen=True)
class GroupQuantized(BaseQuantization):
    """Integers or eight-bit floats with a scale for each group of a layer's inputs, as a quantizer stored them.

    Attributes:
        method: Name of the quantizer: a key of `METHODS`.
        layout: Its layout, if it has several: `"gptq"` stores zero points less one, and `"gptq_v2"` does not.
        bits: Bits of a weight; None if each layer's tensors determine them.
        block: Rows and columns of FP8 with one scale; None if the shapes determine them.
        group_size: Inputs with one scale, -1 for all of a layer; None if the shapes determine them.
        has_rules: Whether layers may have bits and groups of their own (GPTQ's `dynamic`).
        compute_dtype: Dtype of the values in a record; a layer's values have the dtype of its scales.
    """

    sign = "qweight"
    title = "those of GPTQ, AWQ, compressed-tensors and FP8"
    texts = metavar = help = ""
    fields = "the quantization_config of a checkpoint of GPTQ, AWQ, compressed-tensors or FP8"
    extra = None
    is_kept = True

    method: str = "gptq"
    layout: str | None = None
    bits: int | None = None
    block: tuple[int, int] | None = None
    group_size: int | None = field(default=None, compare=False)
    has_rules: bool = field(default=False, compare=False)
    skip_modules: tuple[str, ...] | None = field(default=None, init=False)
    compute_dtype: str = field(default="float32", init=False)

    @classmethod
    def of_text(cls, text: str) -> None:
        """Return None: a float base cannot be rounded to these forms."""

    @classmethod
    def of_fields(cls, fields: Mapping[str, Any]) -> GroupQuantized | None:
        """Return the quantization in a record or a `quantization_config`; None if it is of another form.

        Raises:
            ConfigError: The layout or the number of bits is not supported.
        """
        method = fields.get("kind", fields.get("quant_method"))
        if method not in METHODS:
            return None
        name, default, layouts = _LAYOUTS.get(method, ("", None, ()))
        layout = fields.get("layout", fields.get(name, default) if name else None)
        if isinstance(layout, str):
            layout = layout.lower()
        if layouts and layout not in layouts:
            raise ConfigError(f"{name} of {METHODS[method]} is {shown(layout)}, and {listed(list(layouts))} are read")
        bits = fields.get("bits") if method in BITS else None
        if method in BITS and bits not in BITS[method]:
            read = listed([str(number) for number in BITS[method]])
            raise ConfigError(f"bits of {METHODS[method]} is {shown(bits)}, and {read} are read")
        block = fields.get("block", fields.get("weight_block_size")) if method == "fp8" else None
        if block is not None and not (
            isinstance(block, (list, tuple)) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)
        ):
            raise ConfigError(f"weight_block_size of FP8 is {shown(block)}, not the rows and columns of a block")
        size = fields.get("group_size") if method in BITS else None
        if size is not None and (type(size) is not int or size == 0 or size < -1):
            raise ConfigError(
                f"group_size of {METHODS[method]} is {shown(size)}, not a number of inputs, or -1 for all"
            )
        return cls(
            method, layout, bits, None if block is None else (block[0], block[1]), size, bool(fields.get("dynamic"))
        )

    def has_weights_of(self, other: BaseQuantization | None) -> bool:
        """Return whether the same base has the same weights in both."""
        return self == other

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for a record."""
        told = {"layout": self.layout, "bits": self.bits, "block": None if self.block is None else list(self.block)}
        return {"kind": self.method, **{name: value for name, value in told.items() if value is not None}}

    def __str__(self) -> str:
        """Return the quantizer's name, with the bits."""
        return METHODS[self.method] + ("" if self.bits is None else f" of {self.bits} bits")

"""LLM.int8 as a format of stored weights: recognition and settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gralora_fx.base.sources.base_quantization import BaseQuantization, layer_names


@dataclass(frozen=True)
class EightBits(BaseQuantization):
    """Eight bits for each weight of a linear layer, with a scale for each output (LLM.int8, Dettmers et al. 2022).

    Only weights are rounded, not activations, as when bitsandbytes trains on a CPU.
    """

    sign = "SCB"
    title = "int8 of bitsandbytes"
    texts = "int8"
    metavar = "int8"
    help = "Round the base to eight bits first, as load_in_8bit of bitsandbytes does: int8."
    fields = "one with load_in_8bit=True"
    extra = None
    is_kept = True

    # names of the layers that stay float (`llm_int8_skip_modules`); None for transformers' own choice
    skip_modules: tuple[str, ...] | None = None
    compute_dtype: str = field(default="float32", init=False)  # dtype of the values, which is fixed

    @classmethod
    def of_text(cls, text: str) -> EightBits | None:
        """Parse the word `int8`; None for any other."""
        return cls() if text.lower() == "int8" else None

    @classmethod
    def of_fields(cls, fields: Mapping[str, Any]) -> EightBits | None:
        """Parse a record or the fields of a `BitsAndBytesConfig`; None if they are of another format."""
        if fields.get("kind") == "int8":
            return cls(layer_names(fields.get("skip_modules")))
        if not fields.get("load_in_8bit") or fields.get("quant_method", "bitsandbytes") != "bitsandbytes":
            return None
        return None if fields.get("llm_int8_has_fp16_weight") else cls(layer_names(fields.get("llm_int8_skip_modules")))

    def has_weights_of(self, other: BaseQuantization | None) -> bool:
        """Return whether both give a base the same weights."""
        return isinstance(other, EightBits)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for a record."""
        return {"kind": "int8", "skip_modules": None if self.skip_modules is None else list(self.skip_modules)}

    def __str__(self) -> str:
        """Return the word for it; layer names are left out."""
        return "int8"

"""NF4 and FP4 as a format of stored weights: recognition and settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gralora_fx.base.sources.base_quantization import DTYPES, BaseQuantization, layer_names
from gralora_fx.errors import ConfigError, shown

KINDS = ("nf4", "fp4")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # those of bitsandbytes


@dataclass(frozen=True)
class FourBits(BaseQuantization):
    """Four bits a weight of a linear layer, with a scale for each block of values (QLoRA, Dettmers et al. 2023)."""

    sign = "bitsandbytes__nf4"
    title = "NF4 of bitsandbytes"
    texts = (
        "nf4, nf4-double (the blocks' scales quantized too), or with a block size and a dtype: nf4-double-128-bfloat16"
    )
    metavar = "nf4[-double][-N][-DTYPE]"
    help = (
        "Round the base to four bits first, as it was when a QLoRA adapter was trained on it: nf4 or nf4-double. "
        "A checkpoint that is in four bits needs none of this."
    )
    fields = "a BitsAndBytesConfig with load_in_4bit=True"
    extra = "nf4"

    kind: str = "nf4"  # the 16 values: `"nf4"`, quantiles of a normal distribution, or `"fp4"`
    block_size: int = 64  # consecutive values of the weight `[out, in]` with one scale
    double: bool = False  # whether the scales are quantized too, to 8 bits in blocks of 256 (double quantization)
    # dtype that layers multiply in (`bnb_4bit_compute_dtype`), to which the values are rounded
    compute_dtype: str = "float32"
    # names of the layers that stay float (`llm_int8_skip_modules`); None for transformers' own choice: the head,
    # weights tied to it, and the last layer
    skip_modules: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("kind", self.kind, KINDS),
            ("block_size", self.block_size, BLOCK_SIZES),
            ("double", self.double, (False, True)),
            ("compute_dtype", self.compute_dtype, tuple(DTYPES)),
        ):
            if isinstance(value, bool) != (name == "double") or value not in choices:
                raise ConfigError(
                    f"{name} of a base's quantization must be one of {', '.join(map(str, choices))}, but got "
                    f"{shown(value)}"
                )

    @classmethod
    def of_text(cls, text: str) -> FourBits | None:
        """Parse words such as `nf4-double-128-bfloat16`; None if they are of another format."""
        kind, *words = text.lower().split("-")
        fields: dict[str, Any] = {}
        for word in words:
            name = "double" if word == "double" else "block_size" if re.fullmatch(r"\d{1,6}", word) else "compute_dtype"
            if name in fields or (name == "compute_dtype" and word not in DTYPES):
                return None
            fields[name] = True if name == "double" else int(word) if name == "block_size" else word
        return cls(kind, **fields) if kind in KINDS else None

    @classmethod
    def of_fields(cls, fields: Mapping[str, Any]) -> FourBits | None:
        """Parse a record or the fields of a `BitsAndBytesConfig`; None if they are of another format."""
        if "kind" in fields:
            known = {name: fields[name] for name in cls.__dataclass_fields__ if name in fields}
            return cls(**known | {"skip_modules": layer_names(known.get("skip_modules"))})
        if not fields.get("load_in_4bit") or fields.get("quant_method", "bitsandbytes") != "bitsandbytes":
            return None
        return cls(
            str(fields.get("bnb_4bit_quant_type", "fp4")),
            double=bool(fields.get("bnb_4bit_use_double_quant")),
            compute_dtype=str(fields.get("bnb_4bit_compute_dtype") or "float32").removeprefix("torch."),
            skip_modules=layer_names(fields.get("llm_int8_skip_modules")),
        )

    def has_weights_of(self, other: BaseQuantization | None) -> bool:
        """Return whether both give a base the same weights, apart from rounding to the compute dtype."""
        if not isinstance(other, FourBits):
            return False
        return (self.kind, self.block_size, self.double) == (other.kind, other.block_size, other.double)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for a record."""
        return asdict(self) | {"skip_modules": None if self.skip_modules is None else list(self.skip_modules)}

    def __str__(self) -> str:
        """Return the words for it, as `of` takes them; layer names are left out."""
        words = [self.kind, *["double"] * self.double, str(self.block_size)]
        return "-".join([*words, *[self.compute_dtype] * (self.compute_dtype != "float32")])

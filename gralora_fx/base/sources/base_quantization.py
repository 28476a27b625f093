"""How the weights of a base model are quantized where an adapter is trained on it, as QLoRA's are: bitsandbytes' NF4.

It is told in a few words, `nf4-double-128-bfloat16`, in the fields of transformers' `BitsAndBytesConfig`, or in those
of `BaseQuantization`, which is what records of adapters and exports say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gralora_fx.base.sources.other_formats import of_quantized
from gralora_fx.errors import ConfigError, GraloraError, marked, option, shown

KINDS = ("nf4", "fp4")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # those of bitsandbytes
DTYPES: Mapping[str, str] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # with safetensors' names
RECORD = "base_quantization"  # the field of an adapter's, a model's and an export's configuration
FORM = "nf4, nf4-double (the blocks' scales quantized too), or with a block size and a dtype: nf4-double-128-bfloat16"

_FIELD = "quantization_config"  # of config.json
_READ_BY_TRANSFORMERS = ("mxfp4",)  # which becomes floats while it is loaded
_TITLES = {"bitsandbytes": "bitsandbytes' int8", "compressed-tensors": "compressed-tensors"}


@dataclass(frozen=True)
class BaseQuantization:
    """Four bits for each weight of a linear layer, with a scale for each block of values (QLoRA, Dettmers et al. 2023).

    Attributes:
        kind: The 16 values: `"nf4"`, quantiles of a normal distribution, or `"fp4"`.
        block_size: Values with one scale; they follow each other in the weight `[out, in]`.
        double: Whether the scales are quantized too, to 8 bits in blocks of 256 (double quantization).
        compute_dtype: Dtype that layers multiply in (`bnb_4bit_compute_dtype`), to which the values are rounded.
        skip_modules: Names of the layers that stay float (`llm_int8_skip_modules`); None for transformers' own choice,
            which is the head, what is tied to it, and the last layer.
    """

    kind: str = "nf4"
    block_size: int = 64
    double: bool = False
    compute_dtype: str = "float32"
    skip_modules: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Check every field."""
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
    def of(cls, value: Any) -> BaseQuantization:
        """The quantization that a text, a record, the fields of a `BitsAndBytesConfig` or such an object tell."""
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            return _of_words(value)
        fields = value.to_dict() if hasattr(value, "to_dict") else value
        if isinstance(fields, Mapping) and "kind" in fields:
            known = {name: fields[name] for name in cls.__dataclass_fields__ if name in fields}
            return cls(**known | {"skip_modules": _names(known.get("skip_modules"))})
        if isinstance(fields, Mapping) and fields.get("load_in_4bit"):
            return cls(
                str(fields.get("bnb_4bit_quant_type", "fp4")),
                double=bool(fields.get("bnb_4bit_use_double_quant")),
                compute_dtype=str(fields.get("bnb_4bit_compute_dtype") or "float32").removeprefix("torch."),
                skip_modules=_names(fields.get("llm_int8_skip_modules")),
            )
        raise ConfigError(f"{RECORD} is {FORM}; or a BitsAndBytesConfig with load_in_4bit=True; but got {shown(value)}")

    @property
    def stored_dtype(self) -> str:
        """The name in safetensors of the dtype that values are rounded to."""
        return DTYPES[self.compute_dtype]

    def has_weights_of(self, other: BaseQuantization | None) -> bool:
        """Whether the same base has the same weights in both, but for rounding to the dtype of products."""
        return other is not None and (self.kind, self.block_size, self.double) == (
            other.kind,
            other.block_size,
            other.double,
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields for a record."""
        return asdict(self) | {"skip_modules": None if self.skip_modules is None else list(self.skip_modules)}

    def __str__(self) -> str:
        """The words that tell it, as `of` takes them; names of layers are left out."""
        words = [self.kind, *["double"] * self.double, str(self.block_size)]
        return "-".join([*words, *[self.compute_dtype] * (self.compute_dtype != "float32")])


def _of_words(text: str) -> BaseQuantization:
    kind, *words = text.lower().split("-")
    fields: dict[str, Any] = {}
    for word in words:
        name = "double" if word == "double" else "block_size" if re.fullmatch(r"\d{1,6}", word) else "compute_dtype"
        if name in fields or (name == "compute_dtype" and word not in DTYPES) or kind not in KINDS:
            break
        fields[name] = {"double": True, "block_size": word}.get(name, word)
    else:
        if kind in KINDS:
            return BaseQuantization(kind, **fields | {"block_size": int(fields.get("block_size", 64))})
    raise ConfigError(f"{option(base_quantization=text)} is not available; take {FORM}")


def _names(value: Any) -> tuple[str, ...] | None:
    """Names of layers, where they are a list of them."""
    if value is None or (isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)):
        return None if value is None else tuple(value)
    raise ConfigError(f"the names of the layers that stay float must be a list or None, but got {shown(value)}")


def recorded_quantization(record: Any) -> BaseQuantization | None:
    """The quantization that a record tells; None if it cannot be read."""
    try:
        return BaseQuantization.of(record)
    except ConfigError:
        return None


def packed_quantization(
    fields: Mapping[str, Any], origin: object, error: type[GraloraError]
) -> BaseQuantization | None:
    """The quantization of the weights in a checkpoint's files; None of floats.

    Its block size, which `config.json` does not tell, is that of the files (`SavedWeights.quantization`).
    """
    config = fields.get(_FIELD)
    if not config:
        return None
    config = config if isinstance(config, Mapping) else getattr(config, "to_dict", dict)()
    method = str(config.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in config else "an unknown method"))
    if method in _READ_BY_TRANSFORMERS:
        return None
    if method == "bitsandbytes" and config.get("load_in_4bit"):
        try:
            return BaseQuantization.of(config)
        except ConfigError as failure:
            raise error(f"{origin}: its {_FIELD} cannot be read ({marked(failure)}); save the model again") from failure
    title = _TITLES.get(method, method.upper() if len(method) < 5 else method)
    raise error(
        f"{origin} is quantized by {title}, which is not read (of quantized bases, NF4 of bitsandbytes is); "
        f"{of_quantized(origin, method, fields)}"
    )


def check_not_packed(
    fields: Mapping[str, Any], origin: object, asked: BaseQuantization, error: type[GraloraError]
) -> None:
    """Check that a checkpoint's weights are floats, before they are rounded."""
    if packed_quantization(fields, origin, error) is not None:
        raise ConfigError(
            f"{origin} is quantized already, and its own values are taken: leave "
            f"{option(base_quantization=str(asked))} out, or give the float checkpoint that it was made from"
        )

"""Quantization of a base model's stored weights, or of its float weights while an adapter is trained.

A format is a subclass of `BaseQuantization`, which a feature adds at the point "weight forms". An instance holds a
base's settings, read from a text, the fields of `config.json`, a transformers object, or a record of an adapter or an
export.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from gralora_fx.base.features import parts
from gralora_fx.errors import ConfigError, GraloraError, listed, marked, option, shown

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DTYPES: Mapping[str, str] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # with safetensors' names

_FIELD = "quantization_config"  # in config.json
_READ_BY_TRANSFORMERS = ("mxfp4",)  # transformers converts it to floats when loading


class BaseQuantization(ABC):
    """A format of quantized weights, and a base's settings in it.

    Attributes:
        sign: One of the signs of the feature, which reads such weights and rounds others to them.
        title: The form's name in messages.
        texts: The strings that `of` takes, in words; empty for a form that is only read, to which nothing is rounded.
        metavar: The same as a pattern.
        help: The command line's help on rounding a base.
        fields: The object of transformers that `of` takes, in words.
        extra: The pip extra that rounding needs, or None.
        is_kept: Whether an export of a checkpoint in this form keeps its bits by default.
        compute_dtype: Dtype that layers multiply in, to which the values are rounded.
        skip_modules: Names of the layers that stay float; None for transformers' own choice.
    """

    sign: ClassVar[str]
    title: ClassVar[str]
    texts: ClassVar[str]
    metavar: ClassVar[str]
    help: ClassVar[str]
    fields: ClassVar[str]
    extra: ClassVar[str | None]
    is_kept: ClassVar[bool] = False
    compute_dtype: str
    skip_modules: tuple[str, ...] | None

    @classmethod
    def of(cls, value: Any) -> BaseQuantization:
        """Return the quantization described by a text, a record, or a transformers object or its fields."""
        if isinstance(value, BaseQuantization):
            return value
        forms: list[type[BaseQuantization]] = parts("weight forms")
        fields = value.to_dict() if hasattr(value, "to_dict") else value
        for form in forms:
            if isinstance(fields, str):
                found = form.of_text(fields)
            else:
                found = form.of_fields(fields) if isinstance(fields, Mapping) else None
            if found is not None:
                return found
        texts = "; or ".join(form.texts for form in forms if form.texts)
        if isinstance(fields, str):
            remedy = f"take {texts}" if texts else "leave it out"
            raise ConfigError(f"{option(base_quantization=fields)} is not available; {remedy}")
        choices = "; or ".join([*([texts] if texts else ()), *(form.fields for form in forms)]) or "not available"
        raise ConfigError(f"base_quantization is {choices}; but got {shown(value)}")

    @classmethod
    @abstractmethod
    def of_text(cls, text: str) -> Self | None:
        """Parse a text; None if it is of another format."""

    @classmethod
    @abstractmethod
    def of_fields(cls, fields: Mapping[str, Any]) -> Self | None:
        """Parse a record or a transformers configuration; None if it is of another format."""

    @property
    def stored_dtype(self) -> str:
        """The name in safetensors of the dtype that values are rounded to."""
        return DTYPES[self.compute_dtype]

    def rounded(self, weight: NDArray[Any], name: str) -> NDArray[np.float32]:
        """Quantize and dequantize a float weight `[out, in]`: return it in float32 as its layer would multiply by it.

        Args:
            weight: The weight.
            name: Its name in messages.

        Raises:
            CheckpointError: Its values are not finite.
            ConfigError: Nothing is rounded to the form.
        """
        rounding = parts("rounding", {self.sign})
        if not rounding:
            raise ConfigError(
                f"a base quantized as {self} is read from its checkpoint, and floats cannot be rounded to it here; "
                "give the quantized checkpoint as the base"
            )
        values: NDArray[np.float32] = rounding[0](weight, self, name)
        return values

    @abstractmethod
    def has_weights_of(self, other: BaseQuantization | None) -> bool:
        """Return whether both give a base the same weights, apart from rounding to the compute dtype."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return the fields for a record."""


def layer_names(value: Any) -> tuple[str, ...] | None:
    """Return the layer names that a record lists; raise a `ConfigError` unless it is a list of names or None."""
    if value is None or (isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)):
        return None if value is None else tuple(value)
    raise ConfigError(f"the names of the layers that stay float must be a list or None, but got {shown(value)}")


def recorded_quantization(record: Any) -> BaseQuantization | None:
    """Return a record's quantization; None if it cannot be read."""
    try:
        return BaseQuantization.of(record)
    except ConfigError:
        return None


def packed_quantization(
    fields: Mapping[str, Any], origin: object, error: type[GraloraError]
) -> BaseQuantization | None:
    """Return the quantization of a checkpoint's weights; None for floats.

    Settings missing from `config.json`, such as a block size, come from the files (`SavedWeights.quantization`).
    """
    config = fields.get(_FIELD)
    if not config:
        return None
    config = config if isinstance(config, Mapping) else getattr(config, "to_dict", dict)()
    method = str(config.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in config else "an unknown method"))
    if method in _READ_BY_TRANSFORMERS:
        return None
    forms: list[type[BaseQuantization]] = parts("weight forms")
    for form in forms:
        try:
            found = form.of_fields({**config, "quant_method": method})
        except ConfigError as failure:
            from gralora_fx.base.sources.other_formats import of_quantized  # needed for an error only

            raise error(
                f"{origin} is quantized by {_title(method)} in a way that is not read ({marked(failure)}); "
                f"{of_quantized(origin, method, fields)}"
            ) from failure
        if found is not None:
            return found
    from gralora_fx.base.sources.other_formats import of_quantized

    titles = [form.title for form in forms]
    read = f" (of quantized bases, {listed(titles)} {'is' if len(titles) == 1 else 'are'})" if titles else ""
    raise error(
        f"{origin} is quantized by {_title(method)}, which is not read{read}; {of_quantized(origin, method, fields)}"
    )


def _title(method: str) -> str:
    return method.upper() if len(method) < 5 else method


def check_not_packed(
    fields: Mapping[str, Any], origin: object, asked: BaseQuantization, error: type[GraloraError]
) -> None:
    """Check that a checkpoint's weights are floats before rounding them."""
    if packed_quantization(fields, origin, error) is not None:
        raise ConfigError(
            f"{origin} is quantized already, and its own values are taken: leave "
            f"{option(base_quantization=str(asked))} out, or give the float checkpoint that it was made from"
        )

"""Facts about an adapter's base without a model: its name, and the classes of a head in the adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from gralora_fx.base.sources.base_quantization import BaseQuantization, packed_quantization
from gralora_fx.base.sources.same_base import BaseSource, read_config_fields
from gralora_fx.core.config.reading import config_fields
from gralora_fx.errors import ConfigError, TraceError, option, shown

_HEAD_KEY = re.compile(r"(?:^|\.)(?:classifier|score)(?:\.out_proj|\.dense)?\.weight$")


def base_name(model: str | None, adapter: str | None, fields: Mapping[str, object] | None = None) -> str:
    """Return the name of the base: the given one, or that in an adapter's configuration."""
    if model is None and adapter is None:
        raise ConfigError(
            f"no model was named; give {option(model=...)}, or an {option(adapter=...)} whose base_model_name_or_path "
            "names it"
        )
    if fields is None:
        fields = {} if model else config_fields(adapter or "")[0]
    name = model or fields.get("base_model_name_or_path")
    if name is None:
        raise ConfigError(f"{adapter} names no base model; give {option(model=...)}")
    if not isinstance(name, str) or not name:
        raise ConfigError(
            f"base_model_name_or_path must be a string or None, but got {shown(name)}, in {adapter}; give "
            f"{option(model=...)}"
        )
    return name


def head_classes(shapes: Mapping[str, Sequence[int]]) -> int | None:
    """Return the number of classes of the classification head in an adapter; None if it has none."""
    heads = [shape[0] for key, shape in shapes.items() if _HEAD_KEY.search(key) and len(shape) == 2]
    return heads[-1] if heads else None


def needed_quantization(record: Any, name: str) -> BaseQuantization | None:
    """Return the quantization that makes a base equal to a record's; None if none is needed, as for quantized files."""
    if not record:
        return None
    directory = BaseSource(name).directory  # of a hub id, its snapshot if it was downloaded
    fields = None if directory is None else read_config_fields(directory)
    if fields is not None and packed_quantization(fields, name, TraceError) is not None:
        return None
    return BaseQuantization.of(record)

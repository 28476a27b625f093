"""A saved adapter read without a model: its updates by layer, and the parameters that it replaces."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gralora_fx.adapters.adapter_files import KEY_PREFIX, WEIGHTS_NAME, adapter_digest, read_adapter
from gralora_fx.config import AdapterConfig
from gralora_fx.config.expressions import pattern_key
from gralora_fx.errors import CheckpointError
from gralora_fx.methods import AdapterMethod, method_of
from gralora_fx.methods.method import AdapterTensors, Update
from gralora_fx.sources.atomic_save import current_file
from gralora_fx.sources.hub import resolve_directory

_MODULE_COPY = re.compile(r"\.(modules_to_save(\.[^.]+)?|original_module)\.")


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter directory's content.

    Attributes:
        origin: The directory.
        config: Its configuration.
        updates: The weight updates by the path of the layer.
        replaced: Trained parameters by their names in the model: biases, and those of `modules_to_save`.
        copies: Parameters that the file only repeats from the base, such as the weight of an adapted head.
        sha256: Digest of the tensors as a manifest holds it.
    """

    origin: str
    config: AdapterConfig
    updates: Mapping[str, Update]
    replaced: Mapping[str, Tensor]
    copies: Mapping[str, Tensor]
    sha256: str

    def features(self, path: str) -> tuple[int, int]:
        """Widths in and out of an adapted layer."""
        return self.updates[path].factors.features


def read_saved_adapter(adapter_dir: str | Path) -> SavedAdapter:
    """Read an adapter of any registered method, and check that its tensors fit its configuration.

    Args:
        adapter_dir: Local directory or hub id.

    Raises:
        ConfigError: The configuration is missing or invalid.
        CheckpointError: Tensors are missing, unexpected, of another shape than the configuration says, or not finite;
            all are named.
    """
    path = resolve_directory(adapter_dir, CheckpointError)
    config, tensors = read_adapter(path)
    method = method_of(config)
    sites: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    problems: list[str] = []
    for key, tensor in tensors.items():
        if not key.startswith(KEY_PREFIX):
            problems.append(f"unexpected {key}, which does not start with {KEY_PREFIX}")
        elif not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            problems.append(f"{key} is {tensor.dtype}, not a float tensor")
        elif not bool(torch.isfinite(tensor).all()):
            problems.append(f"{key} holds values that are not finite")
        elif (place := _place(key, method)) is not None:
            sites.setdefault(place[0], {})[place[1]] = tensor
        else:
            others[key] = tensor
    updates: dict[str, Update] = {}
    for site, fields in sites.items():
        updates |= _update(site, fields, config, method, problems)
    if not updates and not problems:
        problems.append(f"it holds no tensor of {config.TITLE}")
    if problems:
        listed = "\n".join(f"- {problem}" for problem in problems[:20])
        more = f"\n- and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise CheckpointError(
            f"{path / WEIGHTS_NAME} does not fit its configuration; copy or save the adapter again:\n{listed}{more}"
        )
    replaced = {key: t for key, t in others.items() if _is_trained(key, config)}
    kept = {key: t for key, t in tensors.items() if key in replaced or _place(key, method) is not None}
    return SavedAdapter(
        str(path),
        config,
        updates,
        {_parameter(key): t for key, t in replaced.items()},
        {_parameter(key): t for key, t in others.items() if key not in replaced},
        adapter_digest(current_file(path, WEIGHTS_NAME), kept, config),
    )


def _place(key: str, method: AdapterMethod) -> tuple[str, str] | None:
    """The layer and the field of a tensor of the adapter's method; None for other keys."""
    for field, suffix in method.keys.items():
        if key.endswith(f".{suffix}"):
            return key.removeprefix(KEY_PREFIX).removesuffix(f".{suffix}"), field
    return None


def _update(
    path: str, fields: Mapping[str, Tensor], config: AdapterConfig, method: AdapterMethod, problems: list[str]
) -> dict[str, Update]:
    """The update of a layer, by its path; nothing, and problems, if its tensors do not fit the configuration."""

    def value_of(field: str) -> Any:
        pattern: Mapping[str, Any] = getattr(config, config.PATTERN_OF[field])
        key = pattern_key(pattern, path)
        return getattr(config, field) if key is None else pattern[key]

    dims, scale = method.sizes(config, value_of)
    expected = method.shapes(dims.k, dims.k, dims)
    missing = [f"missing {KEY_PREFIX}{path}.{method.keys[field]}" for field in expected if field not in fields]
    extra = [f"unexpected {KEY_PREFIX}{path}.{method.keys[field]}" for field in fields if field not in expected]
    misshapen = [
        f"{path}.{method.keys[field]} has {fields[field].ndim} axes instead of {len(shape)}"
        for field, shape in expected.items()
        if field in fields and fields[field].ndim != len(shape)
    ]
    if missing or extra or misshapen:
        problems += [*missing, *extra, *misshapen]
        return {}
    factors: AdapterTensors = method.tensors(**fields)
    for field, shape in method.shapes(*factors.features, dims).items():
        if tuple(fields[field].shape) != shape:
            problems.append(f"{path}.{method.keys[field]} has shape {list(fields[field].shape)}, not {list(shape)}")
    return {path: Update(factors, scale)}


def _parameter(key: str) -> str:
    """The model's name of a parameter that PEFT's file holds under a key."""
    return _MODULE_COPY.sub(".", key.removeprefix(KEY_PREFIX)).replace(".base_layer.", ".")


def _is_trained(key: str, config: AdapterConfig) -> bool:
    """Whether a parameter trained with the adapter; others repeat the base's."""
    if ".original_module." in key:
        return False
    name = _parameter(key)
    if name.rpartition(".")[2] == "bias" and config.bias != "none":
        return True
    parts = name.split(".")[:-1]
    owners = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(owner.endswith(saved) for owner in owners for saved in config.saved_module_names)

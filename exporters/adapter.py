"""`export_adapter`: a PEFT adapter as data of an export, without the base model."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from gralora_fx.adapters.checkpoint import read_adapter
from gralora_fx.config import AdapterConfig
from gralora_fx.errors import ExportError, listed, warn_caller
from gralora_fx.exporters.artifact.adapter_files import write_adapter
from gralora_fx.methods import method_of
from gralora_fx.methods.method import Update
from gralora_fx.planning.targets import pattern_key
from gralora_fx.runtime.adapter_file import SUFFIX, check_name
from gralora_fx.runtime.manifest import read_manifest
from gralora_fx.runtime.names import ADAPTERS

_PREFIX = "base_model.model."


def export_adapter(
    adapter_dir: str | Path,
    onnx_dir: str | Path,
    name: str = "default",
    *,
    overwrite: bool = False,
    revision: str | None = None,
) -> Path:
    """Add a PEFT adapter to an export that takes adapters as data.

    GraLoRA, LoRA and rsLoRA, rank and alpha patterns included; LoRA is an adapter whose blocks have rank 0. The scale
    becomes part of the `B` tensors.

    Args:
        adapter_dir: A directory with `adapter_config.json` and `adapter_model.safetensors`, or its hub id.
        onnx_dir: A directory that `export_onnx` wrote with `adapters="swappable"`, `"inputs"` or `"batched"`.
        name: The name to give it.
        overwrite: Whether an adapter of the name may be replaced.
        revision: Revision of the adapter's hub repository.

    Returns:
        `adapters/<name>.onnx_adapter` in the export; `<name>.json` beside it says what it holds.

    Raises:
        ExportError: The directory is not such an export, has an adapter of the name, or lacks layers of the adapter or
            its blocks; or the adapter is more than a sum of low-rank terms. Every problem is named.
        ConfigError: The adapter's configuration is missing or invalid, or of a method or form that is not supported.
        CheckpointError: Its tensors cannot be read.
    """
    check_name(name)
    manifest = read_manifest(onnx_dir)
    inputs = manifest.adapter_inputs
    if inputs is None:
        raise ExportError(
            f"{onnx_dir} takes no adapters: it was exported with adapters='merged'; export the model with "
            "adapters='swappable', or fold the adapter into it with fold_onnx"
        )
    path = Path(onnx_dir) / ADAPTERS / f"{name}{SUFFIX}"
    if path.exists() and not overwrite:
        raise ExportError(f"{path} exists; give --overwrite (overwrite=True) to replace it, or another name")
    config, tensors = read_adapter(adapter_dir, revision=revision)
    updates = updates_of(config, tensors, str(adapter_dir))
    fields: Mapping[str, Any] = json.loads(config.to_json())
    return write_adapter(Path(onnx_dir), name, updates, fields, inputs, manifest.base_fingerprint)


def updates_of(config: AdapterConfig, tensors: Mapping[str, Tensor], origin: str) -> dict[str, Update]:
    """The weight updates of a saved adapter by the path of the layer.

    Args:
        config: Its configuration.
        tensors: Its tensors by PEFT's keys.
        origin: Where they come from, for messages.

    Raises:
        ExportError: A layer's tensors are incomplete, of other shapes than the configuration says, or not finite; or
            there are others: trained copies of the base's parameters are not sums of low-rank terms.
    """
    method = method_of(config)
    by_path: dict[str, dict[str, Tensor]] = {}
    others: list[str] = []
    for key, tensor in tensors.items():
        field = next((field for field, end in method.keys.items() if key.endswith(f".{end}")), None)
        if field is not None and key.startswith(_PREFIX):
            path = key.removeprefix(_PREFIX).removesuffix(f".{method.keys[field]}")
            by_path.setdefault(path, {})[field] = tensor
        else:
            others.append(key)
    others = [key for key in others if not _is_base_weight(key, by_path)]
    if others:
        raise ExportError(
            f"{origin} holds {listed(sorted(others))}: trained copies of the base's parameters (modules_to_save or "
            "bias), which are not sums of low-rank terms and cannot be data; export the model with adapters='merged'"
        )
    problems: list[str] = []
    updates: dict[str, Update] = {}
    for path, found in by_path.items():
        dims, scale = method.sizes(config, partial(_value_of, config, path))
        fields = method.shapes(0, 0, dims)
        missing = [f"{path}.{method.keys[field]} is missing" for field in fields if field not in found]
        if missing:
            problems += missing
            continue
        factors = method.tensors(**found)
        if factors.dims != dims:
            problems.append(f"{path} has {method.text(factors.dims)}, and its configuration says {method.text(dims)}")
        problems += [
            f"{path}.{method.keys[field]} holds values that are not finite"
            for field, tensor in found.items()
            if not bool(tensor.isfinite().all())
        ]
        updates[path] = Update(factors, scale)
    if problems or not updates:
        raise ExportError(f"{origin} is damaged: {listed(problems) or 'it adapts no layer'}; copy or save it again")
    return updates


def _is_base_weight(key: str, adapted: Container[str]) -> bool:
    """Whether a key is that of an adapted layer's own weight, which PEFT saves beside the adapter of a head."""
    path = key.removeprefix(_PREFIX).removesuffix(".base_layer.weight")
    if not key.endswith(".base_layer.weight") or path not in adapted:
        return False
    warn_caller(f"{key} is a copy of the base's weight, which an adapter does not change; it is not compared with it")
    return True


def _value_of(config: AdapterConfig, path: str, field: str) -> Any:
    """A field of a configuration at a layer, a pattern's value first."""
    pattern: Mapping[str, Any] = getattr(config, config.PATTERN_OF[field])
    key = pattern_key(pattern, path)
    return getattr(config, field) if key is None else pattern[key]

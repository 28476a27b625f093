"""Checks that an export is verified with the adapters that it was made with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from safetensors.torch import save
from torch import Tensor

from gralora_fx.adapters.checkpoint import read_adapter, tensors_digest
from gralora_fx.config import AdapterConfig
from gralora_fx.errors import ExportError
from gralora_fx.exporters.artifact.manifest import describe_adapters
from gralora_fx.methods import method_named, method_of
from gralora_fx.model.gralora_model import GraloraModel
from gralora_fx.runtime.manifest import AdapterEntry, Manifest
from gralora_fx.tracing.traced_model import TracedModel

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_active_adapters(manifest: Manifest, origin: str, model: TracedModel | GraloraModel) -> None:
    """Check that a model's active adapters are those that were exported.

    Args:
        manifest: The export's manifest.
        origin: Its directory, for messages.
        model: The model to compare it with.

    Raises:
        ExportError: They differ; the message names both sets.
    """
    exported, active = manifest.adapters, describe_adapters(model)
    if _digests(exported) == _digests(active):
        return
    state = f"the given model has {_all(active)} active" if active else "the given model has no active adapter"
    if not exported:
        raise ExportError(f"{origin} was exported without an adapter, but {state}; deactivate it (disable_adapter)")
    raise ExportError(f"{origin} was exported with {_all(exported)}, but {state}; give the model that was exported")


def check_given_adapter(manifest: Manifest, origin: str, adapter: str | None) -> None:
    """Check that an adapter directory is what was exported, before a base is loaded.

    Args:
        manifest: The export's manifest.
        origin: Its directory, for messages.
        adapter: Directory or hub id of the given adapter, or None.

    Raises:
        ExportError: The export has an adapter and none is given, or the other way round, or they differ.
        ConfigError: The given adapter's configuration is missing or invalid.
        CheckpointError: Its tensors cannot be read.
    """
    if manifest.adapter_inputs is not None:  # any may be given; verification looks for its tensors
        return
    exported = manifest.adapters
    if len(exported) > 1:
        raise ExportError(
            f"{origin} was exported with {_all(exported)}, and a command takes one adapter; compare it in Python, with "
            "verify_onnx and a model where all of them are active"
        )
    if not exported:
        if adapter is not None:
            raise ExportError(f"{origin} was exported without an adapter; leave --adapter {adapter} out")
        return
    name, entry = next(iter(exported.items()))
    if adapter is None:
        raise ExportError(f"{origin} was exported with {_one(name, entry)}; give its directory with --adapter")
    config, tensors = read_adapter(adapter)
    differing = [
        f"{field}={value!r} instead of {entry.config[field]!r}"
        for field, value in ({"peft_type": config.peft_type} | config.sizes).items()
        if field in entry.config and value != entry.config[field]
    ]
    if not differing and entry.sha256 in _possible_digests(config, tensors):
        return
    why = ", ".join(differing) or "its tensors have another SHA-256"
    raise ExportError(f"{origin} was exported with {_one(name, entry)}, and {adapter} is another one: {why}")


def _digests(entries: Mapping[str, AdapterEntry]) -> list[str]:
    return sorted(str(entry.sha256) for entry in entries.values())


def _all(entries: Mapping[str, AdapterEntry]) -> str:
    return " and ".join(_one(name, entry) for name, entry in entries.items())


def _one(name: str, entry: AdapterEntry) -> str:
    """A description of an adapter: name, sizes, base and digest."""
    config = entry.config
    fields = method_named(config.get("peft_type"), f"the adapter {name!r}").config.SIZE_FIELDS
    sizes = ", ".join(f"{field}={config[field]}" for field in fields if config.get(field) not in ({}, None))
    base = config.get("base_model_name_or_path")
    made_for = f", made for {base}" if base else ""
    return f"the adapter {name!r} ({sizes}{made_for}, SHA-256 {str(entry.sha256)[:12]})"


def _possible_digests(config: AdapterConfig, tensors: Mapping[str, Tensor]) -> set[str]:
    """The digests that a manifest may hold for a file, since a model may cast its tensors.

    A model also drops copies of base tensors: PEFT's copy of an adapted head's weight, or of an embedding.
    """
    saved = config.saved_module_names
    factors = tuple(f".{key}" for key in method_of(config).keys.values())
    biases = (".bias",) if config.bias != "none" else ()
    adapter_tensors = {
        key: tensor
        for key, tensor in tensors.items()
        if key.endswith((*factors, *biases)) or any(_is_under(key, module) for module in saved)
    }
    digests = set()
    for part in (tensors, adapter_tensors):
        for dtype in (None, *_DTYPES):
            cast = {key: (tensor if dtype is None else tensor.to(dtype)).contiguous() for key, tensor in part.items()}
            digests |= {tensors_digest(cast, config), hashlib.sha256(save(cast, metadata={"format": "pt"})).hexdigest()}
    return digests


def _is_under(key: str, module: str) -> bool:
    """Whether a key belongs to a module that PEFT would save by this name: one whose path ends with it."""
    parts = key.split(".")
    return any(".".join(parts[:end]).endswith(module) for end in range(1, len(parts)))

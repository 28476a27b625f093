"""Differences between a model and the exported one, or between their adapters."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence, Set
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from gralora_fx.core.adapters.saved_form import tensors_digest
from gralora_fx.core.config import AdapterConfig
from gralora_fx.core.methods import method_described, method_of
from gralora_fx.core.model.gralora_model import GraloraModel
from gralora_fx.core.model.rewrite import merge_lazily
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.errors import ExportError, option
from gralora_fx.exporters.artifact.manifest import describe_adapters, digests_of
from gralora_fx.exporters.kinds.conversion import base_trace, fingerprint_of
from gralora_fx.exporters.verify.outputs import check_inputs
from gralora_fx.format.manifest import AdapterEntry, Manifest

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_same_model(output_dir: str | Path, manifest: Manifest, model: TracedModel | GraloraModel) -> None:
    """Check that an export is compared with its own model; with another, every difference would look like a fault."""
    expected, own = manifest.base_fingerprint, fingerprint_of(model)
    if expected not in (None, own) and not _is_merged(model, manifest):
        if all(isinstance(shape, list) for shape in manifest.inputs.values()):  # a single file
            check_inputs(manifest.inputs, base_trace(model).example_inputs)
        raise ExportError(
            f"{output_dir} was exported from another base: its weights have fingerprint {str(expected)[:12]}, those of "
            f"the given model {own[:12]}; give the base that was exported, with its adapters active rather than "
            "folded"
        )
    if manifest.adapter_inputs is None:
        _check_active_adapters(manifest, str(output_dir), model)


def _is_merged(model: TracedModel | GraloraModel, manifest: Manifest) -> bool:
    """Return whether an export's fingerprint is that of the model with its active adapters merged.

    Only the manifest's first adapters count: others may have been folded later, which leaves the fingerprint unchanged.
    """
    if not isinstance(model, GraloraModel):
        return False
    order = [entry.sha256 for entry in manifest.adapters.values()]
    digests = {name: entry.sha256 for name, entry in describe_adapters(model).items()}
    names = sorted(
        (name for name in model.active_adapters if digests.get(name) in order),
        key=lambda name: order.index(digests[name]),
    )
    return any(
        fingerprint_of(merge_lazily(model, names[:count])) == manifest.base_fingerprint
        for count in range(len(names), 0, -1)
    )


def _check_active_adapters(manifest: Manifest, origin: str, model: TracedModel | GraloraModel) -> None:
    """Check that a model's active adapters are those that were exported."""
    exported, active = manifest.adapters, describe_adapters(model)
    if digests_of(exported) == digests_of(active):
        return
    state = f"the given model has {_all(active)} active" if active else "the given model has no active adapter"
    if not exported:
        raise ExportError(f"{origin} was exported without an adapter, but {state}; deactivate it (disable_adapter)")
    raise ExportError(f"{origin} was exported with {_all(exported)}, but {state}; give the model that was exported")


def check_exported_adapters(manifest: Manifest, origin: str, adapters: Sequence[str]) -> None:
    """Check that adapter directories hold the exported adapters, in any order, before a base is loaded."""
    if manifest.adapter_inputs is not None:  # any adapter is allowed; verification looks for its tensors
        if len(adapters) > 1:
            raise ExportError(f"{origin} takes adapters as data, and is verified with one at a time; give one adapter")
        return
    left = dict(manifest.adapters)
    if not left:
        if adapters:
            raise ExportError(f"{origin} was exported without an adapter; leave {option(adapter=adapters[0])} out")
        return
    for adapter in adapters:
        name, differing = _nearest(left, adapter)
        if differing is None:
            del left[name]
            continue
        if not left:
            raise ExportError(
                f"{origin} was exported with {_all(manifest.adapters)}, and {adapter} is one more; give each once"
            )
        raise ExportError(f"{origin} was exported with {_all(left)}, and {adapter} is another one: {differing}")
    if left:
        each, too = "its directory" if len(left) == 1 else "the directory of each", " too" if adapters else ""
        raise ExportError(f"{origin} was exported with {_all(left)}; give {each} as {option(adapter=...)}{too}")


def _nearest(entries: Mapping[str, AdapterEntry], adapter: str) -> tuple[str, str | None]:
    """Return the matching entry of an adapter, and None; or another entry's name, and the difference."""
    from gralora_fx.core.adapters.adapter_files import read_adapter

    config, tensors = read_adapter(adapter)
    digests = _possible_digests(config, tensors)
    differences = {name: _difference(entry, config, digests) for name, entry in entries.items()}
    same = next((name for name, differing in differences.items() if not differing), None)
    return (same, None) if same is not None else next(iter(differences.items()), ("", ""))


def _difference(entry: AdapterEntry, config: AdapterConfig, digests: Set[str]) -> str:
    """Describe how an exported adapter differs from another; empty if it does not."""
    differing = [
        f"{field}={value!r} instead of {entry.config[field]!r}"
        for field, value in ({"peft_type": config.peft_type} | config.sizes).items()
        if field in entry.config and value != entry.config[field]
    ]
    if differing or entry.sha256 in digests:
        return ", ".join(differing)
    return "its tensors have another SHA-256"


def _all(entries: Mapping[str, AdapterEntry]) -> str:
    return " and ".join(_one(name, entry) for name, entry in entries.items())


def _one(name: str, entry: AdapterEntry) -> str:
    config = entry.config
    fields = method_described(config, f"the adapter {name!r}").config.SIZE_FIELDS
    sizes = ", ".join(f"{field}={config[field]}" for field in fields if config.get(field) not in ({}, None))
    base = config.get("base_model_name_or_path")
    made_for = f", made for {base}" if base else ""
    return f"the adapter {name!r} ({sizes}{made_for}, SHA-256 {str(entry.sha256)[:12]})"


def _possible_digests(config: AdapterConfig, tensors: Mapping[str, Tensor]) -> set[str]:
    """Return the digests that a manifest may hold for a file: a model may cast tensors, and drops PEFT's copies."""
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
    """Return whether a key belongs to a module that PEFT saves by this name: one whose path ends with it."""
    parts = key.split(".")
    return any(".".join(parts[:end]).endswith(module) for end in range(1, len(parts)))

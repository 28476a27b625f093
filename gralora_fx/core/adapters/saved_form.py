"""An adapter as saved: its configuration, and the bytes and digest of its `adapter_model.safetensors`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from gralora_fx.base.sources.model_files import RECORD
from gralora_fx.core.config import AdapterConfig
from gralora_fx.core.methods.arrays import Array, to_numpy
from gralora_fx.core.planning.targets import exact_targets, resolve_targets, trains_whole_at, unmatched_names

if TYPE_CHECKING:  # torch is not needed for the files of an adapter
    from gralora_fx.core.adapters.adapter import ModelAdapter
    from gralora_fx.core.tracing.traced_model import TracedModel

SIZES = "gralora_config"  # in the metadata of the safetensors file, which PEFT ignores


def file_metadata(config: AdapterConfig) -> dict[str, str]:
    """Return the metadata of an adapter's safetensors file."""
    return {"format": "pt", SIZES: json.dumps(config.sizes, sort_keys=True)}


def sorted_metadata(header: bytes) -> bytes:
    """Return a safetensors header with its metadata sorted, since safetensors writes them in no fixed order."""
    fields = json.loads(header)
    fields["__metadata__"] = dict(sorted(fields["__metadata__"].items()))
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    return text.ljust(len(header)) if len(text) <= len(header) else header


def tensors_digest(tensors: Mapping[str, Array], config: AdapterConfig) -> str:
    """Return the SHA-256 of `adapter_model.safetensors` for an adapter's tensors and saved configuration."""
    content = memoryview(save(sorted_arrays(tensors), metadata=file_metadata(config)))
    end = 8 + int.from_bytes(content[:8], "little")
    digest = hashlib.sha256(content[:8])
    digest.update(sorted_metadata(bytes(content[8:end])))
    digest.update(content[end:])
    return digest.hexdigest()


def sorted_arrays(tensors: Mapping[str, Array]) -> dict[str, NDArray[Any]]:
    """Return tensors as contiguous numpy arrays, sorted by key."""
    return {key: np.require(to_numpy(tensor), requirements="C") for key, tensor in sorted(tensors.items())}


def saved_config(adapter: ModelAdapter, traced: TracedModel) -> AdapterConfig:
    """Return an adapter's configuration as saved, with its shorthands expanded."""
    config = adapter.config
    source = config.base_model_name_or_path or traced.tokenizer_source
    changes: dict[str, object] = {
        "base_model_name_or_path": source,
        "base_quantization": config.base_quantization or getattr(traced.config, RECORD, None),
        "inference_mode": True,
    }
    if config.target_parameters:  # full names in the order of their modules, which PEFT's keys do not contain
        changes["target_parameters"] = [p.parameter for p in adapter.plan.selected if p.parameter is not None]
    if config.adapts_all_linear or config.exclude_modules:
        changes |= {"layers_to_transform": None, "layers_pattern": None, "exclude_modules": None}
        changes["target_modules"] = exact_targets(_adapted_modules(adapter), traced.tree)
    else:
        changes |= _own_targets(adapter, traced)
    return config.changed(**changes)


def _own_targets(adapter: ModelAdapter, traced: TracedModel) -> dict[str, object]:
    """Return the fields that select layers, such that PEFT's rules over paths select exactly the adapted ones.

    Names and indices that the model lacks are left out. If the rules cannot select exactly those, all are listed.
    """
    config = adapter.config
    rule = resolve_targets(config, traced.tree, getattr(traced.config, "model_type", None))
    adapted = _adapted_modules(adapter)
    layers = [site.path for site in traced.sites if site.kind != "functional" or site.path in adapted]
    chosen = [path for path in layers if rule.rejection(path) is None]
    if set(chosen) - set(adapted) - _within_saved(chosen, adapter) or set(adapted) - set(chosen):
        exact = exact_targets(adapted, traced.tree)
        return {"target_modules": exact, "layers_to_transform": None, "layers_pattern": None}
    if rule.pattern is not None:
        return {"target_modules": rule.pattern}
    paths = [*traced.tree.types, *(name for site in traced.sites for name in traced.tree.names_of(site.weight))]
    return {"target_modules": set(rule.names) - set(unmatched_names(rule.names, paths))}


def _adapted_modules(adapter: ModelAdapter) -> list[str]:
    """Return the paths of the sites that `target_modules` selects."""
    return [planned.site.path for planned in adapter.plan.selected if planned.parameter is None]


def _within_saved(paths: Iterable[str], adapter: ModelAdapter) -> set[str]:
    """Return layers inside fully trained modules, which PEFT's bare `endswith` selects too."""
    return {path for path in paths if trains_whole_at(path, adapter.config.saved_module_names)}

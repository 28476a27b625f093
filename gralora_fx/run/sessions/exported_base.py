"""The model in an export, to compare an adapter with: its base, and its linear layers."""

from __future__ import annotations

from pathlib import Path

from gralora_fx.base.sources.same_base import BaseSource, read_config_fields
from gralora_fx.core.adapters.agreement import KnownLayers
from gralora_fx.format.manifest import Manifest


def base_of_export(directory: str | Path, manifest: Manifest | None, given: str | Path | None = None) -> BaseSource:
    """Return the known facts of an export's base."""
    fields = read_config_fields(Path(directory))
    if manifest is not None and manifest.base is not None:
        return BaseSource(manifest.base.name, manifest.base.revision, fields, manifest.base.quantization)
    named = given or (fields or {}).get("_name_or_path")
    return BaseSource(str(named) if named else None, None, fields)


def layers_of_export(directory: str | Path, manifest: Manifest) -> KnownLayers:
    """Return the linear layers of an exported model, including those without adapter inputs."""
    model_type = (read_config_fields(Path(directory)) or {}).get("model_type")
    layers = [site.path for site in manifest.sites if site.is_layer and site.kind != "functional"]
    functional = [site.path for site in manifest.sites if site.path not in layers]
    return KnownLayers(layers, model_type if isinstance(model_type, str) else None, functional)

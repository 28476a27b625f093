"""The active adapters of a model, written as data of its export."""

from __future__ import annotations

import json
from pathlib import Path

from gralora_fx.adapters.checkpoint import saved_config
from gralora_fx.exporters.artifact.base_parameters import BaseParameters
from gralora_fx.exporters.artifact.exported_adapters import Changes, write_adapter
from gralora_fx.methods.arrays import to_numpy
from gralora_fx.model.gralora_model import GraloraModel
from gralora_fx.runtime.manifest import Manifest


def write_active_adapters(directory: Path, model: GraloraModel, manifest: Manifest) -> None:
    """Write each active adapter of a model to an export.

    Args:
        directory: The export directory.
        model: The model.
        manifest: The manifest of the export, which takes adapters as data.

    Raises:
        ExportError: An adapter's name is not one for a file, its values do not fit the dtype, or the export's files do
            not hold the parameters that it replaces.
    """
    base = BaseParameters(directory, manifest)
    base.check()
    assert manifest.adapter_inputs is not None
    for name in model.active_adapters:
        adapter = model.adapter(name)
        config = json.loads(saved_config(adapter, model.traced).to_json())
        changes = installed_changes(model, name, base)
        write_adapter(
            directory, name, changes, config, manifest.adapter_inputs, manifest.base_fingerprint, adapter.base
        )


def installed_changes(model: GraloraModel, name: str, base: BaseParameters) -> Changes:
    """What an adapter of a model changes of an export.

    Args:
        model: The model.
        name: The adapter.
        base: The export's parameters.

    Raises:
        ExportError: It trains parameters that do not fit the export.
    """
    adapter = model.adapter(name)
    updates = {path: adapter.update(path) for path in adapter.factors}
    copies = {base_name: to_numpy(value) for owned in adapter.copies.values() for base_name, value in owned.items()}
    return base.changes(updates, copies, name)

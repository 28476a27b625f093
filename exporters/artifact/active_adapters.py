"""The adapters of a model as changes of its export, written to it."""

from __future__ import annotations

import json
from pathlib import Path

from gralora_fx.core.adapters.saved_form import saved_config
from gralora_fx.core.methods.arrays import to_numpy
from gralora_fx.core.model.gralora_model import GraloraModel
from gralora_fx.exporters.artifact.base_parameters import BaseParameters
from gralora_fx.exporters.artifact.exported_adapters import Changes, write_adapter
from gralora_fx.format.manifest import Manifest


def write_active_adapters(directory: Path, model: GraloraModel, manifest: Manifest) -> None:
    """Write each active adapter of a model to an export."""
    base = BaseParameters(directory, manifest)
    base.check()
    for name in model.active_adapters:
        adapter = model.adapter(name)
        config = json.loads(saved_config(adapter, model.traced).to_json())
        changes = installed_changes(model, name, base)
        write_adapter(directory, name, changes, config, manifest, adapter.base)


def installed_changes(model: GraloraModel, name: str, base: BaseParameters) -> Changes:
    """Return the changes that a model's adapter makes to an export."""
    adapter = model.adapter(name)
    updates = {path: adapter.update(path) for path in adapter.factors}
    copies = {base_name: to_numpy(value) for owned in adapter.copies.values() for base_name, value in owned.items()}
    return base.changes(updates, copies, name)

"""The active adapters of a model, written as data of its export."""

from __future__ import annotations

import json
from pathlib import Path

from gralora_fx.adapters.checkpoint import saved_config
from gralora_fx.exporters.artifact.adapter_files import write_adapter
from gralora_fx.model.gralora_model import GraloraModel
from gralora_fx.runtime.adapter_inputs import AdapterInputs


def write_active_adapters(directory: Path, model: GraloraModel, inputs: AdapterInputs, fingerprint: str | None) -> None:
    """Write each active adapter of a model to an export.

    Args:
        directory: The export directory.
        model: The model.
        inputs: The adapter tensors that the export takes.
        fingerprint: Fingerprint of its base.

    Raises:
        ExportError: An adapter's name is not one for a file, or its values do not fit the dtype.
    """
    for name in model.active_adapters:
        adapter = model.installed(name)
        config = json.loads(saved_config(adapter, model.traced).to_json())
        updates = {path: adapter.update(path) for path in adapter.factors}
        write_adapter(directory, name, updates, config, inputs, fingerprint)

"""Adapters written as data of an export: an `.onnx_adapter` file each, and the record of what it holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gralora_fx.errors import ExportError, listed
from gralora_fx.methods.forms import as_data
from gralora_fx.methods.method import Update
from gralora_fx.runtime.adapter_arrays import cast
from gralora_fx.runtime.adapter_file import record_of, write_tensors
from gralora_fx.runtime.adapter_inputs import AdapterInputs
from gralora_fx.runtime.adapter_record import SUFFIX, check_name, record_path
from gralora_fx.runtime.names import ADAPTERS
from gralora_fx.sources.atomic_save import save_together


def write_adapter(
    directory: Path,
    name: str,
    updates: Mapping[str, Update],
    config: Mapping[str, Any],
    inputs: AdapterInputs,
    fingerprint: str | None,
) -> Path:
    """Write an adapter to an export: both files, or none after an error.

    Args:
        directory: The export directory.
        name: The adapter's name.
        updates: Its update at each layer by path; those at layers that the model does not call are left out.
        config: Its `adapter_config.json`.
        inputs: The adapter tensors that the export takes.
        fingerprint: Fingerprint of its base.

    Returns:
        The adapter file.

    Raises:
        ExportError: The name is not one for a file, the export has no such layer or other blocks, a width differs, or a
            value does not fit the dtype; every problem is named.
    """
    check_name(name)
    tensors = adapter_tensors(name, updates, inputs)
    folder = directory / ADAPTERS
    path = folder / f"{name}{SUFFIX}"
    written: dict[str, Any] = {}

    def write_file(place: Path) -> None:
        write_tensors(place, tensors)
        written["record"] = record_of(place, name, tensors, config, inputs, fingerprint)

    def write_record(place: Path) -> None:
        place.write_text(written["record"].to_json(), encoding="utf-8")

    files = {path.name: write_file, record_path(path).name: write_record}
    save_together(folder, {"": files}, ExportError)
    return path


def adapter_tensors(name: str, updates: Mapping[str, Update], inputs: AdapterInputs) -> dict[str, NDArray[Any]]:
    """An adapter's tensors by the names of an export's inputs.

    Args:
        name: The adapter's name, for messages.
        updates: Its update at each layer by path; those at layers that the model does not call are left out.
        inputs: The adapter tensors that the export takes.

    Raises:
        ExportError: The export has no such layer or other blocks, a width differs, or a value does not fit the dtype;
            every problem is named.
    """
    sites = {site.path: site for site in inputs.sites}
    problems = [f"it has no layer {path}" for path in updates if path not in sites and path not in inputs.uncalled]
    tensors: dict[str, NDArray[Any]] = {}
    for path, update in updates.items():
        if path not in sites:
            continue
        site, widths = sites[path], update.factors.features
        if widths != (site.in_features, site.out_features):
            expected = f"{site.in_features} and {site.out_features}"
            problems.append(f"{path} has widths {expected}, but the adapter's are {widths[0]} and {widths[1]}")
            continue
        try:
            values = as_data(update, inputs.k)
        except ValueError as error:
            problems.append(f"at {path} the adapter has {error}")
            continue
        arrays = [cast(value.numpy(force=True), inputs.dtype) for value in values]
        r, hybrid_r = arrays[0].shape[2] if inputs.k else 0, arrays[-2].shape[1]
        shapes = site.shapes(inputs.k, r, hybrid_r)
        problems += [
            f"{key} has shape {list(array.shape)} instead of {list(shape)}"
            for (key, shape), array in zip(shapes.items(), arrays, strict=True)
            if array.shape != shape
        ]
        if not all(np.isfinite(array.astype(np.float32)).all() for array in arrays):
            problems.append(f"at {path} the adapter has values that are not finite in {inputs.dtype}")
        tensors |= dict(zip(site.names(inputs.k), arrays, strict=True))
    if problems:
        raise ExportError(
            f"adapter {name!r} does not fit the export: {listed(problems)}; give one of this base and gralora_k, "
            "or convert it with to_lora, which gives plain LoRA"
        )
    return tensors

"""Adapters written as data of an export: an `.onnx_adapter` file each, and the record of its contents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gralora_fx.base.sources.atomic_save import save_together
from gralora_fx.base.sources.same_base import BaseComparison
from gralora_fx.core.methods.arrays import to_numpy
from gralora_fx.core.methods.forms import as_data
from gralora_fx.core.methods.method import Update
from gralora_fx.errors import ExportError, command, listed, option
from gralora_fx.format.adapter_inputs import BIAS, AdapterInputs, AdapterSite
from gralora_fx.format.adapter_paths import SUFFIX, check_name, record_path
from gralora_fx.format.export_directory import ADAPTERS
from gralora_fx.format.manifest import Manifest
from gralora_fx.run.sessions.adapter_arrays import cast
from gralora_fx.run.sessions.adapter_file import record_of, write_tensors


@dataclass(frozen=True)
class Changes:
    """The changes of an adapter at layers of an export, by the layer's path."""

    updates: Mapping[str, Update]
    biases: Mapping[str, NDArray[Any]] = field(default_factory=dict)  # `[out]` each
    scales: Mapping[str, NDArray[Any]] = field(default_factory=dict)  # each output's factor less 1, `[out]`
    # the form of the weights that `scales` were computed from: `"float32"`, `"int4"`, `"int4, int8"`
    norms_of: str | None = None


def write_adapter(
    directory: Path,
    name: str,
    changes: Changes,
    config: Mapping[str, Any],
    manifest: Manifest,
    base: BaseComparison | None = None,
) -> Path:
    """Write an adapter to an export: both files, or none after an error."""
    check_name(name)
    inputs = manifest.adapter_inputs
    assert inputs is not None
    tensors = adapter_tensors(name, changes, inputs)
    folder = directory / ADAPTERS
    path = folder / f"{name}{SUFFIX}"
    compared = None if base is None else base.to_dict()
    written: dict[str, Any] = {}

    def write_file(place: Path) -> None:
        write_tensors(place, tensors)
        record = record_of(place, name, tensors, config, inputs, manifest.base_fingerprint, compared)
        written["record"] = replace(record, norms_of=changes.norms_of)

    def write_record(place: Path) -> None:
        place.write_text(written["record"].to_json(), encoding="utf-8")

    files = {path.name: write_file, record_path(path).name: write_record}
    save_together(folder, {"": files}, ExportError)
    return path


def adapter_tensors(name: str, changes: Changes, inputs: AdapterInputs) -> dict[str, NDArray[Any]]:
    """Return an adapter's tensors by the names of an export's inputs."""
    sites = {site.path: site for site in inputs.sites}
    paths = list(dict.fromkeys([*changes.updates, *changes.biases]))
    missing = [path for path in paths if path not in sites and path not in inputs.uncalled]
    problems: dict[str, list[str]] = {"the export takes no adapter there": missing} if missing else {}
    remedies = {"give one of this base, or export a model that has an adapter there too"} if missing else set()
    tensors: dict[str, NDArray[Any]] = {}
    for path in paths:
        if path not in sites:
            continue
        try:
            arrays = _at_site(sites[path], changes, inputs)
        except ValueError as error:
            problems.setdefault(str(error), []).append(path)
            if isinstance(error, _OtherBlocksError):
                remedies.add(_remedy_for_blocks(inputs))
            if isinstance(error, _UnscaledError):
                remedies.add(f"export the model with {option(dora=True)}, or leave these layers out")
            continue
        if not all(np.isfinite(array.astype(np.float32)).all() for array in arrays.values()):
            problems.setdefault(f"the adapter has values that are not finite in {inputs.dtype}", []).append(path)
        tensors |= arrays
    if problems:
        reasons = [
            f"{len(places)} layer{'s' if len(places) > 1 else ''}: {reason}: {listed(places, 3)}"
            for reason, places in problems.items()
        ]
        raise ExportError(
            f"adapter {name!r} does not fit the export: {'; '.join(reasons)}; "
            f"{'; '.join(sorted(remedies)) or 'give one of this base'}"
        )
    return tensors


def _remedy_for_blocks(inputs: AdapterInputs) -> str:
    """Return a remedy for an adapter whose `gralora_k` is not the one fixed in an export in GraLoRA's form."""
    plain = f"convert it with {command('to_lora')}, which gives the plain LoRA that it equals"
    return f"give one of gralora_k={inputs.k}, or {plain}"


class _OtherBlocksError(ValueError):
    """An adapter has blocks of another `gralora_k`, but fits as plain LoRA."""


class _UnscaledError(ValueError):
    """An adapter scales the output of a layer at which the export has no factor."""


def _at_site(site: AdapterSite, changes: Changes, inputs: AdapterInputs) -> dict[str, NDArray[Any]]:
    """Return an adapter's tensors at a layer; parts that it does not change are zeros of rank 0."""
    arrays = {name: np.zeros(shape, np.float32) for name, shape in _shapes(site, inputs, 0, 0).items()}
    update = changes.updates.get(site.path)
    if update is not None:
        if site.form == BIAS:
            raise ValueError("the export takes a trained bias alone")
        widths = update.factors.features
        if widths != (site.in_features, site.out_features):
            raise ValueError(
                f"the export has widths {site.in_features} and {site.out_features}, the adapter {widths[0]} and "
                f"{widths[1]}"
            )
        if not update.is_low_rank:
            raise _UnscaledError("the export takes no adapter there that scales the layer's output, as DoRA does")
        try:
            values = as_data(update, site.blocks(inputs.k))
        except ValueError as error:
            raise _OtherBlocksError(str(error)) from error
        arrays |= dict(zip(arrays, (to_numpy(value) for value in values), strict=False))
    if site.path in changes.biases:
        if not site.has_bias:
            raise ValueError("the export takes no trained bias")
        arrays[site.without_scale.names(inputs.k)[-1]] = to_numpy(changes.biases[site.path])
    if site.path in changes.scales:
        scale = changes.scales[site.path]
        if not np.isfinite(scale).all():
            raise ValueError("the new weight has a row of zeros, which has no norm")
        arrays[site.names(inputs.k)[-1]] = scale
    found = {name: cast(array, inputs.dtype) for name, array in arrays.items()}
    A, _, A_general, *_ = site.parts(found)
    r, hybrid_r = 0 if A is None else A.shape[2], 0 if A_general is None else A_general.shape[1]
    for name, shape in _shapes(site, inputs, r, hybrid_r).items():
        if found[name].shape != shape:
            field = name.removeprefix(f"{site.path}.")
            raise ValueError(f"{field} has shape {list(found[name].shape)} instead of {list(shape)}")
    return found


def _shapes(site: AdapterSite, inputs: AdapterInputs, r: int, hybrid_r: int) -> dict[str, tuple[int, ...]]:
    return {name: tuple(map(int, shape)) for name, shape in site.shapes(inputs.k, r, hybrid_r).items()}

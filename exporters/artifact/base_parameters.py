"""Adapters of a model as changes of its export's weights, including their trained copies of the base's parameters."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gralora_fx.core.adapters.saved_form import saved_config
from gralora_fx.core.methods.arrays import to_numpy
from gralora_fx.core.methods.forms import as_update
from gralora_fx.core.methods.method import Update
from gralora_fx.core.model.gralora_model import GraloraModel
from gralora_fx.errors import ExportError, listed, option
from gralora_fx.exporters.artifact.exported_adapters import Changes, write_adapter
from gralora_fx.exporters.fold.replaced_parameters import named_values
from gralora_fx.exporters.fold.requantize import dequantized
from gralora_fx.exporters.fold.weight_locations import Export
from gralora_fx.exporters.rules.products.initializers import ProductWeight
from gralora_fx.exporters.rules.products.stored_rows import read_rows
from gralora_fx.format.adapter_inputs import BIAS, WHOLE, AdapterInputs
from gralora_fx.format.manifest import Manifest

_WEIGHT, _BIAS = ".weight", ".bias"


@dataclass(frozen=True)
class BaseParameters:
    """The weights and biases of an export's layers, read from its files.

    Attributes:
        directory: The export directory.
        manifest: Its manifest.
    """

    directory: Path
    manifest: Manifest

    def changes(self, updates: Mapping[str, Update], copies: Mapping[str, NDArray[Any]], name: str) -> Changes:
        """Return an adapter's changes: its updates, and its trained copies as differences from the export's values."""
        if not copies:
            return Changes(updates)
        found, biases = dict(updates), {}
        problems: list[str] = []
        uncalled = () if self.manifest.adapter_inputs is None else self.manifest.adapter_inputs.uncalled
        for parameter, trained in copies.items():
            path, _, last = parameter.rpartition(".")
            if path in uncalled:
                continue
            own = self._own(parameter)
            value = trained.T if trained.ndim == 2 and self._export.is_conv1d(path) else trained
            if isinstance(own, str):
                problems.append(own)
            elif own.shape != value.shape:
                problems.append(
                    f"{parameter} has shape {list(value.shape)}, and the export's has {list(own.shape)}: a head keeps "
                    "its number of outputs, so export a base with the adapter's"
                )
            elif last == "bias":
                biases[path] = value.astype(np.float32) - own.astype(np.float32)
            else:
                found[path] = as_update(value.astype(np.float32) - own.astype(np.float32))
        if problems:
            raise ExportError(
                f"adapter {name!r} trains parameters (modules_to_save or bias) that do not fit the export: "
                f"{listed(problems, 4)}"
            )
        return Changes(found, biases)

    def check(self) -> None:
        """Check that the export holds the values that adapters may replace."""
        inputs = self._inputs
        names = [f"{site.path}{_WEIGHT}" for site in inputs.sites if site.form == WHOLE]
        names += [f"{site.path}{_BIAS}" for site in inputs.sites if site.has_bias]
        if problems := [own for name in names if isinstance(own := self._own(name), str)]:
            raise ExportError(f"trained parameters cannot be data of this export: {listed(problems, 4)}")

    @property
    def _inputs(self) -> AdapterInputs:
        assert self.manifest.adapter_inputs is not None
        return self.manifest.adapter_inputs

    @cached_property
    def _export(self) -> Export:
        graphs = {path.name: ir.load(path).graph for path in sorted(self.directory.glob("*.onnx"))}
        return Export(graphs, self.manifest)

    def _own(self, parameter: str) -> NDArray[Any] | str:
        """Return the export's values of a parameter, or why there are none."""
        path, _, last = parameter.rpartition(".")
        site = next((site for site in self._inputs.sites if site.path == path), None)
        if site is None or (last == "weight" and site.form == BIAS) or (last == "bias" and not site.has_bias):
            return f"{parameter}: the export takes no values for it; export a model whose adapter trains it too"
        values = self._weights(path) if last == "weight" else self._biases(parameter, site.out_features)
        return next(
            values, f"{parameter}: the export's files do not hold it by itself; use {option(adapters='merged')}"
        )

    def _weights(self, path: str) -> Iterator[NDArray[Any]]:
        for entry in (self.manifest.weights or {}).get(path, ()):
            weight = self._export.by_name.get((entry.file, entry.initializer))
            if weight is not None:
                yield _values(weight, entry.start, entry.stop)

    def _biases(self, parameter: str, width: int) -> Iterator[NDArray[Any]]:
        for place in named_values(self._export, parameter):
            values = read_rows(place.value)[:, place.start : place.start + width]
            if values.shape == (1, width):
                yield values[0]


def _values(weight: ProductWeight, start: int, stop: int) -> NDArray[Any]:
    """Return output features of a weight, `[out, in]`."""
    if weight.storage != "float":
        return dequantized(weight, slice(start, stop))
    if weight.transposed:
        return read_rows(weight.value)[:, start:stop].T
    return read_rows(weight.value, start, stop)


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

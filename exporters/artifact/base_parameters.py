"""Saved adapters as changes of an export's weights, including their trained copies of the base's parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gralora_fx.base.sources.safetensors_files import StoredTensor, are_same
from gralora_fx.core.adapters.saved_embeddings import check_vocabulary
from gralora_fx.core.adapters.stored_adapter import StoredAdapter
from gralora_fx.core.methods.arrays import to_numpy
from gralora_fx.core.methods.forms import as_update, scales_rows
from gralora_fx.core.methods.lora import LoraFactors
from gralora_fx.core.methods.method import Update
from gralora_fx.errors import ExportError, listed, option
from gralora_fx.exporters.artifact.exported_adapters import Changes
from gralora_fx.exporters.fold.replaced_parameters import named_values
from gralora_fx.exporters.fold.requantize import stored_values
from gralora_fx.exporters.fold.weight_locations import Export
from gralora_fx.exporters.rules.products.initializers import ProductWeight
from gralora_fx.exporters.rules.products.stored_rows import dtype_of, read_rows, rows_and_columns
from gralora_fx.format.adapter_inputs import BIAS, WHOLE, AdapterInputs
from gralora_fx.format.manifest import Manifest
from gralora_fx.run.sessions.adapter_arrays import cast

_WEIGHT, _BIAS = ".weight", ".bias"
_Rows = tuple[Callable[[slice], NDArray[Any]], tuple[int, int], np.dtype[Any] | None]
_FLOATS = (np.float32, np.float16, ml_dtypes.bfloat16)
_ROWS = 4096  # of an embedding that are compared at once
_MOST_ROUNDED = 0.5  # share of a row by which rounding to few bits changes it at most: some 0.15 in int4


@dataclass(frozen=True)
class BaseParameters:
    """The weights and biases of an export's layers, read from its files."""

    directory: Path
    manifest: Manifest

    def changes(self, updates: Mapping[str, Update], copies: Mapping[str, NDArray[Any]], name: str) -> Changes:
        """Return an adapter's changes: its updates, and its trained copies as differences from the export's values."""
        found, biases = dict(updates), {}
        scales, norms_of = self._scale(found)
        if not copies:
            return Changes(found, {}, scales, norms_of)
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
        return Changes(found, biases, scales, norms_of)

    def with_own_embeddings(self, stored: StoredAdapter) -> StoredAdapter:
        """Return an adapter with those of its saved embeddings that the export does not hold as trained parameters."""
        adapter = stored.with_own_embeddings(partial(self._holds, stored.directory))
        own = [name for name in adapter.copies if name not in stored.copies]
        if any(isinstance(self._own(name), str) for name in own):
            raise ExportError(
                f"{stored.directory} holds values of its own for {listed(own)}, as PEFT saves them over a resized "
                "vocabulary, and the export takes none for these; export the base that the adapter was trained on, or "
                f"this adapter merged ({option(adapters='merged')})"
            )
        return adapter

    def _holds(self, adapter: Path, name: str, saved: StoredTensor) -> bool | None:
        """Return whether the export holds these values of an embedding, or their rounding; None if it lacks it."""
        rows = self._rows_of(name)
        if rows is None:  # an embedding that the model does not read
            return None
        read, shape, dtype = rows
        check_vocabulary(name, saved.shape, shape, adapter)
        values = saved.array()
        for start in range(0, len(values), _ROWS):
            wanted = values[start : start + _ROWS]
            own = read(slice(start, start + len(wanted)))
            if dtype is not None:
                if not are_same(own.astype(dtype), wanted):
                    return False
                continue
            wanted = wanted.astype(np.float32)
            if (np.linalg.norm(own - wanted, axis=1) > _MOST_ROUNDED * np.linalg.norm(wanted, axis=1)).any():
                return False
        return True

    def _rows_of(self, name: str) -> _Rows | None:
        """Return what reads rows of an embedding, its shape, and its dtype, None if quantized; None if not found."""
        for place in self._places(name.removesuffix(_WEIGHT)):
            dtype = dtype_of(place.weight.value) if place.weight.storage == "float" else None
            return place.rows, (place.stop - place.start, place.weight.in_features), dtype
        for found in named_values(self._export, name):
            if (dtype := dtype_of(found.value)) in _FLOATS:  # the integers of a tied one are the head's
                return partial(_rows, found.value), rows_and_columns(found.value), dtype
        return None

    def check(self) -> None:
        """Check that the export holds the values that adapters may replace."""
        inputs = self._inputs
        names = [f"{site.path}{_WEIGHT}" for site in inputs.sites if site.form == WHOLE]
        names += [f"{site.path}{_BIAS}" for site in inputs.sites if site.has_bias]
        if problems := [own for name in names if isinstance(own := self._own(name), str)]:
            raise ExportError(f"trained parameters cannot be data of this export: {listed(problems, 4)}")

    def _scale(self, updates: dict[str, Update]) -> tuple[dict[str, NDArray[Any]], str | None]:
        """Replace updates that scale rows by their plain LoRA; return the factors less 1 and those weights."""
        scales: dict[str, NDArray[Any]] = {}
        stored: set[str] = set()
        for path in [site.path for site in self._inputs.scaled if site.path in updates]:
            factors, scale = updates[path].factors, updates[path].scale
            if not scales_rows(factors):
                continue
            weight = next(self._places(path), None)
            if weight is None:
                raise ExportError(
                    f"{path}: the export's files do not hold its weight by itself, whose norms the adapter needs; use "
                    f"{option(adapters='merged')}"
                )
            arrays = type(factors)(**{name: to_numpy(tensor) for name, tensor in factors._asdict().items()})
            A, B, scales[path] = arrays.scaled_form(weight.rows, scale)
            updates[path] = Update(LoraFactors(A, B), 1.0)
            stored.add(weight.text)
        return scales, ", ".join(sorted(stored)) or None

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
        weights = (place.rows(slice(0, place.stop - place.start)) for place in self._places(path))
        values = weights if last == "weight" else self._biases(parameter, site.out_features)
        return next(
            values, f"{parameter}: the export's files do not hold it by itself; use {option(adapters='merged')}"
        )

    def _places(self, path: str) -> Iterator[_StoredRows]:
        for entry in (self.manifest.weights or {}).get(path, ()):
            weight = self._export.by_name.get((entry.file, entry.initializer))
            if weight is not None:
                yield _StoredRows(weight, entry.start, entry.stop)

    def _biases(self, parameter: str, width: int) -> Iterator[NDArray[Any]]:
        for place in named_values(self._export, parameter):
            values = read_rows(place.value)[:, place.start : place.start + width]
            if values.shape == (1, width):
                yield values[0]


def _rows(value: ir.Value, rows: slice) -> NDArray[Any]:
    return read_rows(value, rows.start, rows.stop)


@dataclass(frozen=True)
class _StoredRows:
    """The output features of a weight that are a layer's."""

    weight: ProductWeight
    start: int
    stop: int

    @property
    def text(self) -> str:
        """Describe how the values are stored, such as `float32` or `int4`."""
        if self.weight.storage == "float":
            return dtype_of(self.weight.value).name
        return f"int{self.weight.bits or 8}"

    def rows(self, rows: slice) -> NDArray[Any]:
        """Return some of the rows `[n, in]`, in float32."""
        start, stop = self.start + rows.start, self.start + rows.stop
        whole = self._whole
        values = read_rows(self.weight.value, start, stop) if whole is None else whole(slice(start, stop))
        return cast(values, "float32")

    @cached_property
    def _whole(self) -> Callable[[slice], NDArray[Any]] | None:
        """Rows of a weight whose tensors are read once; None for one that is read by rows."""
        if self.weight.storage != "float":
            return stored_values(self.weight).values
        if self.weight.transposed:
            matrix = read_rows(self.weight.value)
            return lambda columns: matrix[:, columns].T
        return None

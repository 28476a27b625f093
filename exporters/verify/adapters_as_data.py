"""Adapters as data of an export, compared with the model's: in sessions, in rows beside others, and folded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnxruntime import OrtValue
from torch import Tensor, nn

from gralora_fx.base.sources.lazy_tensors import computed_like, values_of
from gralora_fx.core.graph.sites import LinearSite
from gralora_fx.core.methods import AdapterTensors, Update
from gralora_fx.core.methods.fold import fold
from gralora_fx.core.methods.gralora import Factors
from gralora_fx.core.methods.lora import LoraFactors
from gralora_fx.core.model.gralora_model import GraloraModel
from gralora_fx.core.model.merging import replace_weights
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.errors import ExportError, command, listed, option
from gralora_fx.exporters.artifact.active_adapters import installed_changes
from gralora_fx.exporters.artifact.base_parameters import BaseParameters
from gralora_fx.exporters.artifact.exported_adapters import adapter_tensors
from gralora_fx.exporters.verify.quantized_references import with_parameters
from gralora_fx.format.adapter_inputs import ADAPTER_IDS, AdapterInputs, is_adapter_input
from gralora_fx.format.adapter_paths import check_name, own_adapters
from gralora_fx.run.engine.adapters import Adapters
from gralora_fx.run.sessions.adapter_arrays import as_ort_value, cast
from gralora_fx.run.sessions.adapter_file import read_record, read_tensors
from gralora_fx.run.sessions.ort_values import as_tensor, as_value, own_value
from gralora_fx.run.sessions.session_views import (
    SessionView,
    adapter_dtype,
    adapter_values,
    takes_adapters,
    with_adapter,
)

Arrays = Mapping[str, NDArray[Any]]


def session_with(session: Any, inputs: AdapterInputs, tensors: Arrays) -> Any:
    """Return a session over the export's model, or a companion's, with an adapter; unchanged if it takes none."""
    if not takes_adapters(session):
        return session
    taken = dataclasses.replace(inputs, dtype=adapter_dtype(session))  # a bfloat16 export's copy has float32
    values = {name: as_ort_value(cast(array, taken.dtype)) for name, array in tensors.items()}
    return with_adapter(session, adapter_values(values, taken, session))


def check_named(name: str, model: TracedModel | GraloraModel, inputs: AdapterInputs | None, directory: Path) -> None:
    """Check that a name in the export can belong to the model's adapter."""
    check_name(name)
    if inputs is None:
        raise ExportError(f"{directory} holds no adapters as data; leave {option(adapter_name=name)} out")
    active = model.active_adapters if isinstance(model, GraloraModel) else []
    if len(active) != 1:
        raise ExportError(
            f"{option(adapter_name=name)} is for a model with one active adapter, and this one has "
            f"{listed(active) or 'none'}; leave it out, or make one active"
        )


def tensors_of(name: str, exported: str, model: TracedModel | GraloraModel, base: BaseParameters) -> Arrays:
    """Return an active adapter's tensors as the export stores them; the adapter's name there may differ."""
    directory, manifest = base.directory, base.manifest
    inputs = manifest.adapter_inputs
    assert inputs is not None
    assert isinstance(model, GraloraModel)
    there = own_adapters(directory, ExportError)
    path = there.get(exported)
    if path is None:
        names = [option(adapter_name=one) for one in there] if len(model.active_adapters) == 1 else []
        named = f"give {' or '.join(names)} if it has that name there, " if names else ""
        raise ExportError(
            f"the model's adapter {exported!r} is not in {directory}, which has {listed(there) or 'none'}; {named}add "
            f"it with {command('export_adapter')}, or make another one active"
        )
    tensors = read_tensors(path, read_record(path), inputs, manifest.base_fingerprint, ExportError)
    changes = installed_changes(model, name, base)
    _check_equal(exported, path, tensors, adapter_tensors(name, changes, inputs))
    return tensors


def _check_equal(name: str, path: Path, tensors: Arrays, expected: Arrays) -> None:
    differing = [key for key in expected if key not in tensors or not np.array_equal(tensors[key], expected[key])]
    if differing or expected.keys() != tensors.keys():
        raise ExportError(
            f"{path} holds another adapter than the model's {name!r}: {listed(differing or ['layers'], 3)} differ; "
            f"export it again with {command('export_adapter')}"
        )


def with_folded(base: TracedModel, tensors: Mapping[str, NDArray[Any]], inputs: AdapterInputs) -> TracedModel:
    """Return a float32 model with an adapter folded into its weights."""
    sites = {site.path: site for site in base.sites}
    weights: dict[str, nn.Parameter] = {}
    biases: dict[int, nn.Parameter] = {}
    for entry in inputs.sites:
        names = [name for name in entry.names(inputs.k) if name in tensors]
        own = {name: torch.from_numpy(tensors[name].astype(np.float32)) for name in names}
        A, B, A_general, B_general, bias, scale = entry.parts(own)
        if A_general is not None and B_general is not None:
            site, general = sites[entry.path], (A_general.t(), B_general.t())
            factors: AdapterTensors = LoraFactors(*general) if A is None or B is None else Factors(A, B, *general)
            weights[entry.path] = computed_like(site.weight, partial(_folded, site, factors, scale))
        if bias is not None:
            stored = base.tree.parameters[f"{entry.path}.bias"]
            biases[id(stored)] = computed_like(stored, partial(_added, stored, bias))
    return with_parameters(replace_weights(base, weights), biases)


def _folded(site: LinearSite, factors: AdapterTensors, scale: Tensor | None) -> Tensor:
    before, is_conv1d = values_of(site.weight, site.path), site.kind == "conv1d"
    if scale is not None:
        before = before * (1 + (scale if is_conv1d else scale.unsqueeze(1)))
    return fold(before, [Update(factors, 1.0)], transposed=is_conv1d)


def _added(stored: nn.Parameter, bias: Tensor) -> Tensor:
    return values_of(stored, "a bias") + bias


class MixedRows(SessionView):
    """A session over `model_rows.onnx` of a model without a cache, presented as if all rows had one adapter.

    Each row runs beside a copy of itself with another adapter, or none, so that a wrong adapter in a row is noticed.
    """

    def __init__(self, session: Any, adapters: Adapters, name: str | None, names: Sequence[str]) -> None:
        """Stack the adapters in the session's dtypes, which may be those of a float32 copy."""
        super().__init__(session)
        stack, types = adapters.stack_of([adapters[other] for other in names]), _types(session)
        self.count = 1 + len(names)
        self.tensors = {name: as_value(as_tensor(value), types[name]) for name, value in stack.values.items()}
        self.number = stack.ids[None if name is None else adapters[name]]

    def get_inputs(self) -> list[Any]:
        """Return the inputs of the model."""
        return [value for value in self.session.get_inputs() if not is_adapter_input(value.name)]

    def ids(self, rows: int) -> NDArray[np.int64]:
        """Return adapter ids `[2 * rows]`: of every row, then of its copy, cycling through the others."""
        others = [number for number in range(self.count) if number != self.number] or [self.number]
        return np.array([number for row in range(rows) for number in (self.number, others[row % len(others)])])

    def run_with_ort_values(self, names: Sequence[str], feed: Mapping[str, Any], options: Any = None) -> list[Any]:
        """Run the rows and their copies; return the rows' outputs."""
        shapes, types = {value.name: value.shape for value in self.session.get_inputs()}, _types(self.session)
        rows, doubled = 0, {}
        for name, value in feed.items():
            if shapes[name] and shapes[name][0] == shapes[ADAPTER_IDS][0]:
                rows = value.shape()[0]
                value = as_value(as_tensor(value).repeat_interleave(2, dim=0), types[name])
            doubled[name] = value
        ids = OrtValue.ortvalue_from_numpy(self.ids(rows))
        results = self.session.run_with_ort_values(names, {**doubled, **self.tensors, ADAPTER_IDS: ids}, options)
        outputs = zip(names, results, self.session.get_outputs(), strict=True)
        return [_own_rows(name, value, rows, described.type) for name, value, described in outputs]


def _types(session: Any) -> dict[str, str]:
    return {value.name: value.type for value in session.get_inputs()}


def _own_rows(name: str, value: Any, rows: int, kind: str) -> Any:
    tensor = as_tensor(value)
    if tensor.ndim == 0 or tensor.shape[0] != 2 * rows:
        raise ExportError(
            f"the output {name} of shape {list(tensor.shape)} is not made of {2 * rows} rows, so adapters cannot be "
            f"chosen by row; export the model with {option(adapters='inputs')}"
        )
    return own_value(tensor[::2], kind)

"""Where an adapter's parameters lie in an export."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from gralora_fx.core.adapters.parameter_keys import names_parameter, parameters_in
from gralora_fx.core.adapters.stored_adapter import StoredAdapter
from gralora_fx.core.methods.method import Update
from gralora_fx.core.operators.expert_gate import NO_GATE, ExpertGate
from gralora_fx.errors import CheckpointError, MergeError, bulleted
from gralora_fx.exporters.fold.edits import StackEdit
from gralora_fx.exporters.fold.initializers import initializer_names, initializers
from gralora_fx.exporters.rules.experts.expert_rows import MOE, arranged, as_modelled, gate_noted_at

_NOT_FOUND = (
    "no initializer of floats has the name of its parameter, as in an export whose experts are quantized; export the "
    "model with the adapter merged, which quantizes afterwards (export_onnx with the adapter)"
)
_PLAIN = ExpertGate("identity", NO_GATE)


@dataclass(frozen=True)
class ExpertLocation:
    """An initializer with the matrices of a parameter's experts.

    Attributes:
        path: The parameter.
        file: The ONNX file.
        value: The initializer, `[experts, ...]`.
        shape: `[out, in]` of a matrix, as the adapter has it.
        is_transposed: Whether matrices are stored `[in, out]`.
        gate: How the rows of a matrix are arranged.
        is_up: Whether it is of the first product, whose rows are.
    """

    path: str
    file: str
    value: ir.Value
    shape: tuple[int, int]
    is_transposed: bool = False
    gate: ExpertGate = _PLAIN
    is_up: bool = False

    def edit(self, update: Callable[[], Update]) -> StackEdit:
        """An update of all experts added to the matrices."""
        assert self.value.shape is not None
        _, *stored = (int(size) for size in self.value.shape.numpy())
        options: dict[str, Any] = {"gate": self.gate, "is_up": self.is_up, "is_transposed": self.is_transposed}
        return StackEdit(
            self.path,
            update,
            self.shape,
            tuple(stored),
            as_modelled=functools.partial(as_modelled, **options),
            as_stored=functools.partial(arranged, **options),
        )


def named_by_export(graphs: Mapping[str, ir.Graph], adapter: StoredAdapter) -> StoredAdapter:
    """An adapter with the names of its parameters, as far as an export's initializers tell them by their widths."""
    names = initializer_names(graphs.values())
    shapes = {name: found for graph in graphs.values() for name in names if (found := _possible_features(graph, name))}
    order: list[str] = []
    for module, paths in parameters_in(adapter.unnamed, adapter.config).items():
        own = [n for n in shapes if n.rpartition(".")[0] == module and names_parameter(adapter.config, n)]
        if len(own) < len(paths):
            raise MergeError(f"{module}: {_NOT_FOUND}")
        for path in paths:
            features = adapter.features_of(adapter.unnamed[path])
            fitting = [name for name in own if features in shapes[name]]
            if len(fitting) != 1 or len(own) > len(paths):
                raise MergeError(
                    f"nothing says which parameter of {module} the tensors {path} of {adapter.directory} are of; load "
                    "the adapter into its model (GraloraModel.from_pretrained), save it again, and fold that"
                )
            order += fitting
    try:
        return adapter.named(order)
    except CheckpointError as error:
        raise MergeError(str(error)) from error


def find_experts(graphs: Mapping[str, ir.Graph], adapter: StoredAdapter) -> list[ExpertLocation]:
    """Where the parameters of an adapter lie; one may lie in several files."""
    found: list[ExpertLocation] = []
    problems: list[str] = []
    for path in adapter.parameters:
        try:
            of_path = [location for file, graph in graphs.items() for location in _at(graph, file, path, adapter)]
        except MergeError as error:
            problems.append(f"{path}: {error}")
        else:
            found += of_path
            if not of_path:
                problems.append(f"{path}: {_NOT_FOUND}")
    if problems:
        raise MergeError(f"{adapter.directory} cannot be folded into this export:\n{bulleted(problems)}")
    return found


def _at(graph: ir.Graph, file: str, path: str, adapter: StoredAdapter) -> Iterator[ExpertLocation]:
    """The location of a parameter in a graph, if it is there."""
    value = next((value for value in initializers(graph) if value.name == path), None)
    if value is None or value.shape is None:
        return
    site = adapter.sites[path]
    if site.stack is None or len(value.shape) != 3:
        raise MergeError("it is a single matrix that no product of the export reads; export the merged model instead")
    stored = tuple(int(size) for size in value.shape.numpy())
    matrix = site.features[1], site.features[0]
    use = next(use for use in value.uses())
    if use.node.op_type == MOE:
        gate, is_up = gate_noted_at(use.node), use.idx == _UP
        if gate is None:
            raise MergeError(f"{use.node.name} does not say how its rows are arranged; export it again")
        own = np.empty(stored[1:], np.bool_)
        if stored[0] != site.stack or as_modelled(own, gate, is_up=is_up).shape != matrix:
            raise MergeError(_unfit(stored, site.stack, matrix))
        yield ExpertLocation(path, file, value, matrix, gate=gate, is_up=is_up)
        return
    transposed = (site.stack, *matrix[::-1])
    if stored not in ((site.stack, *matrix), transposed):
        raise MergeError(_unfit(stored, site.stack, matrix))
    if matrix[0] == matrix[1]:
        raise MergeError(
            "nothing says whether its square matrices are stored [in, out]; export the merged model instead"
        )
    yield ExpertLocation(path, file, value, matrix, is_transposed=stored == transposed)


_UP = 2  # position of the first product's weights among the operator's inputs


def _possible_features(graph: ir.Graph, name: str) -> set[tuple[int, int]]:
    """What the widths in and out of the matrices of an initializer may be; none for one that is no stack."""
    value = graph.initializers.get(name)
    if value is None or value.shape is None or len(value.shape) != 3:
        return set()
    rows, columns = (int(size) for size in value.shape.numpy()[1:])
    use = next(iter(value.uses()), None)
    if use is not None and use.node.op_type == MOE and (gate := gate_noted_at(use.node)) is not None:
        return {(columns, as_modelled(np.empty((rows, 1), np.bool_), gate, is_up=use.idx == _UP).shape[0])}
    return {(columns, rows), (rows, columns)}


def _unfit(stored: tuple[int, ...], stack: int, matrix: tuple[int, int]) -> str:
    return (
        f"the export has {stored[0]} matrices of {list(stored[1:])}, and the adapter {stack} of {list(matrix)}; give "
        "an adapter of the export's base"
    )

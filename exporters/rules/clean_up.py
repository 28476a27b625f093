"""Constant folding and removal of unused nodes, by onnxscript's optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnx_ir.tensor_adapters import TorchTensor
from onnxscript import optimizer

from gralora_fx.base.progress.stages import quiet
from gralora_fx.core.graph.pipeline import PassResult, contract
from gralora_fx.exporters.rules.builder import const_ints
from gralora_fx.exporters.rules.onnx_pipeline import FOLDED_TRANSPOSES
from gralora_fx.exporters.translation.weights import LazyTensor

_SMALL = 1024  # values
_STACK_TRACE = "pkg.torch.onnx.stack_trace"


@contract(needs={FOLDED_TRANSPOSES})
@dataclass(frozen=True)
class FoldConstants:
    """Fold constants."""

    # whether constants may be folded at a node; None leaves it to the optimizer
    should_fold: Callable[[ir.Node], bool | None]

    def __call__(self, model: ir.Model) -> PassResult[ir.Model]:
        """Fold them, in place; the result counts the nodes removed."""
        before = len(model.graph)
        with quiet():  # it prints what it skips
            optimizer.fold_constants(model, should_fold=self.should_fold)
        return PassResult(before - len(model.graph))


def forget_sliced_sizes(model: ir.Model) -> PassResult[ir.Model]:
    """Forget sizes that slices of varying axes have for long inputs alone, in place: after the slice, and after these.

    Before: `Slice(x [batch, length, 16], -4) [batch, 4, 16]`
    After:  `Slice(x [batch, length, 16], -4) [batch, ?, 16]`

    ONNX Runtime would make a `Split` of slices of four, which fails for three.
    """
    assumed: dict[ir.Value, set[Any]] = {}
    for node in model.graph:
        found: set[Any] = set().union(*(assumed.get(value, ()) for value in node.inputs if value is not None))
        if node.op_type == "Slice":
            found |= _assumed_sizes(node)
        if found and node.op_type == "Concat" and node.outputs[0].shape is not None:
            found = found | {node.outputs[0].shape[node.attributes["axis"].as_int()]}
        for value in node.outputs if found else ():
            assumed[value] = found
            if value.shape is not None:
                value.shape = ir.Shape([None if size in found else size for size in value.shape])
    return PassResult(len(assumed))


def _assumed_sizes(node: ir.Node) -> set[Any]:
    """Return the sizes of a slice that it has only if its input is long enough."""
    sliced, result = node.inputs[0], node.outputs[0]
    if sliced is None or sliced.shape is None or result.shape is None:
        return set()
    always = {1} if const_ints(node.inputs[1]) in ([0], [-1]) else set()  # the first or the last position
    stops, axes = const_ints(node.inputs[2]), const_ints(node.inputs[3]) if len(node.inputs) > 3 else None
    bounded = axes if stops and axes and len(stops) == 1 and stops[0] < 2**62 else []  # "all of it", for short ones
    sizes = enumerate(zip(sliced.shape, result.shape, strict=True))
    return {
        after
        for axis, (before, after) in sizes
        if not isinstance(before, int) and (isinstance(after, int) or (axis in bounded and after == before))
    } - always


def remove_unused_nodes(model: ir.Model) -> PassResult[ir.Model]:
    """Remove nodes whose values nothing reads, in place."""
    before = len(model.graph)
    optimizer.remove_unused_nodes(model)
    return PassResult(before - len(model.graph))


def deduplicate_constants(model: ir.Model) -> PassResult[ir.Model]:
    """Store equal small constants once, in place; parameters keep an initializer each.

    Two parameters may be equal only before training: a later fold changes one of them.
    """
    count = 0
    for graph in (model.graph, *model.graph.subgraphs()):
        first: dict[tuple[ir.DataType, tuple[int, ...], bytes], ir.Value] = {}
        for name, value in list(graph.initializers.items()):
            tensor = value.const_value
            if tensor is None or tensor.size > _SMALL or value.is_graph_output() or value.is_graph_input():
                continue
            is_parameter = isinstance(tensor, (TorchTensor, LazyTensor)) and tensor.dtype.is_floating_point()
            if is_parameter or tensor.dtype == ir.DataType.STRING:
                continue
            key = tensor.dtype, tuple(int(size) for size in tensor.shape.numpy()), tensor.tobytes()
            if first.setdefault(key, value) is not value:
                ir.convenience.replace_all_uses_with(value, first[key])
                del graph.initializers[name]
                count += 1
    return PassResult(count)


def drop_stack_traces(model: ir.Model) -> PassResult[ir.Model]:
    """Remove the nodes' stack traces, in place: they hold paths of the exporting machine."""
    nodes = list(ir.traversal.RecursiveGraphIterator(model.graph))
    return PassResult(sum(node.metadata_props.pop(_STACK_TRACE, None) is not None for node in nodes))

"""Constant folding and removal of unused nodes, by onnxscript's optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.tensor_adapters import TorchTensor
from onnxscript import optimizer

from gralora_fx.base.progress.stages import quiet
from gralora_fx.core.graph.pipeline import PassResult, contract
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

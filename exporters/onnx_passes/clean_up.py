"""Constant folding and removal of unused nodes, by onnxscript's optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir
from onnxscript import optimizer

from gralora_fx.exporters.pipeline import PassResult
from gralora_fx.progress.silence import quiet

_STACK_TRACE = "pkg.torch.onnx.stack_trace"


@dataclass(frozen=True)
class FoldConstants:
    """Fold constants.

    Attributes:
        should_fold: Whether constants may be folded at a node; None leaves it to the optimizer.
    """

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


def drop_stack_traces(model: ir.Model) -> PassResult[ir.Model]:
    """Remove the nodes' stack traces, in place: they hold paths of the exporting machine."""
    nodes = list(ir.traversal.RecursiveGraphIterator(model.graph))
    return PassResult(sum(node.metadata_props.pop(_STACK_TRACE, None) is not None for node in nodes))

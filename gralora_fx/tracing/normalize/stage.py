"""The normalizing stage of a trace: which passes run over a fresh graph, in their order."""

from __future__ import annotations

import dataclasses

from torch import fx

from gralora_fx.errors import TraceError
from gralora_fx.graph.pipeline import Pass, PassLog, Pipeline
from gralora_fx.graph.surgery import copy_graph
from gralora_fx.tracing.draft import Captured
from gralora_fx.tracing.normalize.clean import (
    drop_dead_scalars,
    drop_empty_parts,
    drop_guards,
    drop_unread_calls,
    drop_unread_writes,
    padding_as_argument,
    restore_aten,
    without_empty_blocks,
)
from gralora_fx.tracing.normalize.inline import inline_subgraphs
from gralora_fx.tracing.normalize.modes import AnnotateModes, evaluate, find_rng_op, updated_buffers
from gralora_fx.tracing.normalize.regions import drop_idle_grad_regions, leave_after_errors

INLINING: tuple[Pass[fx.Graph], ...] = (
    inline_subgraphs,
    drop_idle_grad_regions,  # some of those that were inlined
    leave_after_errors,
)
CLEANING: tuple[Pass[fx.Graph], ...] = (
    *INLINING,
    drop_guards,  # those of subgraphs too
    drop_empty_parts,
    drop_dead_scalars,
    drop_unread_writes,
)


def normalize(draft: Captured) -> Captured:
    """The draft with the graph of a live module normalized and in evaluation mode, and what it does in either mode."""
    passes: tuple[Pass[fx.Graph], ...] = (
        *CLEANING,
        restore_aten,
        without_empty_blocks,
        padding_as_argument,
        *((drop_unread_calls,) if draft.sentence is not None else ()),
        AnnotateModes(in_training=False if draft.evaluates else None),  # a training trace has no argument on in both
        evaluate,
    )
    draft = run_passes(draft, passes)
    graph = draft.graph_module.graph
    return dataclasses.replace(draft, drawn=find_rng_op(graph), updated=updated_buffers(draft.graph_module))


def run_passes(draft: Captured, passes: tuple[Pass[fx.Graph], ...]) -> Captured:
    """The draft with a copy of its graph, exported or symbolic, on which passes have run.

    Args:
        draft: The draft.
        passes: What to run, `CLEANING` first.
    """
    log = PassLog()
    graph_module = normalized(draft.graph_module, passes, log)
    return dataclasses.replace(draft, graph_module=graph_module, passes=tuple(log.reports))


def normalized(graph_module: fx.GraphModule, passes: tuple[Pass[fx.Graph], ...], log: PassLog) -> fx.GraphModule:
    """A copy of an exported or symbolic graph on which passes have run, over the same parameters and buffers.

    Args:
        graph_module: The result of `ExportedProgram.module()`, or a symbolic trace; it is left unchanged.
        passes: What to run, `CLEANING` first.
        log: Receives a report for each pass.

    Returns:
        A plain `GraphModule`, without what its graph does not read.
    """
    graph = copy_graph(graph_module)
    graph.owning_module = graph_module
    graph = Pipeline("normalize", passes, error=TraceError).run(graph, log)
    result = fx.GraphModule(graph_module, graph, type(graph_module).__name__.removesuffix("Impl"))
    result.graph.lint()
    return result

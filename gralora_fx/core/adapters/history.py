"""A graph's history: the user's passes and adopted edits, run over any form of it; one tree holds what they add."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from gralora_fx.core.adapters.additions import Addition, Additions, put_additions
from gralora_fx.core.adapters.base import Base
from gralora_fx.core.adapters.graph_edit import GraphEdit
from gralora_fx.core.graph.pipeline import GraphPass
from gralora_fx.core.graph.surgery import ROOT, TABLES, copied, own_tables, set_mode_of_modules
from gralora_fx.core.graph.user_pass import label_of, run_pass
from gralora_fx.core.tracing.normalize.modes import AnnotateModes
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.errors import RewriteError

_TENSORS = ("_parameters", "_buffers")


def run_history(
    graph_module: fx.GraphModule,
    passes: Sequence[GraphPass],
    tree: nn.Module,
    known: Additions,
    *,
    form: str = "",
    elsewhere: Collection[str] = (),
) -> None:
    """Run passes over a graph module in place, and register in the tree what they add; an error adds nothing.

    What the tree has already keeps its values, as training left them, when a pass registers it again. `elsewhere` names
    adapters that act without nodes of their own.
    """
    added: dict[Addition, GraphPass] = {}
    try:
        for graph_pass in passes:
            work = graph_pass
            if isinstance(graph_pass, GraphEdit):
                work = partial(graph_pass, elsewhere=elsewhere)
            label = label_of(graph_pass)
            for addition, value in _run_apart(graph_module, work, label + form):
                there = addition.within(graph_module)
                if there is None:
                    added[addition] = known[addition] = graph_pass
                    for root in (tree, graph_module):
                        addition.put(root, value)
                    continue
                _check_again(addition, graph_pass, known.get(addition), value, there)
    except BaseException:
        for addition in added:
            del known[addition]
            addition.remove(tree)
        raise


def _check_again(addition: Addition, graph_pass: GraphPass, owner: GraphPass | None, value: Any, there: Any) -> None:
    """Check that a pass registers what it registered before."""
    label = label_of(graph_pass)
    if owner is None or owner != graph_pass:
        of = "the model" if owner is None else label_of(owner)
        raise RewriteError(f"{label} registers {addition.path}, which {of} has registered; give it a name of its own")
    if _sizes(value) != _sizes(there):
        raise RewriteError(
            f"{label} registers {addition.path} with the sizes {_sizes(value)}, and had registered {_sizes(there)}, "
            "which the model trains and keeps; let it always register the same"
        )


def _run_apart(graph_module: fx.GraphModule, graph_pass: GraphPass, label: str) -> Iterator[tuple[Addition, Any]]:
    """Run a pass over a module with containers of its own; return what it registered."""
    shared = {table: graph_module.__dict__[table] for table in TABLES}
    copies: dict[int, nn.Module] = {}  # which must live as long as their ids
    graph_module.__dict__.update(own_tables(graph_module, copies))
    try:
        run_pass(graph_module, graph_pass, label)
    finally:
        work = nn.Module()
        work.__dict__.update({table: graph_module.__dict__[table] for table in TABLES})
        graph_module.__dict__.update(shared)
    return _registered(work, graph_module, copies, "")


def _registered(
    mine: nn.Module, theirs: nn.Module, copies: dict[int, nn.Module], path: str
) -> Iterator[tuple[Addition, Any]]:
    """Yield what a module has that another does not have at the same place."""
    for table in (*_TENSORS, "_modules"):
        for name, value in mine.__dict__[table].items():
            before = theirs.__dict__[table].get(name)
            if id(value) in copies and before is not None:
                yield from _registered(value, before, copies, f"{path}.{name}".lstrip("."))
            elif value is not None and value is not before:
                yield Addition(path, table, name, name not in mine._non_persistent_buffers_set), value
    # constants that are registered nowhere
    theirs.__dict__.update(
        {k: v for k, v in mine.__dict__.items() if isinstance(v, torch.Tensor) and k not in theirs.__dict__}
    )


def _sizes(value: Any) -> Any:
    """Return the shape of a tensor, or those of a module's tensors by name."""
    if isinstance(value, nn.Module):
        return {name: list(tensor.shape) for name, tensor in value.state_dict(keep_vars=True).items()}
    return list(value.shape)


def form_with_history(
    traced: TracedModel,
    base: Base,
    passes: Sequence[GraphPass],
    form: str,
    folded: Collection[str],
    *,
    shares: bool,
) -> fx.GraphModule:
    """Return a form of the base's graph, such as a merged one, over which passes have run."""
    graph_module = copied(traced.graph_module, "TracedGraph")
    names, known = {node.name for node in graph_module.graph.nodes}, dict(base.added)
    put_additions(graph_module, base.tree, known, shares=shares)
    run_history(graph_module, passes, graph_module, known, form=form, elsewhere=folded)
    AnnotateModes(known=names)(graph_module.graph)
    set_mode_of_modules(graph_module, traced.training)
    return graph_module


@contextmanager
def take_over(base: Base, edited: fx.GraphModule, plain: fx.Graph, edit: GraphPass) -> Iterator[None]:
    """Register in the base's tree what an edit by hand added to a graph module; not if the block raises."""
    read, before = {str(node.target) for node in plain.nodes}, dict(base.added)
    put: list[Addition] = []
    try:
        for node in edited.graph.nodes:
            if node.op not in ("get_attr", "call_module") or node.target in read:
                continue
            if (addition := _added_at(str(node.target), edited, base)) is not None:
                base.added[addition] = edit
                if addition.within(base.tree) is None:
                    addition.put(base.tree, addition.within(edited))
                    put.append(addition)
        yield
    except BaseException:
        base.added = before
        for addition in put:
            addition.remove(base.tree)
        raise


def _added_at(target: str, edited: fx.GraphModule, base: Base) -> Addition | None:
    """Return what an edit by hand registered for a target that its graph reads; None if it was there before."""
    names = target.split(".")
    for count in range(1, len(names) + 1):
        path, owner, name = ".".join(names[:count]), ".".join(names[: count - 1]), names[count - 1]
        if path == ROOT or any(addition.path == path for addition in base.added):
            return None
        found = [Addition(owner, table, name) for table in (*_TENSORS, "_modules")]
        if any(addition.within(base.traced.graph_module) is not None for addition in found):
            continue
        container = edited.get_submodule(owner)
        if isinstance(value := container.__dict__.get(name), torch.Tensor):
            container._buffers[name] = value
        for addition in found:
            if addition.within(edited) is not None:
                return addition._replace(is_persistent=name not in container._non_persistent_buffers_set)
        raise RewriteError(f"the edit reads {target}, which the graph module has not registered; register it there")
    return None

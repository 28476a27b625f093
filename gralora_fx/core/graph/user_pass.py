"""Runs a user's pass over a graph module and lints it; an error lists what the pass had changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from gralora_fx.core.graph.pipeline import GraphPass, PassResult
from gralora_fx.core.graph.same_value import same_value
from gralora_fx.errors import RewriteError, first_line

_MOST_LINES = 20  # of a diff in a message


def label_of(graph_pass: GraphPass) -> str:
    """Return a pass's name for messages: a function's or a class's, or its `label`."""
    name = getattr(graph_pass, "__qualname__", None)
    return f"the graph pass {name or getattr(graph_pass, 'label', type(graph_pass).__qualname__)}"


def run_pass(graph_module: fx.GraphModule, graph_pass: GraphPass, label: str | None = None) -> None:
    """Run a pass over a graph module in place, lint the graph and recompile it."""
    label = label or label_of(graph_pass)
    before = snapshot(graph_module.graph)
    try:
        result = graph_pass(graph_module)
        graph_module.graph.lint()
        graph_module.recompile()
    except Exception as error:  # a user's pass may raise anything
        changes = _changes(before, snapshot(graph_module.graph))
        raise RewriteError(
            f"{label} failed with {type(error).__name__}: {first_line(error)}"
            + ("; it had changed:\n" + "\n".join(changes) if changes else "")
        ) from error
    returned = result.graph if isinstance(result, PassResult) else getattr(result, "graph_module", result)
    if returned is not None and returned is not graph_module:
        kind = type(returned).__name__
        raise RewriteError(f"{label} returned another {kind}; edit the given module in place")


def snapshot(graph: fx.Graph) -> dict[str, tuple[Any, ...]]:
    """Return the operation of each node, by name."""
    return {node.name: (node.op, node.target, node.args, node.kwargs) for node in graph.nodes}


def is_edited(graph: fx.Graph, before: Mapping[str, tuple[Any, ...]]) -> bool:
    """Return whether a graph has other nodes than at an earlier snapshot, recompiled or not."""
    return not same_value(list(before.items()), list(snapshot(graph).items()))


def _changes(before: Mapping[str, tuple[Any, ...]], after: Mapping[str, tuple[Any, ...]]) -> list[str]:
    """Return the removed, added and changed nodes as lines of a diff."""
    names = list(dict.fromkeys([*before, *after]))
    lines = []
    for name in names:
        old, new = before.get(name), after.get(name)
        if old != new:
            lines += [f"- {_shown(name, old)}"] if old else []
            lines += [f"+ {_shown(name, new)}"] if new else []
    more = len(lines) - _MOST_LINES
    return lines if more <= 0 else [*lines[:_MOST_LINES], f"and {more} more lines"]


def _shown(name: str, node: tuple[Any, ...]) -> str:
    op, target, args, kwargs = node
    called = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    arguments = ", ".join([*(str(arg) for arg in args), *(f"{key}={value}" for key, value in kwargs.items())])
    return f"{name} = {op} {called}({arguments})"

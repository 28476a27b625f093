"""A user's own graph pass, run so that a mistake in it is named and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from gralora_fx.errors import RewriteError, first_line

GraphPass = Callable[[fx.GraphModule], Any]


def run_pass(graph_module: fx.GraphModule, graph_pass: GraphPass) -> None:
    """Let a pass edit a graph module in place, check the graph and compile it.

    Args:
        graph_module: The module to edit; after an error it must be discarded.
        graph_pass: Takes the module and edits it; returns None, the module, or torch's `PassResult` of it.

    Raises:
        RewriteError: The pass raised an error, returned another module, or left a graph that does not lint.
    """
    name = getattr(graph_pass, "__qualname__", type(graph_pass).__qualname__)
    try:
        result = graph_pass(graph_module)
        graph_module.graph.lint()
        graph_module.recompile()
    except Exception as error:  # a user's pass raises what it likes
        raise RewriteError(f"the graph pass {name} failed with {type(error).__name__}: {first_line(error)}") from error
    returned = getattr(result, "graph_module", result)
    if returned is not None and returned is not graph_module:
        kind = type(returned).__name__
        raise RewriteError(f"the graph pass {name} returned another {kind}; edit the given module in place")

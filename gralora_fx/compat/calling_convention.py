"""A graph's calling convention for nested inputs and outputs, which `torch.fx` keeps in its code generator."""

from __future__ import annotations

from typing import Any

from torch import fx


def convention_of(graph: fx.Graph) -> Any:
    """The code generator of a graph."""
    return graph._codegen


def set_convention(graph: fx.Graph, convention: Any) -> None:
    """Set a graph's code generator without resetting its body transformer, as `set_codegen` would."""
    graph._codegen = convention


def tree_info(graph: fx.Graph) -> Any:
    """Names and specs of the nested inputs and outputs (`_PyTreeInfo`), or None for a graph that has none."""
    return getattr(graph._codegen, "pytree_info", None)


def code_transformer(graph: fx.Graph) -> Any:
    """The function that edits the lines of a graph's code (`on_generate_code`), or None."""
    return graph._codegen._body_transformer

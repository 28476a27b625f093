"""torch modules over the embeddings of a graph, for callers that read their sizes or weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from torch import nn

from gralora_fx.errors import TraceError
from gralora_fx.graph.module_tree import ModuleTree


class _NotCalled(nn.Module):
    """A module over parameters of a graph, which the graph does not call."""

    def register_forward_hook(self, *_: Any, **__: Any) -> NoReturn:
        """Not supported: a hook would never run.

        Raises:
            TraceError: Always.
        """
        raise TraceError(
            "the graph does not call this module, so a hook on it would never run (NEFTune needs one, for example); "
            "edit the graph with add_pass instead"
        )

    register_forward_pre_hook = register_full_backward_hook = register_full_backward_pre_hook = register_forward_hook


class EmbeddingTable(_NotCalled, nn.Embedding):
    """An embedding over the parameter that a graph reads."""


class OutputHead(_NotCalled, nn.Linear):
    """A linear layer over the parameters that a graph reads."""


def module_at(tree: ModuleTree, path: str, parameters: Mapping[str, nn.Parameter]) -> nn.Module:
    """A module over the parameters at a path, which are those that the graph reads.

    Args:
        tree: The modules of the source model.
        path: Path of an embedding or of a linear layer.
        parameters: The parameters that the graph reads, by the names of the source model.

    Raises:
        TraceError: The module is of another class, which may compute something else.
    """
    kind = tree.types[path]
    weight, bias = parameters.get(f"{path}.weight"), parameters.get(f"{path}.bias")
    if kind == "torch.nn.modules.sparse.Embedding" and weight is not None:
        module: nn.Module = EmbeddingTable(weight.shape[0], weight.shape[1], device="meta")
    elif kind == "torch.nn.modules.linear.Linear" and weight is not None:
        module = OutputHead(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    else:
        raise TraceError(
            f"{path} is a {kind.rpartition('.')[2]}, which computes more than a plain table or layer; its parameters "
            f"are those of traced.tree.parameters that begin with '{path}.'"
        )
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            module.register_parameter(name, parameter)
    return module

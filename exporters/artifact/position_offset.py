"""Offset of the first position in a table of position embeddings."""

from __future__ import annotations

import torch

from gralora_fx.engine.limits import context_length
from gralora_fx.tracing.traced_model import TracedModel


def position_offset(traced: TracedModel) -> int:
    """Number of unused rows at the start of the position table: RoBERTa counts from its padding index + 1.

    Args:
        traced: A traced model.
    """
    limit = context_length(traced.config.to_dict()) if traced.config is not None else None
    parameters = dict(traced.graph_module.named_parameters(remove_duplicate=False))
    for node in traced.graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default):
        table = node.args[0]
        name = str(table.target) if isinstance(table, torch.fx.Node) and table.op == "get_attr" else ""
        padding = node.args[2] if len(node.args) > 2 else node.kwargs.get("padding_idx", -1)
        if "position" in name and name in parameters and parameters[name].shape[0] == limit and padding >= 0:
            return int(padding) + 1
    return 0

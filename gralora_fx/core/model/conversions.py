"""The dtype and the device of a rewritten model, which its graph names: conversions that it does not follow."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.errors import RewriteError


def check_conversion(convert: Callable[[torch.Tensor], torch.Tensor], traced: TracedModel) -> None:
    """Check that a graph computes with the tensors that its parameters are converted to."""
    kinds = {(p.dtype, p.device) for p in traced.tree.parameters.values() if p.is_floating_point()}
    for dtype, device in kinds:
        converted = convert(torch.empty(0, dtype=dtype, device=device))
        if converted.dtype != dtype:
            raise RewriteError(
                f"the graph was traced in {_short(dtype)} and computes in it, so that it cannot be converted to "
                f"{_short(converted.dtype)}; convert the model that you trace, as in "
                f"trace(model.to({converted.dtype})), and load the adapter again"
            )
        if converted.device != device and not converted.is_meta and (own := _devices(traced.graph_module.graph)):
            raise RewriteError(
                f"the graph makes tensors on {', '.join(sorted(own))}, where it was traced, so that it cannot be "
                f"moved to {converted.device}; move the model that you trace, as in "
                f"trace(model.to({str(converted.device)!r}))"
            )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _devices(graph: fx.Graph) -> set[str]:
    """The devices that the nodes of a graph name."""
    return {
        str(value)
        for node in graph.nodes
        for value in (*node.args, *node.kwargs.values())
        if isinstance(value, torch.device)
    }

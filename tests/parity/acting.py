"""Every adapter has an effect: outputs of each adapted layer, with its adapter and without."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from gralora_fx import GraloraModel
from gralora_fx.base.compat.torch_graphs import tree_leaves
from gralora_fx.core.graph.surgery import annotation_of


class _Recorder(fx.Interpreter):
    """Runs a rewritten graph and keeps what each call of a layer gave, and what its last adapter node made of it."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.before: dict[str, Tensor] = {}
        self.after: dict[str, Tensor] = {}
        self._calls = {
            annotation["call"]
            for node in graph_module.graph.nodes
            if "call" in (annotation := annotation_of(node) or {})
        }

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self._calls:
            self.before[n.name] = value.clone()
        call = (annotation_of(n) or {}).get("call")
        if call is not None:
            self.after[call] = value
        return value


def idle_sites(model: GraloraModel, inputs: dict[str, Tensor]) -> list[str]:
    """Paths of the adapted sites whose output is the base layer's at one of their calls, or that have no call.

    Args:
        model: A rewritten model whose adapter is not zero.
        inputs: Inputs by name.
    """
    recorder = _Recorder(model.graph_module)
    with torch.no_grad():
        recorder.run(*tree_leaves(model.traced.bind((), inputs)))
    return [
        planned.site.path
        for planned in model.adapted_sites()
        if not planned.site.calls
        or any(torch.equal(recorder.before[name], recorder.after[name]) for name in planned.site.calls)
    ]

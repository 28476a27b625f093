"""Weights rounded in the order in which a model reads them (GPTQ, arXiv:2210.17323).

Each is rounded for the inputs that the rounded weights before it give, so that it makes up for their errors too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from gralora_fx.base.compat.torch_graphs import tree_leaves
from gralora_fx.base.progress.stages import counted
from gralora_fx.core.graph.linear_calls import LinearCall, calls_at
from gralora_fx.core.graph.sites import LinearSite
from gralora_fx.core.tracing.normalize.regions import LEAVE
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.exporters.quantize.block_search import BlockArrays, InputProducts
from gralora_fx.exporters.quantize.formats import Blocks
from gralora_fx.exporters.quantize.quantized_arrays import dequantize_blocks, quantize_blocks

WINDOW = 2048  # neighbouring inputs whose errors make up for each other: memory grows with its square

_SILENT = 1e-20  # mean square of inputs that are all but zero


@dataclass
class Moments:
    """Sums over positions of products of neighbouring inputs, of those within a window, for layers that read the same.

    Attributes:
        windows: `[windows, width, width]`, those of inputs beyond the last being zero.
        reads: Positions that were read.
        read: The nodes whose values were.
    """

    windows: Tensor
    reads: int = 0
    read: set[fx.Node] = field(default_factory=set)

    @classmethod
    def of(cls, inputs: int, block_size: int) -> Moments:
        """Those of no position yet; windows are whole blocks."""
        width = min(-(-inputs // block_size) * block_size, max(WINDOW, block_size))
        return cls(torch.zeros(-(-inputs // width), width, width))

    def add(self, rows: Tensor) -> None:
        """Add positions `[positions, in]`."""
        count, size, _ = self.windows.shape
        self.reads += len(rows)
        padded = torch.nn.functional.pad(rows, (0, count * size - rows.shape[1]))
        parts = padded.reshape(len(rows), count, size).transpose(0, 1)  # [windows, positions, size]
        self.windows.baddbmm_(parts.transpose(1, 2), parts)

    @cached_property
    def products(self) -> InputProducts | None:
        """Their means, once all positions were added; None where no input was read but zeros."""
        means = self.windows / max(1, self.reads)
        return InputProducts(means) if float(means.diagonal(dim1=1, dim2=2).mean()) > _SILENT else None


@dataclass
class _Layer:
    """A layer whose weight is to be rounded."""

    site: LinearSite
    name: str
    form: Blocks
    moments: Moments
    calls: list[LinearCall]

    def round(self) -> tuple[BlockArrays, Tensor]:
        """The blocks of its weight, and the weight that they stand for."""
        weight = self.site.weight.detach().float()
        is_transposed = self.site.kind == "conv1d"
        matrix = np.ascontiguousarray((weight if is_transposed else weight.t()).numpy())  # [in, out]
        blocks = quantize_blocks(matrix, self.form, self.moments.products, self.name)
        values = torch.from_numpy(dequantize_blocks(blocks, self.form.bits, len(matrix)))
        return blocks, values.t().contiguous() if is_transposed else values


@torch.no_grad()
def round_in_order(
    model: TracedModel, cases: Sequence[Mapping[str, Any]], forms: Mapping[str, tuple[str, Blocks]]
) -> dict[str, BlockArrays]:
    """Round the weights of layers.

    Each is rounded where its layer is called last, for the inputs of all its calls.
    """
    layers, rounded = _layers(model, forms), dict[str, BlockArrays]()
    runs = [_run(model, case) for case in cases]
    for node in counted(list(model.graph_module.graph.nodes), "rounding", "operations"):
        for layer, call in layers.pop(node, ()):
            if call.input not in layer.moments.read:
                layer.moments.read.add(call.input)
                for run in runs:
                    rows = run.env[call.input]
                    layer.moments.add(rows.reshape(-1, rows.shape[-1]))
            layer.calls.remove(call)
            if not layer.calls:
                rounded[layer.site.path], values = layer.round()
                for run in runs:
                    run.env[call.weight] = values
        if not layers:
            break
        if node.target in LEAVE or node.target in LEAVE.values():  # no gradients are computed, and no casts exported
            continue
        for run in runs:
            if node not in run.env:
                run.env[node] = run.run_node(node)
            for unread in run.user_to_last_uses.get(node, ()):
                run.env.pop(unread, None)
    return rounded


def _layers(
    model: TracedModel, forms: Mapping[str, tuple[str, Blocks]]
) -> dict[fx.Node, list[tuple[_Layer, LinearCall]]]:
    """The layers to round and their calls, by the nodes of these; not those in branches or of parts of a weight."""
    nodes = {node.name: node for node in model.graph_module.graph.nodes}
    found: dict[fx.Node, list[tuple[_Layer, LinearCall]]] = {}
    shared: dict[Any, Moments] = {}
    for site in model.sites:
        calls = [call for name in site.calls for call in calls_at(nodes[name], site.path)]
        calls = [call for call in calls if call.operand is None and call.rows is None and call.weight.op == "get_attr"]
        if site.path in forms and calls:
            name, form = forms[site.path]
            inputs = tuple(call.input for call in calls)
            fresh = Moments.of(site.in_features, form.block_size)
            layer = _Layer(site, name, form, shared.setdefault((inputs, fresh.windows.shape), fresh), calls)
            for call in calls:
                found.setdefault(call.node, []).append((layer, call))
    return found


def _run(model: TracedModel, case: Mapping[str, Any]) -> fx.Interpreter:
    """An interpreter that has a model's inputs."""
    run = fx.Interpreter(model.graph_module)
    inputs = [node for node in model.graph_module.graph.nodes if node.op == "placeholder"]
    run.env = dict(zip(inputs, tree_leaves(model.bind((), case)), strict=True))
    return run

"""Rounding of a model's weights in the order in which it runs, each for the inputs that rounded layers give it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from gralora_fx.base.compat.torch_graphs import tree_leaves
from gralora_fx.base.progress.stages import counted
from gralora_fx.base.sources.lazy_tensors import values_of
from gralora_fx.core.graph.linear_calls import LinearCall, calls_at, is_unpacked
from gralora_fx.core.graph.sites import LinearSite
from gralora_fx.core.tracing.normalize.regions import LEAVE
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.exporters.formats import Blocks
from gralora_fx.exporters.quantize.bfloat16_products import Bfloat16Product, narrow_products
from gralora_fx.exporters.quantize.block_arrays import BlockArrays, dequantize_blocks
from gralora_fx.exporters.quantize.block_search import InputProducts
from gralora_fx.exporters.quantize.kept_work import KeptBlocks, KeptWork, arrays_of, blocks_of, memory_for
from gralora_fx.exporters.quantize.quantized_arrays import quantize_blocks

WINDOW = 2048  # neighbouring inputs with joint error compensation: memory grows with its square
_PARTS = 4  # of a window's products that are computed at once: with more, fewer are computed twice, in smaller products
_SILENT = 1e-20  # mean square of inputs that are practically zero


@dataclass
class Moments:
    """Sums over positions of products of inputs within a window, for layers that read the same.

    Their memory is allocated on first use: that of all layers at once is as large as the model.
    """

    shape: tuple[int, int, int]  # `[windows, width, width]`
    reads: int = 0  # number of positions
    read: set[fx.Node] = field(default_factory=set)  # the nodes whose values were added

    @classmethod
    def of(cls, inputs: int, block_size: int) -> Moments:
        """Return zero sums; windows are whole blocks."""
        width = min(-(-inputs // block_size) * block_size, max(WINDOW, block_size))
        return cls((-(-inputs // width), width, width))

    @cached_property
    def windows(self) -> Tensor:
        """The sums, of this shape; products with inputs beyond the last are zero."""
        return torch.zeros(self.shape)

    def add(self, rows: Tensor) -> None:
        """Add positions `[positions, in]`."""
        count, size, _ = self.shape
        self.reads += len(rows)
        padded = torch.nn.functional.pad(rows, (0, count * size - rows.shape[1]))
        parts = padded.reshape(len(rows), count, size).transpose(0, 1)  # [windows, positions, size]
        step = -(-size // _PARTS)
        for first in range(0, size, step):  # rows of the lower triangle: products are symmetric
            last = min(first + step, size)
            before = parts[..., :last]
            self.windows[:, first:last, :last].baddbmm_(before[..., first:].mT, before)

    @cached_property
    def products(self) -> InputProducts | None:
        """Their means, once all positions were added; None if all inputs were zero."""
        means = self.windows.div_(max(1, self.reads))  # in place: nothing is added any more
        for window in means:
            window.copy_(window.tril().add_(window.tril(-1).mT))
        return InputProducts(means) if float(means.diagonal(dim1=1, dim2=2).mean()) > _SILENT else None


@dataclass
class _Layer:
    """A layer with a weight to round."""

    site: LinearSite
    name: str
    form: Blocks
    moments: Moments
    calls: list[LinearCall]
    work: KeptWork

    @property
    def result(self) -> str:
        """Name of its kept blocks."""
        return f"the rounded weight of {self.site.path}"

    @cached_property
    def known(self) -> BlockArrays | None:
        """Its blocks, if an earlier run kept them."""
        arrays = self.work.read(self.result)
        return None if arrays is None else blocks_of(arrays)

    def round(self) -> BlockArrays:
        """Return the blocks of its weight, and keep them."""
        if self.known is not None:
            return self.known
        weight = values_of(self.site.weight, self.name).float()
        matrix = (weight if self.site.kind == "conv1d" else weight.t()).numpy()  # [in, out], a view
        blocks = quantize_blocks(matrix, self.form, self.moments.products, self.name)
        self.work.keep(self.result, arrays_of(blocks))
        return blocks

    def values(self, blocks: BlockArrays) -> Tensor:
        """Return the dequantized weight."""
        values = torch.from_numpy(dequantize_blocks(blocks, self.form.bits, self.site.in_features))
        return values.t().contiguous() if self.site.kind == "conv1d" else values


@torch.no_grad()
def round_in_order(
    model: TracedModel,
    cases: Sequence[Mapping[str, Any]],
    forms: Mapping[str, tuple[str, Blocks]],
    work: KeptWork | None = None,
) -> KeptBlocks:
    """Round each layer's weights at its last call, for the inputs of all its calls; reuse what an earlier run kept."""
    work = work or KeptWork()
    layers, results = _layers(model, forms, work), dict[str, str]()
    runs = [_run(model, case) for case in cases]
    narrow = narrow_products(model)
    unread = _read_when_rounded(layers)
    for node in counted(list(model.graph_module.graph.nodes), "rounding", "operations"):
        for layer, call in layers.pop(node, ()):
            if layer.known is None and call.input not in layer.moments.read:
                layer.moments.read.add(call.input)
                for run in runs:
                    rows = run.env[call.input]
                    layer.moments.add(rows.reshape(-1, rows.shape[-1]))
            layer.calls.remove(call)
            if not layer.calls:
                with memory_for(f"round {layer.site.path}"):
                    blocks = layer.round()
                results[layer.site.path] = layer.result
                values = layer.values(blocks) if layers else None  # nothing reads the last one
                for run in runs:
                    run.env[call.weight] = values
        if not layers:
            break
        is_left = node.target in LEAVE or node.target in LEAVE.values()  # gradients are off, and casts not exported
        if not is_left and node not in unread:
            _run_node(node, runs, narrow.get(node))
    return KeptBlocks(work, results)


def _run_node(node: fx.Node, runs: Sequence[fx.Interpreter], product: Bfloat16Product | None = None) -> None:
    """Run a node in all runs, once if it has no inputs, and forget what nothing reads any more.

    A product in bfloat16 is run in the place of the node's own.
    """
    for run in runs:
        if node not in run.env:
            if product is not None:
                run.env[node] = product.multiplied(*run.fetch_args_kwargs_from_env(node)[0])
            elif not node.all_input_nodes and node in runs[0].env:
                run.env[node] = runs[0].env[node]
            else:
                run.env[node] = run.run_node(node)
    for run in runs:
        for done in run.user_to_last_uses.get(node, ()):
            run.env.pop(done, None)


def _read_when_rounded(layers: Mapping[fx.Node, Sequence[tuple[_Layer, LinearCall]]]) -> set[fx.Node]:
    """Return the nodes of weights that nothing reads before they are rounded."""
    calls = [call for found in layers.values() for layer, call in found if len(layer.calls) == 1]
    return {call.weight for call in calls if list(call.weight.users) == [call.node]}


def _layers(
    model: TracedModel, forms: Mapping[str, tuple[str, Blocks]], work: KeptWork
) -> dict[fx.Node, list[tuple[_Layer, LinearCall]]]:
    """Return the layers to round and their calls, by node; not those in branches or of parts of a weight."""
    nodes = {node.name: node for node in model.graph_module.graph.nodes}
    found: dict[fx.Node, list[tuple[_Layer, LinearCall]]] = {}
    shared: dict[Any, Moments] = {}
    for site in model.sites:
        calls = [call for name in site.calls for call in calls_at(nodes[name], site.path)]
        whole = [call for call in calls if call.operand is None and call.rows is None]
        calls = [call for call in whole if call.weight.op == "get_attr" or is_unpacked(call.weight)]
        if site.path in forms and calls:
            name, form = forms[site.path]
            inputs = tuple(call.input for call in calls)
            fresh = Moments.of(site.in_features, form.block_size)
            layer = _Layer(site, name, form, shared.setdefault((inputs, fresh.shape), fresh), calls, work)
            for call in calls:
                found.setdefault(call.node, []).append((layer, call))
    return found


def _run(model: TracedModel, case: Mapping[str, Any]) -> fx.Interpreter:
    """Return an interpreter with a model's inputs set."""
    run = fx.Interpreter(model.graph_module)
    inputs = [node for node in model.graph_module.graph.nodes if node.op == "placeholder"]
    run.env = dict(zip(inputs, tree_leaves(model.bind((), case)), strict=True))
    return run

"""Cost to the model's outputs of rounding the rows that a layer reads, compared with rounding its weight.

A row has one step for all channels, which differ by a hundred times in some models. Factors equalise them first (see
`input_factors`), as far as minimises the cost. Where rounded rows still cost most, a layer gets activations of 16 bits,
whose error is negligible.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from gralora_fx.base.progress.stages import counted
from gralora_fx.base.sources.lazy_tensors import values_of
from gralora_fx.core.graph.linear_calls import calls_at
from gralora_fx.core.graph.sites import LinearSite
from gralora_fx.core.graph.surgery import copy_graph
from gralora_fx.core.tracing.inputs.input_trees import CacheLayout
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.exporters.formats import Columns
from gralora_fx.exporters.quantize.block_arrays import dequantize_columns
from gralora_fx.exporters.quantize.plan import QuantizationPlan, weight_names
from gralora_fx.exporters.quantize.quantized_arrays import (
    ROW_LARGEST,
    ROW_TINY,
    ColumnInputs,
    input_factors,
    quantize_columns,
)
from gralora_fx.exporters.quantize.sensitivity import Sensitivities

_EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of factors, tried in this order
_MORE = 5.0  # minimum saving of 16 bits per value, relative to the mean of the least costs of rounding
_PIECE = 64  # tokens read at once; a decoder's head multiplies one of them
_SAMPLE, _FEWEST, _KEPT = 1024, 256, 2**20  # sampled rows: maximum, minimum; and values between
_TRIED, _OUTPUTS = 256, 256  # sampled rows and output features for measuring errors
_AT_ONCE = 64  # rows taken from a run
_DIRECTIONS, _DAMPING = 128, 0.01  # number of principal directions; damping relative to the mean


@dataclass(eq=False)
class ReadRows:
    """Collects the rows read by layers that share an input."""

    squares: Tensor  # sums of squares of the channels, `[in]`
    count: int = 0  # number of rows
    sample: list[Tensor] = field(default_factory=list)  # some of them, `[n, in]` each
    is_vector: bool = False  # whether one was read without an axis of rows
    _generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    __name__ = "read_rows"

    def __call__(self, value: Tensor) -> None:
        """Record a layer's input."""
        rows = value.detach().reshape(-1, value.shape[-1]).float()
        self.is_vector = self.is_vector or value.ndim < 2
        self.squares += rows.square().sum(0)
        self.count += len(rows)
        if sum(map(len, self.sample)) < min(_SAMPLE, max(_FEWEST, _KEPT // rows.shape[1])):
            self.sample.append(rows[torch.randperm(len(rows), generator=self._generator)[:_AT_ONCE]])

    @property
    def mean_squares(self) -> NDArray[np.float32]:
        """Mean squares of the channels, `[in]`."""
        return (self.squares / max(1, self.count)).numpy()

    def inputs(self, factors: NDArray[np.float32] | None) -> ColumnInputs:
        """Return the statistics of inputs needed to round a matrix."""
        rows = torch.cat(self.sample).double()
        _, _, vectors = torch.linalg.svd(rows, full_matrices=False)
        own = vectors[:_DIRECTIONS].t()
        directions = own * (rows @ own).square().mean(0).sqrt()
        squares = rows.square().mean(0)
        rest = squares - directions.square().sum(1) + _DAMPING * squares.mean().clamp(min=ROW_TINY)
        return ColumnInputs(factors, directions.float().numpy(), rest.float().numpy())


@dataclass(frozen=True)
class _Input:
    """An input shared by layers, and the cost of rounding it."""

    names: list[str]  # names of the layers' weights
    values: int  # number of values of these weights
    multiplied: float  # number of them that a token is multiplied by
    is_vector: bool  # whether it is read without an axis of rows
    factors: Sequence[NDArray[np.float32]]  # factors that were tried
    errors: NDArray[np.float64]  # cost of rounded rows and of rounded weights with each, `[factors, 2]`

    @property
    def best(self) -> int:
        """Index of the factors of least total cost."""
        return int(self.errors.sum(1).argmin())

    @property
    def finest(self) -> int:
        """Index of the factors of least cost from weights alone, for rows of 16 bits."""
        return int(self.errors[:, 1].argmin())

    @property
    def saved(self) -> float:
        """Cost saved by 16 bits."""
        return float(self.errors[self.best].sum() - self.errors[self.finest, 1])


def plan_rows(
    plan: QuantizationPlan, traced: TracedModel, cases: Sequence[Mapping[str, Any]], measured: Sensitivities | None
) -> QuantizationPlan:
    """Return the plan with input factors of each matrix, and 16 bits where 8 cost most per multiplication.

    Layers that read the same tensor share its rounding, and so its format.
    """
    groups = [(sites, read) for sites, read in _run(traced, cases) if read.count]
    if not all(bool(read.squares.isfinite().all()) for _, read in groups):
        raise RuntimeError("its values are not finite")
    if measured is None or not all(measured.has_gradients(site.path) for sites, _ in groups for site in sites):
        measured = None
    inputs, head = [], _head(traced)
    for sites, read in counted(groups, "choosing bits", "inputs of layers"):
        tried = [input_factors(read.mean_squares, exponent) for exponent in _EXPONENTS]
        errors = np.sum([_errors(site, read, tried, measured) for site in sites], axis=0)
        names = [name for site in sites for name in weight_names(traced, site)]
        values = sum(site.weight.numel() for site in sites)
        multiplied = values / (_PIECE if head in [site.path for site in sites] else 1)
        inputs.append(_Input(names, values, multiplied, read.is_vector, tried, errors))
    by_matrix, gains, known = dict(plan.by_matrix), dict(plan.gains), dict[str, ColumnInputs]()
    least = sum(float(one.errors[one.finest, 1]) for one in inputs) / max(1, sum(one.values for one in inputs))
    for one, (_, read) in zip(inputs, groups, strict=True):
        best = one.best
        if one.saved > _MORE * least * one.multiplied and not one.is_vector:  # both parts are joined along the rows
            by_matrix |= dict.fromkeys(one.names, Columns(16))
            gains |= dict.fromkeys(one.names, one.saved)
            best = one.finest
        known |= dict.fromkeys(one.names, read.inputs(one.factors[best] if _EXPONENTS[best] else None))
    return dataclasses.replace(plan, by_matrix=by_matrix, gains=gains, inputs=known)


def _head(traced: TracedModel) -> str | None:
    """Return a decoder's last layer, computed only for a prompt's last token; None for other models."""
    if traced.cache_layout is not CacheLayout.DECODER:
        return None
    order = {node.name: index for index, node in enumerate(traced.graph_module.graph.nodes)}
    called = [(order[name], site.path) for site in traced.sites for name in site.calls]
    return max(called)[1] if called else None


def _run(traced: TracedModel, cases: Sequence[Mapping[str, Any]]) -> list[tuple[list[LinearSite], ReadRows]]:
    """Return the layers that read each tensor, and the rows read."""
    root = fx.GraphModule(traced.graph_module, copy_graph(traced.graph_module), "ReadGraph")
    nodes = {node.name: node for node in root.graph.nodes}
    groups: dict[fx.Node, tuple[list[LinearSite], ReadRows]] = {}
    for site in {id(site.weight): site for site in traced.sites if site.calls}.values():
        for call in (call for name in site.calls for call in calls_at(nodes[name], site.path)):
            if call.operand is None and call.rows is None and isinstance(call.input, fx.Node):
                sites, _ = groups.setdefault(call.input, ([], ReadRows(torch.zeros(site.in_features))))
                sites += [] if any(site is other for other in sites) else [site]
    for node, (_, read) in groups.items():
        with node.graph.inserting_before(next(iter(node.users))):
            node.graph.call_function(read, (node,))
    root.recompile()
    model = dataclasses.replace(traced, graph_module=root)
    with torch.no_grad():
        for case in counted(cases, "reading the layers' inputs", "inputs"):
            model(**case)
    return list(groups.values())


def _errors(
    site: LinearSite, read: ReadRows, tried: Sequence[NDArray[np.float32]], measured: Sensitivities | None
) -> NDArray[np.float64]:
    """Return the cost of rounding a layer's rows and its weights with each of some factors, `[factors, 2]`."""
    every = max(1, site.out_features // _OUTPUTS)
    weight = values_of(site.weight, site.path).float()
    matrix = np.ascontiguousarray((weight if site.kind == "conv1d" else weight.t())[:, ::every].numpy())
    sample = torch.cat(read.sample)
    rows = sample[:: max(1, len(sample) // _TRIED)].numpy()
    if measured is None:
        costs = np.full(matrix.shape[1], 1 / max(float(np.square(rows @ matrix).mean(0).sum()), 1e-30))
    else:
        outputs = measured.layers[site.path].outputs
        share = float(outputs.sum()) / max(float(outputs[::every].sum()), 1e-30)
        costs = outputs[::every].double().numpy() * (share / 2 / measured.positions)
    errors = []
    for factors in tried:
        rounded = dequantize_columns(*quantize_columns(matrix, f"{site.path}.weight", factors), factors)
        scaled = rows * factors
        step = np.maximum(np.abs(scaled).max(1, keepdims=True), ROW_TINY) / ROW_LARGEST
        change = ((scaled / step).round() * step - scaled) / factors
        products = change @ matrix, rows @ (rounded - matrix)
        errors.append([float(np.square(product).mean(0, dtype=np.float64) @ costs) for product in products])
    return np.array(errors)

"""What rounding the rows that a layer reads costs its output, beside what rounding its weight costs.

Channels of a row differ, by a hundred times in some models, and a row has one step for all. Factors bring them nearer
to each other first (see `input_factors`), as near as costs the layer's output least. Where the error of the rounded
rows is several times that of the rounded weight all the same, a layer gets activations of 16 bits, whose error is
negligible.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from gralora_fx.exporters.quantization.column_arrays import (
    ROW_LARGEST,
    ROW_TINY,
    dequantize_columns,
    input_factors,
    quantize_columns,
)
from gralora_fx.exporters.quantization.formats import Columns
from gralora_fx.exporters.quantization.plan import QuantizationPlan, weight_names
from gralora_fx.graph.linear_calls import calls_at
from gralora_fx.graph.sites import LinearSite
from gralora_fx.graph.surgery import copy_graph
from gralora_fx.tracing.traced_model import TracedModel

_EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of factors, tried in this order
_MOST = 3.0  # times the weights' squared error that the rounded rows' may be, in 8 bits
_SAMPLE, _OUTPUTS = 256, 256  # rows, and output features, that stand for all
_AT_ONCE = 32  # rows that are taken of a run


@dataclass(eq=False)
class ReadRows:
    """What the layers that share an input read.

    Attributes:
        squares: Sums of squares of the channels, `[in]`.
        count: Rows that were read.
        sample: Some of them, `[n, in]` each.
        is_vector: Whether one of them was read by itself, without an axis of rows.
    """

    squares: Tensor
    count: int = 0
    sample: list[Tensor] = field(default_factory=list)
    is_vector: bool = False
    __name__ = "read_rows"

    def __call__(self, value: Tensor) -> None:
        """Note a layer's input."""
        rows = value.detach().reshape(-1, value.shape[-1]).float()
        self.is_vector = self.is_vector or value.ndim < 2
        self.squares += rows.square().sum(0)
        self.count += len(rows)
        if sum(map(len, self.sample)) < _SAMPLE:
            self.sample.append(rows[:: max(1, len(rows) // _AT_ONCE)].clone())

    @property
    def mean_squares(self) -> NDArray[np.float32]:
        """Mean squares of the channels, `[in]`."""
        return (self.squares / max(1, self.count)).numpy()


def plan_rows(
    plan: QuantizationPlan, traced: TracedModel, cases: Iterable[Mapping[str, Any]], inputs: str
) -> QuantizationPlan:
    """A plan with factors of what each matrix is multiplied by, and 16 bits where 8 lose most.

    Layers that read one tensor have one format, as they share its rounding.

    Args:
        plan: The plan, of `Columns` by default.
        traced: The float32 model in evaluation mode, its weights in memory.
        cases: Inputs that it is run on.
        inputs: What they are, in words.

    Raises:
        RuntimeError: The model cannot be run, or its values are not finite.
    """
    groups = _run(traced, cases)
    if not all(bool(read.squares.isfinite().all()) for _, read in groups):
        raise RuntimeError("its values are not finite")
    by_matrix, gains, factors = dict(plan.by_matrix), dict(plan.gains), dict(plan.factors)
    for sites, read in groups:
        if not read.count:
            continue
        names = [name for site in sites for name in weight_names(traced, site)]
        tried = [input_factors(read.mean_squares, exponent) for exponent in _EXPONENTS]
        errors = np.sum([_errors(site, read, tried) for site in sites], axis=0)
        best = int((errors[:, 0] + errors[:, 1]).argmin())
        rows, weights, whole = (float(error) for error in errors[best])
        if rows > _MOST * weights and not read.is_vector:  # of 16 bits both parts are joined along the first axis
            by_matrix |= dict.fromkeys(names, Columns(16))
            gains |= dict.fromkeys(names, rows / max(whole, 1e-30))
            best = int(errors[:, 1].argmin())
        if _EXPONENTS[best]:
            factors |= dict.fromkeys(names, tried[best])
    chosen_by = f"the rounded rows' errors at each layer, on {inputs}"
    return dataclasses.replace(plan, by_matrix=by_matrix, gains=gains, chosen_by=chosen_by, factors=factors)


def _run(traced: TracedModel, cases: Iterable[Mapping[str, Any]]) -> list[tuple[list[LinearSite], ReadRows]]:
    """The layers that read each tensor, and what they read."""
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
        for case in cases:
            model(**case)
    return list(groups.values())


def _errors(site: LinearSite, read: ReadRows, tried: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
    """Squared errors of a layer's output by rounded rows and by rounded weights, and its squares, each row alike.

    Args:
        site: The layer.
        read: What it reads.
        tried: Factors of what it reads.

    Returns:
        `[factors, 3]`.
    """
    weight = site.weight.detach().float()
    matrix = (weight if site.kind == "conv1d" else weight.t())[:, :: max(1, site.out_features // _OUTPUTS)].numpy()
    rows = torch.cat(read.sample)[:_SAMPLE].numpy()
    whole = np.square(rows @ matrix).sum(1, dtype=np.float64)
    errors = []
    for factors in tried:
        rounded = dequantize_columns(*quantize_columns(matrix, f"{site.path}.weight", factors), factors)
        scaled = rows * factors
        step = np.maximum(np.abs(scaled).max(1, keepdims=True), ROW_TINY) / ROW_LARGEST
        change = ((scaled / step).round() * step - scaled) / factors
        products = change @ matrix, rows @ (rounded - matrix)
        squares = [*(np.square(product).sum(1, dtype=np.float64) for product in products), whole]
        errors.append([float((square[whole > 0] / whole[whole > 0]).sum()) for square in squares])
    return np.array(errors)

"""Sensitivity of a model's outputs to rounding a weight: squares of layers' inputs and of outputs' gradients.

A small change of weights `D [out, in]` has a mean KL divergence per position, in nats, of about
`1/2 sum_ij g_i x_j D_ij^2`: `x_j` is the mean square of an input, `g_i` the mean square of the gradient of
`-log p(y)` by an output, with `y` drawn from the model's own probabilities. That is the diagonal of the Fisher
information with inputs and gradients taken as independent, as in K-FAC (arXiv:1503.05671). For outputs that are not
logits it is half the mean square change of their values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from gralora_fx.base.compat.torch_graphs import tree_leaves
from gralora_fx.base.progress.stages import counted
from gralora_fx.core.graph.linear_calls import calls_at
from gralora_fx.core.graph.packed_weights import StreamedWeight
from gralora_fx.core.graph.sites import other_readers
from gralora_fx.core.graph.surgery import copied, map_parameters
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.exporters.quantize.bfloat16_products import with_bfloat16_products

_aten = torch.ops.aten


@dataclass
class Sensitivity:
    """A layer's inputs and its outputs' gradients."""

    inputs: Tensor  # `[in]`, squares of its inputs, summed over positions
    outputs: Tensor  # `[out]`, squares of the gradient of each output, summed over positions
    reads: int = 0  # number of positions

    @property
    def squares(self) -> Tensor:
        """Mean squares of its inputs, `[in]`."""
        return self.inputs / max(1, self.reads)

    def loss(self, errors: Tensor, positions: int, rows: Tensor | None = None) -> float:
        """Return the expected divergence of errors (see `Sensitivities.loss`)."""
        return _loss_of(errors, self.squares, self.outputs, positions, rows)


@dataclass
class TableSensitivity:
    """A table's lookups and their gradients."""

    lookups: Tensor  # `[rows]`, the number of lookups of each row
    gradients: Tensor  # `[columns]`, squares of the gradients of looked-up values, summed over lookups

    def loss(self, errors: Tensor, positions: int, rows: Tensor | None = None) -> float:
        """Return the expected divergence of errors (see `Sensitivities.loss`)."""
        mean = self.gradients / self.lookups.sum().clamp(min=1)
        return _loss_of(errors, mean, self.lookups, positions, rows)


def _loss_of(errors: Tensor, inputs: Tensor, outputs: Tensor, positions: int, rows: Tensor | None) -> float:
    """Return `1/2 sum_ij outputs_i inputs_j errors_ij` per position; the errors' rows may be a sample of all."""
    weighted = errors @ inputs
    if rows is None:
        return 0.5 * float(outputs @ weighted) / max(1, positions)
    share = float(outputs[rows].sum())
    mean = float(outputs[rows] @ weighted) / share if share else float(weighted.mean())
    return 0.5 * mean * float(outputs.sum()) / max(1, positions)


@dataclass(frozen=True)
class Sensitivities:
    """Measurements of a model."""

    layers: Mapping[str, Sensitivity]  # by path, each linear layer that was run
    tables: Mapping[str, TableSensitivity]  # by path, the lookups of each layer whose weight is a lookup table too
    positions: int  # number of output positions that gradients are summed over

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return them as arrays by name (see `of`)."""
        found: dict[str, NDArray[Any]] = {"positions": np.array(self.positions)}
        for path, layer in self.layers.items():
            found |= {f"inputs {path}": layer.inputs.numpy(), f"outputs {path}": layer.outputs.numpy()}
            found[f"reads {path}"] = np.array(layer.reads)
        for path, table in self.tables.items():
            found |= {f"lookups {path}": table.lookups.numpy(), f"gradients {path}": table.gradients.numpy()}
        return found

    @classmethod
    def of(cls, arrays: Mapping[str, NDArray[Any]]) -> Sensitivities:
        """Return the measurements of arrays."""

        def paths(kind: str) -> list[str]:
            return [name.removeprefix(kind) for name in arrays if name.startswith(kind)]

        def tensor(name: str) -> Tensor:
            return torch.from_numpy(arrays[name])

        layers = {
            path: Sensitivity(tensor(f"inputs {path}"), tensor(f"outputs {path}"), int(arrays[f"reads {path}"]))
            for path in paths("inputs ")
        }
        tables = {
            path: TableSensitivity(tensor(f"lookups {path}"), tensor(f"gradients {path}")) for path in paths("lookups ")
        }
        return cls(layers, tables, int(arrays["positions"]))

    def has_gradients(self, path: str) -> bool:
        """Return whether the cost of changing a layer's weight was measured."""
        layer = self.layers.get(path)
        return self.positions > 0 and (path in self.tables or (layer is not None and layer.reads > 0))

    def loss(self, path: str, errors: Tensor, rows: Tensor | None = None) -> float:
        """Estimate the divergence of squared errors `[out, in]`, in nats per position; rows may be a sample of all."""
        layer, table = self.layers.get(path), self.tables.get(path)
        both = [sensitivity for sensitivity in (layer, table) if sensitivity is not None]
        return sum(sensitivity.loss(errors, self.positions, rows) for sensitivity in both)


def measure_sensitivities(
    model: TracedModel, cases: Sequence[Mapping[str, Any]], directory: Path | None = None
) -> Sensitivities:
    """Run a model forward and backward on inputs; its parameters and gradients are unchanged.

    A streamed model's activations wait in a file of the directory for its backward pass.
    """
    layers: dict[str, Sensitivity] = {}
    tables: dict[str, TableSensitivity] = {}
    kept: Callable[[], AbstractContextManager[None]] = nullcontext
    tapped = with_bfloat16_products(_tapped(model, layers, tables))
    if any(isinstance(node.target, StreamedWeight) for node in tapped.graph_module.graph.nodes):
        from gralora_fx.exporters.quantize.saved_tensors import SavedTensors

        saved = SavedTensors(directory)
        saved.watch(tapped.graph_module)
        kept = saved.kept
    generator = torch.Generator().manual_seed(0)
    positions = 0
    for case in counted(cases, "measuring what rounding costs", "inputs"):
        with torch.enable_grad(), kept():
            loss, count = _loss(tapped(**case), case.get("attention_mask"), generator)
            loss.backward()  # type: ignore[no-untyped-call]
        positions += count
    squares = [squares for layer in layers.values() for squares in (layer.inputs, layer.outputs)]
    squares += [table.gradients for table in tables.values()]
    if not all(bool(values.isfinite().all()) for values in squares):
        raise RuntimeError("its values or gradients are not finite")
    return Sensitivities(layers, tables, positions)


def _tapped(model: TracedModel, layers: dict[str, Sensitivity], tables: dict[str, TableSensitivity]) -> TracedModel:
    """Return a copy whose layers record inputs and output gradients; no parameter requires a gradient."""
    root = copied(model.graph_module, "TappedGraph")
    readers = other_readers(root, model.sites)
    map_parameters(root, lambda parameter, _: nn.Parameter(parameter.detach(), requires_grad=False))
    nodes = {node.name: node for node in root.graph.nodes}
    for site in model.sites:
        calls = [call for name in site.calls for call in calls_at(nodes[name], site.path)]
        calls = [call for call in calls if call.operand is None and call.rows is None]
        if calls:
            layers[site.path] = Sensitivity(torch.zeros(site.in_features), torch.zeros(site.out_features))
        for call in calls:
            with root.graph.inserting_before(call.node):
                root.graph.call_function(_Tap(layers[site.path]), (call.input,))
            _insert(call.node, _OutputTap(layers[site.path].outputs), call.node)
        lookups = [nodes[name] for name in readers[site.path] if nodes[name].target is _aten.embedding.default]
        for node in lookups:
            zeros = TableSensitivity(torch.zeros(site.out_features), torch.zeros(site.in_features))
            _insert(node, _TableTap(tables.setdefault(site.path, zeros)), node, node.args[1])
    root.recompile()
    return dataclasses.replace(model, graph_module=root)


def _insert(node: fx.Node, tap: Any, *arguments: Any) -> None:
    with node.graph.inserting_after(node):
        noted = node.graph.call_function(tap, arguments)
    node.replace_all_uses_with(noted, delete_user_cb=lambda user: user is not noted)


@dataclass(frozen=True, eq=False)
class _Tap:
    """Records the inputs of layers."""

    noted: Sensitivity
    __name__ = "tap"

    def __call__(self, value: Tensor) -> None:
        """Add the positions of a value `[..., in]`."""
        rows = value.detach().reshape(-1, value.shape[-1])
        self.noted.inputs.add_(rows.square().sum(0))
        self.noted.reads += len(rows)


@dataclass(frozen=True, eq=False)
class _OutputTap:
    """Records the gradient of a layer's output."""

    squares: Tensor
    __name__ = "output_tap"

    def __call__(self, output: Tensor) -> Tensor:
        """Return the output unchanged, keeping its gradient."""
        return _watched(output, self.squares)


@dataclass(frozen=True, eq=False)
class _TableTap:
    """Records a table's lookups and the gradients of their results."""

    noted: TableSensitivity
    __name__ = "table_tap"

    def __call__(self, output: Tensor, ids: Tensor) -> Tensor:
        """Return the output unchanged, keeping lookups and its gradient."""
        flat = ids.detach().flatten()
        self.noted.lookups.index_add_(0, flat, torch.ones(len(flat)))
        return _watched(output, self.noted.gradients)


def _watched(output: Tensor, squares: Tensor) -> Tensor:
    """Return an output whose gradient's squares are summed by its last axis."""

    def note(gradient: Tensor) -> None:
        squares.add_(gradient.reshape(-1, gradient.shape[-1]).square().sum(0))

    watched = output if output.requires_grad else output.detach().requires_grad_()
    watched.register_hook(note)  # type: ignore[no-untyped-call]
    return watched


def _loss(outputs: Any, mask: Tensor | None, generator: torch.Generator) -> tuple[Tensor, int]:
    """Return the loss: `-log p` of sampled labels, summed over positions, or projections of other values."""
    fields = outputs if isinstance(outputs, Mapping) else {"output": outputs}
    leaves = [(str(name), leaf) for name, field in fields.items() for leaf in tree_leaves(field)]
    named = [(name, leaf) for name, leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    logits = [(name, value) for name, value in named if "logits" in name and value.ndim and value.shape[-1] > 1]
    total, count = torch.zeros(()), 0
    for _, value in logits or named:
        rows = value.reshape(-1, value.shape[-1] if value.ndim > 1 else 1)  # one axis: one value per position
        if mask is not None and value.ndim > 1 and mask.shape == value.shape[:-1]:
            rows = rows[mask.flatten().bool()]
        if logits:
            labels = draw(rows.detach(), generator)
            total = total + nn.functional.cross_entropy(rows, labels, reduction="sum")
        else:
            total = total + (rows * torch.randn(rows.shape, generator=generator)).sum()
        count = max(count, len(rows))
    return total, count


def draw(logits: Tensor, generator: torch.Generator, left_out: Sequence[int] = ()) -> Tensor:
    """Sample a column of every row `[rows, columns]` by its softmax probability: `[rows]`; never one of `-inf`.

    One random number per row is searched in its cumulative sums; `torch.multinomial` takes one per column, which costs
    more than the softmax. Rows go one at a time, in numpy: thread synchronisation would take longer than a row.
    """
    if left_out:
        logits = logits.clone()
        logits[:, list(left_out)] = float("-inf")
    numbers = 1 - torch.rand(len(logits), dtype=torch.double, generator=generator)
    drawn = []
    with np.errstate(invalid="ignore"):
        for row, number in zip(logits.numpy(), numbers.tolist(), strict=True):
            sums = np.exp(row - row.max()).cumsum(dtype=np.float64)
            if not np.isfinite(sums[-1]):
                raise RuntimeError("its probabilities are not finite")
            drawn.append(int(sums.searchsorted(number * sums[-1])))  # no number is 0, but a first sum may be
    return torch.tensor(drawn, dtype=torch.long)

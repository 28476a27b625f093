"""The mathematics of GraLoRA: shapes, initial values, forward, weight update and exact LoRA form.

GraLoRA (Jung et al., 2025, "GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning") cuts the
weight update into `k x k` blocks, each of rank `s = r/k`, from

    A [k, in/k, r]     one factor for each input block n
    B [k, r, out/k]    one factor for each output block j

    dW[out block j, in block n] = scale * B[j][n*s:(n+1)*s].T @ A[n][:, j*s:(j+1)*s].T

so it has the parameters of a LoRA of rank r, and rank up to k*r. The hybrid form adds `B_general @ A_general`.
Everything else in the package (graph nodes, merging, export, conversion) is made from the functions of this file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function


class Rank(NamedTuple):
    """Sizes of one adapter: block rank `r`, blocks `k` in each direction, and the rank of the plain LoRA beside it."""

    r: int
    k: int
    hybrid_r: int = 0


class Factors(NamedTuple):
    """Tensors of one adapter at one site.

    Attributes:
        A: `[k, in/k, r]`.
        B: `[k, r, out/k]`.
        A_general: `[hybrid_r, in]`, or None.
        B_general: `[out, hybrid_r]`, or None.
    """

    A: Tensor
    B: Tensor
    A_general: Tensor | None = None
    B_general: Tensor | None = None

    @property
    def rank(self) -> Rank:
        """The adapter's sizes."""
        return Rank(self.A.shape[2], self.A.shape[0], 0 if self.A_general is None else self.A_general.shape[0])


@dataclass(frozen=True)
class Update:
    """A weight update: an adapter's tensors and the factor they are scaled by."""

    factors: Factors
    scale: float


def factor_shapes(in_features: int, out_features: int, rank: Rank) -> dict[str, tuple[int, ...]]:
    """Shapes of an adapter's tensors by the name of their field in `Factors`."""
    r, k, hybrid_r = rank
    shapes: dict[str, tuple[int, ...]] = {"A": (k, in_features // k, r), "B": (k, r, out_features // k)}
    if hybrid_r:
        shapes |= {"A_general": (hybrid_r, in_features), "B_general": (out_features, hybrid_r)}
    return shapes


def parameter_count(in_features: int, out_features: int, rank: Rank) -> int:
    """Number of trainable values, `(r + hybrid_r) * (in + out)`."""
    return sum(math.prod(shape) for shape in factor_shapes(in_features, out_features, rank).values())


def initial_factors(
    in_features: int,
    out_features: int,
    rank: Rank,
    *,
    zero_update: bool = True,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Factors:
    """Fresh tensors: `A` uniform as in a linear layer of `in/k` inputs, `B` zero so that the update is zero.

    The draws are those of `peft.tuners.gralora`, in its order: the same seed gives the same tensors.

    Args:
        in_features: Input width of the layer; `k` divides it.
        out_features: Output width of the layer; `k` divides it.
        rank: The adapter's sizes.
        zero_update: False draws `B` at random too.
        device: Device of the result.
        dtype: Dtype of the result.

    Returns:
        Tensors of the shapes that `factor_shapes` gives.
    """
    r, k, hybrid_r = rank

    def draw_pair(inputs: int, width: int, outputs: int) -> tuple[Tensor, Tensor]:
        a, b = torch.empty(width, inputs), torch.zeros(outputs, width)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        if not zero_update:
            nn.init.kaiming_uniform_(b, a=math.sqrt(5))
        return a, b

    pairs = [draw_pair(in_features // k, r, out_features // k) for _ in range(k)]
    A, B = (torch.stack(tensors).transpose(1, 2).contiguous() for tensors in zip(*pairs, strict=True))
    A_general = B_general = None
    if hybrid_r:
        # PEFT makes two linear layers first, whose own initial draws advance the generator
        nn.Linear(in_features, hybrid_r, bias=False), nn.Linear(hybrid_r, out_features, bias=False)
        A_general, B_general = draw_pair(in_features, hybrid_r, out_features)
    return Factors(*(None if t is None else t.to(device, dtype) for t in (A, B, A_general, B_general)))  # type: ignore[arg-type]


def add_output(
    x: Tensor,
    y: Tensor,
    factors: Factors,
    scale: float,
    *,
    features: tuple[int, int],
    rank: Rank,
    dropout: float = 0.0,
    dtype: torch.dtype | None = None,
    rows: tuple[int, int] | None = None,
    in_place: bool = True,
) -> Tensor:
    """Add an adapter's output to a layer's own.

    Without gradients the update is accumulated straight into the blocks of `y`, so no tensor of its size is made:
    beyond the multiplications only `[T, k*r]` values are moved.

    It runs on `torch.fx` proxies as on tensors, which is how a graph receives its nodes.

    Args:
        x: The layer's input, `[..., in]`; any number of leading axes, zero rows included.
        y: The layer's output, `[..., out]`, contiguous; see `accumulate` for when it is overwritten.
        factors: The adapter's tensors.
        scale: Factor of the adapter's output.
        features: Widths `in` and `out` of the layer.
        rank: The adapter's sizes.
        dropout: Probability with which input values are zeroed (training).
        dtype: Dtype of the adapter where it differs from the layer's: the input is cast to it, the adapter's output
            back to that of `y`.
        rows: First output feature of `y` and the one after its last, where `y` is a part of the layer's output only.
        in_place: Whether `y` may be overwritten at all.

    Returns:
        `y + scale * adapter(x)`, of the shape and dtype of `y`.
    """
    r, k, _ = rank
    in_features, out_features = features
    if dtype is not None:
        zero = torch.zeros_like(y, dtype=dtype)
        options: dict[str, Any] = {"features": features, "rank": rank, "dropout": dropout, "rows": rows}
        return torch.add(y, add_output(x.to(dtype), zero, factors, 1.0, **options).type_as(y), alpha=scale)
    blocks = _dropped(x, dropout).reshape(-1, k, in_features // k).transpose(0, 1)  # [k, T, in/k]
    hidden = torch.bmm(blocks, factors.A)  # [k (input block), T, r]
    hidden = hidden.view(k, -1, k, r // k).permute(2, 1, 0, 3).reshape(k, -1, r)  # [k (output block), T, r]
    how = {} if in_place else {"in_place": False}
    width = out_features
    if rows is None:
        into = y.view(-1, k, out_features // k).transpose(0, 1)  # [k, T, out/k]
        y = accumulate(into, hidden, factors.B, scale, **how).transpose(0, 1).reshape_as(y)
    else:
        width = rows[1] - rows[0]
        output = torch.bmm(hidden, factors.B).transpose(0, 1).reshape(-1, out_features)[:, slice(*rows)]
        y = torch.add(y, output.reshape_as(y), alpha=scale)
    if factors.A_general is not None and factors.B_general is not None:
        flat = _dropped(x, dropout).reshape(-1, in_features)
        hidden = torch.mm(flat, factors.A_general.t())  # [T, hybrid_r]
        general = factors.B_general if rows is None else factors.B_general[slice(*rows)]
        y = accumulate(y.view(-1, width), hidden, general.t(), scale, **how).view_as(y)
    return y


def add_update(weight: Tensor, factors: Factors, scale: float, *, features: tuple[int, int], rank: Rank) -> Tensor:
    """Add an adapter's update to a weight as one matrix, for a layer whose input cannot be reached.

    Gradients reach the factors. It runs on `torch.fx` proxies as on tensors.

    Args:
        weight: `[out, in]`.
        factors: The adapter's tensors.
        scale: Factor of the update.
        features: Widths `in` and `out` of the layer.
        rank: The adapter's sizes.

    Returns:
        `weight + scale * update`.
    """
    r, k, _ = rank
    in_block, out_block, s = features[0] // k, features[1] // k, r // k
    left = factors.B.view(k, k, s, out_block).transpose(2, 3).reshape(k * k, out_block, s)  # [(j, n), out/k, s]
    right = factors.A.view(k, in_block, k, s).permute(2, 0, 3, 1).reshape(k * k, s, in_block)  # [(j, n), s, in/k]
    blocks = torch.bmm(left, right).view(k, k, out_block, in_block).transpose(1, 2)  # [j, out/k, n, in/k]
    update = blocks.reshape(features[1], features[0])
    if factors.A_general is not None and factors.B_general is not None:
        update = update + torch.mm(factors.B_general, factors.A_general)
    return torch.add(weight, update, alpha=scale)


def accumulate(into: Tensor, left: Tensor, right: Tensor, scale: float, *, in_place: bool = True) -> Tensor:
    """`into + scale * left @ right`, written into `into` itself where that is right and fast.

    In training it makes a new tensor, since writing into a view costs autograd a copy of the whole gradient; under
    `torch.compile` and `torch.export` too, which cannot undo the write; and under autocast, which gives the result its
    own dtype. A graph calls it as one node.

    Args:
        into: `[n, m]`, or `[k, n, m]`; overwritten where no gradient is recorded.
        left: `[n, r]`, or `[k, n, r]`.
        right: `[r, m]`, or `[k, r, m]`.
        scale: Factor of the product.
        in_place: False never overwrites, for an `into` that something else reads too.

    Returns:
        The sum, of the shape of `into`.
    """
    operands = (into, left, right)
    if has_torch_function(operands):  # so that running on the proxies of a graph makes a node of the call
        given: dict[str, Any] = {} if in_place else {"in_place": False}
        result: Tensor = handle_torch_function(accumulate, operands, *operands, scale, **given)
        return result
    batched = into.ndim == 3
    records = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in operands)
    if in_place and not records and into.dtype == left.dtype == right.dtype and not torch.compiler.is_compiling():
        return into.baddbmm_(left, right, alpha=scale) if batched else into.addmm_(left, right, alpha=scale)
    return (torch.baddbmm if batched else torch.addmm)(into, left, right, alpha=scale)


@torch.no_grad()
def fold(weight: Tensor, updates: Sequence[Update], *, transposed: bool = False, out: Tensor | None = None) -> Tensor:
    """Fold updates into a weight, block by block, without a tensor of the weight's size beside the result.

    Half-precision weights are accumulated in float32 one block at a time and rounded once.

    Args:
        weight: `[out, in]`, or `[in, out]` if `transposed`; read only.
        updates: The updates to add; their `k` may differ.
        transposed: Whether the weight is stored `[in, out]`.
        out: Where to write, of the weight's shape and dtype; the weight itself folds in place. None makes a tensor.

    Returns:
        `weight + sum of scale * update`, in `out`.
    """
    result = torch.empty_like(weight, memory_format=torch.contiguous_format) if out is None else out
    source, target = (weight.t(), result.t()) if transposed else (weight, result)
    accumulator = torch.promote_types(weight.dtype, torch.float32)
    grid = math.lcm(*(update.factors.rank.k for update in updates))
    for rows, columns in product(_slices(source.shape[0], grid), _slices(source.shape[1], grid)):
        block, into = source[rows, columns], target[rows, columns]
        terms = [term for update in updates for term in _block_terms(update, rows, columns, source.shape)]
        if accumulator == weight.dtype:
            for left, right, scale in terms:
                torch.addmm(block, left.to(accumulator), right.to(accumulator), alpha=scale, out=into)
                block = into
        else:
            total = block.to(accumulator)
            for left, right, scale in terms:
                total.addmm_(left.to(accumulator), right.to(accumulator), alpha=scale)
            into.copy_(total)
    return result


@torch.no_grad()
def delta_weight(update: Update, *, transposed: bool = False) -> Tensor:
    """The whole update as a dense matrix, `[out, in]` or `[in, out]` if `transposed`."""
    k, in_block, _ = update.factors.A.shape
    out_features, in_features = k * update.factors.B.shape[2], k * in_block
    shape = (in_features, out_features) if transposed else (out_features, in_features)
    zero = torch.zeros(shape, dtype=update.factors.A.dtype, device=update.factors.A.device)
    return fold(zero, [update], transposed=transposed, out=zero)


def _dropped(x: Tensor, probability: float) -> Tensor:
    return nn.functional.dropout(x, probability, training=True) if probability else x


def _slices(size: int, parts: int) -> Iterator[slice]:
    width = size // parts
    return (slice(part * width, (part + 1) * width) for part in range(parts))


def _block_terms(
    update: Update, rows: slice, columns: slice, shape: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Pairs whose products, scaled, are the update on a block that lies within one output and one input block."""
    A, B, A_general, B_general = update.factors
    r, k, _ = update.factors.rank
    s, out_block, in_block = r // k, shape[0] // k, shape[1] // k
    j, n = rows.start // out_block, columns.start // in_block
    local_rows = slice(rows.start - j * out_block, rows.stop - j * out_block)
    local_columns = slice(columns.start - n * in_block, columns.stop - n * in_block)
    yield B[j][n * s : (n + 1) * s, local_rows].t(), A[n][local_columns, j * s : (j + 1) * s].t(), update.scale
    if A_general is not None and B_general is not None:
        yield B_general[rows], A_general[:, columns], update.scale

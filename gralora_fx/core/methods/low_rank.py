"""Products of low rank: the two steps of every method's forward, one node each, and their forms for some rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from gralora_fx.base.compat.torch_graphs import is_transformed
from gralora_fx.core.graph.effects import without_effect
from gralora_fx.core.methods.method import LayerCall

Rows = slice | Tensor  # rows of a batch: a slice, or an index tensor


def add_low_rank(call: LayerCall, A: Tensor, B: Tensor, scale: float, *, dropout: float = 0.0) -> Tensor:
    """Add a pair `A [r, in]`, `B [out, r]` to a layer's own output: `y + scale * x @ A.T @ B.T`; works on proxies too.

    See `accumulate` for when `call.y` is overwritten.
    """
    return accumulate(call.y, project(drop_inputs(call.x, dropout), A), call.of_rows(B), scale)


def drop_inputs(x: Tensor, probability: float) -> Tensor:
    """Apply dropout to an adapter's input; the graph's mode decides later whether it acts."""
    return nn.functional.dropout(x, probability, training=True) if probability else x


@without_effect
def at_tokens(x: Tensor, acting: Tensor) -> Tensor:
    """Return `x`, `[batch, tokens, in]` or `[batch * tokens, in]`, with zeros where the adapter does not act."""
    return torch.where(acting.reshape(*x.shape[:-1], 1), x, 0)


@without_effect
def project(x: Tensor, A: Tensor) -> Tensor:
    """Multiply a layer's input `[..., in]` by the first factor.

    `A [r, in]` gives `[T, r]`. `A [k (input block), in/k, r]`, whose columns `[j*s:(j+1)*s]`, with `s = r/k`, are for
    output block j, gives `[k (output block), T, r]`, whose columns `[n*s:(n+1)*s]` come from input block n.
    """
    if has_torch_function((x, A)):  # so that running on the proxies of a graph makes a node of the call
        result: Tensor = handle_torch_function(project, (x, A), x, A)
        return result
    if A.ndim == 2:
        return torch.mm(x.reshape(-1, A.shape[1]), A.t())
    return swapped(torch.bmm(in_blocks(x, A.shape[0]), A))


@without_effect
def accumulate(y: Tensor, hidden: Tensor, B: Tensor, scale: float, *, in_place: bool = True) -> Tensor:
    """Multiply by the second factor, and add the product to a layer's output: in place where that is correct and fast.

    `hidden` is `[T, r]` with `B [out, r]`, or `[k, T, r]` with `B [k, r, out/k]`: then `scale * hidden[j] @ B[j]` is
    added to block j of `y`, which is contiguous.

    It allocates a new tensor if `in_place` is false, for a `y` with other readers; in training, since writing into a
    view costs autograd a copy of the whole gradient; under `torch.compile` and `torch.export`, which cannot undo the
    write; and under autocast, which gives the result its own dtype.
    """
    operands = (y, hidden, B)
    if has_torch_function(operands):
        options: dict[str, Any] = {} if in_place else {"in_place": False}
        result: Tensor = handle_torch_function(accumulate, operands, *operands, scale, **options)
        return result
    into, right = (y.view(-1, B.shape[0]), B.t()) if B.ndim == 2 else (in_blocks(y, B.shape[0]), B)
    records = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in operands)
    if (
        in_place
        and not records
        and y.dtype == hidden.dtype == B.dtype
        and not (torch.compiler.is_compiling() or is_transformed())
    ):
        into.addmm_(hidden, right, alpha=scale) if B.ndim == 2 else into.baddbmm_(hidden, right, alpha=scale)
        return y
    if B.ndim == 2:
        return torch.addmm(into, hidden, right, alpha=scale).view_as(y)
    return torch.baddbmm(into, hidden, right, alpha=scale).transpose(0, 1).reshape_as(y)


def in_blocks(x: Tensor, k: int) -> Tensor:
    """Return `[..., width]` as `[k, T, width/k]`, a view if `x` is contiguous."""
    return x.reshape(-1, k, x.shape[-1] // k).transpose(0, 1)


def swapped(hidden: Tensor) -> Tensor:
    """Regroup `[k (input block), T, r]` by output block, or the other way round."""
    k, _, r = hidden.shape
    return hidden.view(k, -1, k, r // k).permute(2, 1, 0, 3).reshape(k, -1, r)


@without_effect
def take_rows(x: Tensor, rows: Rows, batch: int | None = None) -> Tensor:
    """Return some rows of `[batch, ...]`, a view for a slice; of `[batch * n, ...]`, given `batch`, n entries each."""
    return x[rows] if batch is None else torch.unflatten(x, 0, (batch, -1))[rows].flatten(0, 1)


@without_effect
def set_rows(
    y: Tensor, rows: Sequence[Rows], values: Sequence[Tensor], batch: int | None = None, *, in_place: bool = True
) -> Tensor:
    """Return a batch (as for `take_rows`) with disjoint rows replaced by values.

    It is written in place where no gradient is recorded, unless `in_place` is false, for a `y` with other readers.
    """
    if batch is not None:
        parts = [torch.unflatten(value, 0, (-1, y.shape[0] // batch)) for value in values]
        return set_rows(torch.unflatten(y, 0, (batch, -1)), rows, parts, in_place=in_place).flatten(0, 1)
    values = [value.type_as(y) for value in values]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (y, *values)):
        return _with_rows(y, rows, values)
    in_place = in_place and not torch.compiler.is_compiling() and not is_transformed()
    written = y if in_place else y.clone()
    for chosen, value in zip(rows, values, strict=True):
        is_written = in_place and isinstance(chosen, slice) and 0 != value.data_ptr() == y[chosen].data_ptr()
        if not is_written:  # as a view of y is already
            written[chosen] = value
    return written


def _with_rows(y: Tensor, rows: Sequence[Rows], values: Sequence[Tensor]) -> Tensor:
    """Return a batch with some rows replaced, in a new tensor, by one operation that autograd differentiates."""
    if isinstance(rows[0], slice):
        parts, end = [], 0
        for chosen, value in sorted(zip(rows, values, strict=True), key=lambda pair: pair[0].start):  # type: ignore[union-attr]
            parts += [*([y[end : chosen.start]] if chosen.start > end else []), value]  # type: ignore[union-attr]
            end = chosen.stop  # type: ignore[union-attr]
        return torch.cat([*parts, y[end:]] if end < y.shape[0] else parts)
    return y.index_copy(0, torch.cat(rows), torch.cat(values))  # type: ignore[arg-type]

"""Forward and backward pass of an adapted layer in training.

Autograd's own derivatives allocate a tensor as wide as the layer for each product, copy it between the blocked layout
`[k, T, out/k]` and the layer's `[T, out]`, and add up the results. Here products are computed in the layer's own
layout, and input gradients accumulate into one tensor, also those of other layers that read the same input. The product
of A and the input, k times as wide as LoRA's, is recomputed in the backward pass where keeping it costs much memory. A
packed weight is unpacked for each product and never kept: it is passed as a tuple of the unpacking operator, its
arguments, and whether its result is `[in, out]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gralora_fx.base.compat.torch_graphs import plain_backward, will_run
from gralora_fx.core.methods.low_rank import Rows, accumulate, in_blocks, project, set_rows, swapped

_KEPT = 4  # hidden values that are more than 1/4 of the input are computed again instead of kept
Weight = Tensor | tuple[Any, ...]
Term = tuple[float, Rows | None]  # an adapter's scale and its rows


def _values(weight: Weight) -> Tensor:
    """Return a weight `[out, in]`; unpack a packed one."""
    if isinstance(weight, Tensor):
        return weight
    unpack, arguments, is_turned = weight
    values: Tensor = unpack(*arguments)
    return values.t() if is_turned else values


def compute_layer(
    x: Tensor,
    read: Tensor,
    weight: Weight,
    bias: Tensor | None,
    terms: Sequence[Term],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """Compute an adapted layer; return its output and its adapters' hidden values."""
    output = nn.functional.linear(x, _values(weight), bias)
    taken = {id(rows): _of(read, rows) for _, rows in terms}
    hidden = [project(taken[id(rows)], A) for (_, rows), A in zip(terms, As, strict=True)]
    by_row: dict[int, tuple[Rows, Tensor]] = {}  # by the identity of the rows
    for (scale, rows), part, B in zip(terms, hidden, Bs, strict=True):
        if rows is None:
            output = accumulate(output, part, B, scale)
        else:
            _, y = by_row.get(id(rows)) or (rows, output[rows])
            by_row[id(rows)] = rows, accumulate(y, part, B, scale)
    if by_row:
        chosen, written = zip(*by_row.values(), strict=True)
        output = set_rows(output, chosen, written)
    return output, hidden


class SharedInput(NamedTuple):
    """An input of several layers, whose backward passes add up its gradient in one tensor.

    A layer that reads the input as it was when this was made passes its gradient to `token`, of the input's shape and
    without memory; or it adds it to the sum of the backward pass that runs, which the token's own backward pass hands
    on. Sums are kept by backward pass, so that partial, repeated and concurrent ones do not meet.
    """

    token: Tensor
    version: int  # of the input's values
    sums: dict[int, Tensor]  # `[T, in]`, by backward pass

    @classmethod
    def of(cls, x: Tensor) -> SharedInput:
        """Share an input that requires a gradient."""
        sums: dict[int, Tensor] = {}
        return cls(_Token.apply(x, sums), x._version, sums)  # type: ignore[no-untyped-call]


class _Token(torch.autograd.Function):
    """Hands on the gradient of an input that several layers read."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sums: dict[int, Tensor]) -> Tensor:
        ctx.shape, ctx.sums = x.shape, sums
        ctx.set_materialize_grads(False)
        return x.new_empty(()).expand(x.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Any, ...]:
        task = plain_backward()
        found = None if task is None else ctx.sums.pop(task, None)
        return gradient if found is None else found.view(ctx.shape), None


class AdaptedLinear(torch.autograd.Function):
    """An adapted layer as one autograd function, whose output is in new memory."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        token: Tensor | None,  # where the gradient goes
        shared: SharedInput | None,
        terms: Sequence[Term],
        packed: tuple[Any, ...] | None,
        weight: Tensor | None,
        bias: Tensor | None,
        *factors: Tensor,
    ) -> Tensor:
        """Compute the layer, and save what the backward pass needs."""
        used: Any = weight if packed is None else packed
        read = x if dropped is None else dropped
        output, hidden = compute_layer(x, read, used, bias, terms, factors[: len(terms)], factors[len(terms) :])
        needs_x, _, _, _, _, _, needs_weight, _, *needed = ctx.needs_input_grad
        trains = any(needed)
        kept = (
            part if trains and _KEPT * part.numel() <= _size(read, rows) else None
            for (_, rows), part in zip(terms, hidden, strict=True)
        )
        ctx.save_for_backward(
            x if needs_weight or (trains and dropped is None) else None,
            dropped if trains else None,
            weight if needs_x else None,
            *factors,
            *kept,
        )
        ctx.terms, ctx.packed, ctx.drops = terms, packed, dropped is not None
        ctx.shape, ctx.read_shape = x.shape, read.shape
        ctx.sums, ctx.token = (None, None) if shared is None else (shared.sums, shared.token.grad_fn)
        ctx.set_materialize_grads(False)
        fresh: Tensor = torch.ops.aten._unsafe_view.default(output, output.shape)  # a view could not be overwritten
        return fresh

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Any, ...]:
        """Return the gradients of the input, its dropout, its token, the weight, the bias and both factors."""
        needs_x, needs_dropped, _, _, _, _, needs_weight, needs_bias, *needed = ctx.needs_input_grad
        if gradient is None:
            return (None,) * (8 + len(needed))
        x, dropped, weight, *tensors = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        task = None if ctx.sums is None else plain_backward()
        of_x = of_dropped = None
        if needs_x and (task is None or will_run(ctx.token)):
            values = _values(weight if ctx.packed is None else ctx.packed)
            of_x = None if task is None else ctx.sums.get(task)
            of_x = torch.mm(flat, values) if of_x is None else of_x.addmm_(flat, values)
            del values  # frees a packed weight's values
        if needs_dropped:
            of_dropped = flat.new_zeros(ctx.read_shape)
        of_weight = flat.t() @ x.reshape(-1, x.shape[-1]) if needs_weight else None
        of_bias = flat.sum(0) if needs_bias else None
        into, read = (of_dropped, dropped) if ctx.drops else (of_x, x)
        of_factors = _of_factors(ctx, into, read, gradient, tensors, needed)
        if task is not None and of_x is not None:
            ctx.sums[task], of_x = of_x, None
        of_x = None if of_x is None else of_x.view(ctx.shape)
        of_x, of_token = (of_x, None) if ctx.sums is None else (None, of_x)
        return of_x, of_dropped, of_token, None, None, None, of_weight, of_bias, *of_factors


def _of_factors(
    ctx: Any, into: Tensor | None, read: Tensor | None, gradient: Tensor, tensors: Sequence[Any], needed: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients of the factors A and B of all adapters; add that of what they read to `into`."""
    count = len(ctx.terms)
    As, Bs, hidden = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
    found = []
    for (scale, rows), A, B, part, *needs in zip(
        ctx.terms, As, Bs, hidden, needed[:count], needed[count:], strict=True
    ):
        own: Any = None if read is None else _of(read, rows)
        if needs[1] and (part is None or torch.is_grad_enabled()):  # for derivatives of this gradient, which reach A
            part = project(own, A)
        flat = _of(gradient, rows).reshape(-1, gradient.shape[-1])
        place: Any = None if into is None else _of(into.view(ctx.read_shape), rows)
        target = None if place is None else place.view(-1, place.shape[-1])
        found.append(_add_gradients(target, own, flat, A, B, part, scale, needs))
        if into is not None and isinstance(rows, Tensor):  # the rows are a copy, not a view
            into.view(ctx.read_shape)[rows] = place
    return [gradient for column in zip(*found, strict=True) for gradient in column]


def _of(value: Tensor, rows: Rows | None) -> Tensor:
    """Return some rows of a tensor: a view for a slice, a copy for indices."""
    return value if rows is None else value[rows]


def _size(value: Tensor, rows: Rows | None) -> int:
    if rows is None:
        return value.numel()
    count = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
    return count * value[0].numel()


def _add_gradients(
    into: Tensor | None,
    read: Any,
    rows: Tensor,
    A: Tensor,
    B: Tensor,
    hidden: Any,
    scale: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of A and B that are needed, given that of the output, `rows [T, out]`.

    Add the input's to `into [T, in]`, if that is given.
    """
    reads = into is not None or needs[0]
    if A.ndim == 2:
        of_hidden: Any = torch.mm(rows, B).mul_(scale) if reads else None
        if into is not None:
            into.addmm_(of_hidden, A)
        of_A = torch.mm(of_hidden.t(), read.reshape(-1, A.shape[1])) if needs[0] else None
        of_B = torch.mm(rows.t(), hidden).mul_(scale) if needs[1] else None
        return of_A, of_B
    k = A.shape[0]
    blocks = in_blocks(rows, k)
    of_hidden = swapped(torch.bmm(blocks, B.transpose(1, 2)).mul_(scale)) if reads else None
    if into is not None:
        in_blocks(into, k).baddbmm_(of_hidden, A.transpose(1, 2))
    of_A = torch.bmm(in_blocks(read, k).transpose(1, 2), of_hidden) if needs[0] else None
    of_B = torch.bmm(hidden.transpose(1, 2), blocks).mul_(scale) if needs[1] else None
    return of_A, of_B

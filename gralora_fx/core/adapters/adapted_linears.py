"""Forward and backward passes of adapted layers that share an input, in training.

Autograd's own derivatives allocate a tensor as wide as the layer for each product, copy it between the blocked layout
`[k, T, out/k]` and the layer's `[T, out]`, and add up the results. Here products are computed in the layer's own
layout, and input gradients accumulate into one tensor. The product of A and the input, k times as wide as LoRA's, is
recomputed in the backward pass where keeping it costs much memory. Multiplying by the A of all layers at once was
measured and saves nothing. A packed weight is unpacked for each product and never kept: it is passed as a tuple of the
unpacking operator, its arguments, and whether its result is `[in, out]`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gralora_fx.core.methods.low_rank import Rows, accumulate, in_blocks, project, set_rows, swapped

_KEPT = 4  # hidden values that are more than 1/4 of the input are computed again instead of kept
Weight = Tensor | tuple[Any, ...]
Term = tuple[int, float, Rows | None]  # for each adapter: the index of its layer, its scale and its rows


def _values(weight: Weight) -> Tensor:
    """Return a weight `[out, in]`; unpack a packed one."""
    if isinstance(weight, Tensor):
        return weight
    unpack, arguments, is_turned = weight
    values: Tensor = unpack(*arguments)
    return values.t() if is_turned else values


def compute_layers(
    x: Tensor,
    read: Tensor,
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None],
    terms: Sequence[Term],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Compute adapted layers; return their outputs and their adapters' hidden values."""
    outputs = [nn.functional.linear(x, _values(weight), bias) for weight, bias in zip(weights, biases, strict=True)]
    taken = {id(rows): _of(read, rows) for _, _, rows in terms}
    hidden = [project(taken[id(rows)], A) for (_, _, rows), A in zip(terms, As, strict=True)]
    by_row: list[dict[int, tuple[Rows, Tensor]]] = [{} for _ in weights]  # by the identity of the rows
    for (layer, scale, rows), part, B in zip(terms, hidden, Bs, strict=True):
        if rows is None:
            outputs[layer] = accumulate(outputs[layer], part, B, scale)
        else:
            _, y = by_row[layer].get(id(rows)) or (rows, outputs[layer][rows])
            by_row[layer][id(rows)] = rows, accumulate(y, part, B, scale)
    for layer, values in enumerate(by_row):
        if values:
            chosen, written = zip(*values.values(), strict=True)
            outputs[layer] = set_rows(outputs[layer], chosen, written)
    return tuple(outputs), hidden


class AdaptedLinears(torch.autograd.Function):
    """The layers as one autograd function, which accumulates the gradients of `x` into one tensor."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor | None, terms: Sequence[Term], weights: Sequence[Weight], *tensors: Any
    ) -> tuple[Tensor, ...]:
        """Compute the layers, and save what the backward pass needs."""
        floats, biases, As, Bs = _columns(tensors, *[len(weights)] * 2, *[len(terms)] * 2)
        outputs, hidden = compute_layers(x, x if dropped is None else dropped, weights, biases, terms, As, Bs)
        kept = (
            part if _KEPT * part.numel() <= _size(x, rows) else None
            for (_, _, rows), part in zip(terms, hidden, strict=True)
        )
        ctx.save_for_backward(x, dropped, *floats, *As, *Bs, *kept)
        ctx.terms = terms
        ctx.packed = [None if isinstance(weight, Tensor) else weight for weight in weights]
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        """Return the gradients of the input, of weights, of biases and of both factors."""
        x, dropped, *tensors = ctx.saved_tensors
        of_input, of_dropped, _, _, *needed = ctx.needs_input_grad
        count, read = len(ctx.packed), x if dropped is None else dropped
        floats, factors = tensors[:count], tensors[count:]
        trains = needed[:count], needed[count : 2 * count]
        of_x = of_read = None
        of_weights: list[Tensor | None] = [None] * count
        of_biases = list(of_weights)
        for place, (gradient, weight, packed) in enumerate(zip(gradients, floats, ctx.packed, strict=True)):
            if gradient is None:
                continue
            flat = gradient.reshape(-1, gradient.shape[-1])
            if of_input:
                values = _values(weight if packed is None else packed)
                of_x = torch.mm(flat, values) if of_x is None else of_x.addmm_(flat, values)
                del values  # frees a packed weight's values before the next one is unpacked
            of_weights[place] = flat.t() @ x.reshape(-1, x.shape[-1]) if trains[0][place] else None
            of_biases[place] = flat.sum(0) if trains[1][place] else None
        if of_dropped and any(gradient is not None for gradient in gradients):
            of_read = x.new_zeros(x.numel() // x.shape[-1], x.shape[-1])
        into = of_x if dropped is None else of_read
        found: list[tuple[Tensor | None, Tensor | None]] = []
        for (place, scale, rows), A, B, hidden in zip(
            ctx.terms, *_columns(factors, *[len(ctx.terms)] * 3), strict=True
        ):
            gradient = gradients[place]
            if gradient is None:
                found.append((None, None))
                continue
            own = _of(read, rows)
            if hidden is None or torch.is_grad_enabled():  # for derivatives of these gradients, which must reach A
                hidden = project(own, A)
            flat = _of(gradient, rows).reshape(-1, gradient.shape[-1])
            if into is None:
                found.append(_add_gradients(None, own, flat, A, B, hidden, scale))
                continue
            whole = into.view(x.shape)
            part = _of(whole, rows)
            found.append(_add_gradients(part.view(-1, x.shape[-1]), own, flat, A, B, hidden, scale))
            if isinstance(rows, Tensor):  # the rows are a copy, not a view
                whole[rows] = part
        of_x, of_read = (None if gradient is None else gradient.view(x.shape) for gradient in (of_x, of_read))
        of_factors = (gradient for column in zip(*found, strict=True) for gradient in column)
        return of_x, of_read, None, None, *of_weights, *of_biases, *of_factors


def _of(value: Tensor, rows: Rows | None) -> Tensor:
    """Return some rows of a tensor: a view for a slice, a copy for indices."""
    return value if rows is None else value[rows]


def _size(value: Tensor, rows: Rows | None) -> int:
    if rows is None:
        return value.numel()
    count = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
    return count * (value.numel() // value.shape[0])


def _add_gradients(
    into: Tensor | None, read: Tensor, rows: Tensor, A: Tensor, B: Tensor, hidden: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of A and B, given that of the output, `rows [T, out]`; add the input's to `into [T, in]`."""
    if A.ndim == 2:
        of_hidden = torch.mm(rows, B).mul_(scale)
        if into is not None:
            into.addmm_(of_hidden, A)
        return torch.mm(of_hidden.t(), read.reshape(-1, A.shape[1])), torch.mm(rows.t(), hidden).mul_(scale)
    k = A.shape[0]
    blocks = in_blocks(rows, k)
    of_hidden = swapped(torch.bmm(blocks, B.transpose(1, 2)).mul_(scale))
    if into is not None:
        in_blocks(into, k).baddbmm_(of_hidden, A.transpose(1, 2))
    of_B = torch.bmm(hidden.transpose(1, 2), blocks).mul_(scale)
    return torch.bmm(in_blocks(read, k).transpose(1, 2), of_hidden), of_B


def _columns(tensors: Sequence[Any], *lengths: int) -> list[Sequence[Any]]:
    """Split tensors into column ranges of these lengths."""
    return [tensors[start:end] for start, end in itertools.pairwise(itertools.accumulate(lengths, initial=0))]

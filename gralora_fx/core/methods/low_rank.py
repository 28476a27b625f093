"""Products of low rank: the two steps that every method's forward is made of, each one node of a graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from gralora_fx.core.methods.method import LayerCall


def add_low_rank(call: LayerCall, A: Tensor, B: Tensor, scale: float, *, dropout: float = 0.0) -> Tensor:
    """Add a low-rank pair's output to a layer's own: `y + scale * x @ A.T @ B.T`.

    It runs on `torch.fx` proxies as on tensors.

    Args:
        call: The layer's input and output; see `accumulate` for when the latter is overwritten.
        A: `[r, in]`.
        B: `[out, r]`.
        scale: Factor of the product.
        dropout: Probability with which input values are zeroed (training).
    """
    return accumulate(call.y, project(drop_inputs(call.x, dropout), A), call.of_rows(B), scale)


def drop_inputs(x: Tensor, probability: float) -> Tensor:
    """Dropout of an adapter's input; the graph's mode decides later whether it acts."""
    return nn.functional.dropout(x, probability, training=True) if probability else x


def project(x: Tensor, A: Tensor) -> Tensor:
    """Multiply a layer's input by the first factor.

    Args:
        x: `[..., in]`.
        A: `[r, in]`; or `[k (input block), in/k, r]`, of which columns `[j*s:(j+1)*s]`, with `s = r/k`, are for output
            block j.

    Returns:
        `[T, r]`; or `[k (output block), T, r]`, of which columns `[n*s:(n+1)*s]` come from input block n.
    """
    if has_torch_function((x, A)):  # so that running on the proxies of a graph makes a node of the call
        result: Tensor = handle_torch_function(project, (x, A), x, A)
        return result
    if A.ndim == 2:
        return torch.mm(x.reshape(-1, A.shape[1]), A.t())
    return swapped(torch.bmm(in_blocks(x, A.shape[0]), A))


def accumulate(y: Tensor, hidden: Tensor, B: Tensor, scale: float, *, in_place: bool = True) -> Tensor:
    """Multiply by the second factor, and add the product to a layer's output: in place where that is correct and fast.

    In training it makes a new tensor, since writing into a view costs autograd a copy of the whole gradient; under
    `torch.compile` and `torch.export` too, which cannot undo the write; and under autocast, which gives the result its
    own dtype.

    Args:
        y: The output, `[..., out]`, contiguous; overwritten where no gradient is recorded.
        hidden: `[T, r]`, or `[k, T, r]`.
        B: `[out, r]`, or `[k, r, out/k]`, of which block j adds `scale * hidden[j] @ B[j]` to block j of `y`.
        scale: Factor of the product.
        in_place: False never overwrites, for a `y` with other readers.
    """
    operands = (y, hidden, B)
    if has_torch_function(operands):
        options: dict[str, Any] = {} if in_place else {"in_place": False}
        result: Tensor = handle_torch_function(accumulate, operands, *operands, scale, **options)
        return result
    into, right = (y.view(-1, B.shape[0]), B.t()) if B.ndim == 2 else (in_blocks(y, B.shape[0]), B)
    records = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in operands)
    if in_place and not records and y.dtype == hidden.dtype == B.dtype and not torch.compiler.is_compiling():
        into.addmm_(hidden, right, alpha=scale) if B.ndim == 2 else into.baddbmm_(hidden, right, alpha=scale)
        return y
    if B.ndim == 2:
        return torch.addmm(into, hidden, right, alpha=scale).view_as(y)
    return torch.baddbmm(into, hidden, right, alpha=scale).transpose(0, 1).reshape_as(y)


def in_blocks(x: Tensor, k: int) -> Tensor:
    """Return `[..., width]` as `[k, T, width/k]`, a view where `x` is contiguous."""
    return x.reshape(-1, k, x.shape[-1] // k).transpose(0, 1)


def swapped(hidden: Tensor) -> Tensor:
    """Sort `[k (input block), T, r]` by output block instead, or the other way round."""
    k, _, r = hidden.shape
    return hidden.view(k, -1, k, r // k).permute(2, 1, 0, 3).reshape(k, -1, r)

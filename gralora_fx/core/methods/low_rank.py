"""Products of low rank: the steps that every method's forward is made of."""

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
    hidden = torch.mm(drop_inputs(call.x, dropout).reshape(-1, call.features[0]), A.t())  # [T, r]
    first, end = (0, call.features[1]) if call.rows is None else call.rows
    return accumulate(call.y.view(-1, end - first), hidden, call.of_rows(B).t(), scale).view_as(call.y)


def drop_inputs(x: Tensor, probability: float) -> Tensor:
    """Dropout of an adapter's input; the graph's mode decides later whether it acts."""
    return nn.functional.dropout(x, probability, training=True) if probability else x


def accumulate(into: Tensor, left: Tensor, right: Tensor, scale: float, *, in_place: bool = True) -> Tensor:
    """`into + scale * left @ right`, computed in place where that is correct and fast.

    In training it makes a new tensor, since writing into a view costs autograd a copy of the whole gradient; under
    `torch.compile` and `torch.export` too, which cannot undo the write; and under autocast, which gives the result its
    own dtype. A graph calls it as one node.

    Args:
        into: `[n, m]`, or `[k, n, m]`; overwritten where no gradient is recorded.
        left: `[n, r]`, or `[k, n, r]`.
        right: `[r, m]`, or `[k, r, m]`.
        scale: Factor of the product.
        in_place: False never overwrites, for an `into` with other readers.
    """
    operands = (into, left, right)
    if has_torch_function(operands):  # so that running on the proxies of a graph makes a node of the call
        options: dict[str, Any] = {} if in_place else {"in_place": False}
        result: Tensor = handle_torch_function(accumulate, operands, *operands, scale, **options)
        return result
    batched = into.ndim == 3
    records = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in operands)
    if in_place and not records and into.dtype == left.dtype == right.dtype and not torch.compiler.is_compiling():
        return into.baddbmm_(left, right, alpha=scale) if batched else into.addmm_(left, right, alpha=scale)
    return (torch.baddbmm if batched else torch.addmm)(into, left, right, alpha=scale)

"""`gralora::drop_path`: stochastic depth, samples whose residual branch is dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from gralora_fx.operators.call import Call
from gralora_fx.operators.namespace import define


def drop_path(x: Tensor, p: float, train: bool) -> Tensor:
    """Zero samples at random in training and scale the others, as transformers' models do.

    From "Deep Networks with Stochastic Depth", https://arxiv.org/abs/1603.09382; a generator in the same state gives
    transformers' draws.

    Args:
        x: `[batch, ...]`, the output of a residual branch.
        p: Probability of dropping a sample, in `[0, 1)`.
        train: Whether to drop; otherwise `x` itself is returned.

    Returns:
        As `x`.
    """
    if not train or p == 0.0:
        return x
    survives = torch.floor(torch.rand((x.shape[0],) + (1,) * (x.ndim - 1), dtype=x.dtype, device=x.device) + (1 - p))
    return x.div(1 - p) * survives


@dataclass(frozen=True)
class DropPath(Call):
    """A call of `gralora::drop_path`; `drop_path` describes the arguments."""

    target: ClassVar[Any] = define(
        "drop_path(Tensor x, float p, bool train) -> Tensor", drop_path, tags=(torch.Tag.nondeterministic_seeded,)
    )

    x: fx.Node
    p: float
    train: bool

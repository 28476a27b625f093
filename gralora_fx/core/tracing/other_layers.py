"""Replacements for layers of many models in a trace: stochastic depth, and TensorFlow's padding by arithmetic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gralora_fx.core.operators.layers import DropPath


def drop_path(module: Any, hidden_states: Tensor) -> Tensor:
    """Apply stochastic depth, which `train()` and `eval()` switch in the graph like any dropout."""
    return DropPath.compute(x=hidden_states, p=module.drop_prob, train=module.training)


def same_padding(features: Tensor, conv_layer: nn.Conv2d) -> Tensor:
    """Pad features as TensorFlow does, by arithmetic on sizes instead of MobileNet's branches."""
    amounts: list[Any] = []
    for axis in (1, 0):  # the last axis first
        size, stride, kernel = features.shape[2 + axis], conv_layer.stride[axis], conv_layer.kernel_size[axis]
        total: Any = kernel - stride
        if stride > 1:  # else every layer would add a term that is always zero
            total = total + (size + stride - 1) // stride * stride - size
        if kernel < stride:
            total = torch.sym_max(total, 0)  # type: ignore[no-untyped-call]
        before = total // 2
        dilation = conv_layer.dilation[axis]
        amounts += [before * dilation, (total - before) * dilation]
    return nn.functional.pad(features, amounts, "constant", 0.0)

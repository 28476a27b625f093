"""TensorFlow's padding of convolutions, by arithmetic on sizes where transformers' MobileNets branch on them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from gralora_fx.tracing.patches.llama_functions import same_code

_NAME = "apply_tf_padding"


@contextmanager
def same_padding_by_arithmetic(model: nn.Module) -> Iterator[None]:
    """Let a model with transformers' `apply_tf_padding` compute the same padding for any size, within the block.

    Args:
        model: The model; its Python modules are restored when the block ends.
    """
    with ExitStack() as changed:
        for name in sorted({type(module).__module__ for module in model.modules()}):
            if name in sys.modules and pads_like_tensorflow(sys.modules[name]):
                changed.enter_context(patch.object(sys.modules[name], _NAME, _pad))
        yield


def pads_like_tensorflow(module: Any) -> bool:
    """Whether a Python module has transformers' `apply_tf_padding`."""
    if not hasattr(module, _NAME):
        return False
    from transformers.models.mobilenet_v1 import modeling_mobilenet_v1  # which few models need
    from transformers.models.mobilenet_v2 import modeling_mobilenet_v2

    known = (modeling_mobilenet_v1, modeling_mobilenet_v2)  # the first without dilations, as all of its are one
    return any(same_code(getattr(module, _NAME), getattr(owner, _NAME)) for owner in known)


def _pad(features: Tensor, conv_layer: nn.Conv2d) -> Tensor:
    """Zeros around features so that a convolution gives `ceil(size / stride)` values on an axis."""
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

"""What a trace cannot record of a model, in a form that it can: checkpoints, inference mode, loops, branches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils import checkpoint
from transformers import PreTrainedModel

from gralora_fx.operators.layers import DropPath
from gralora_fx.tracing.patches.recognised import Recognised

_LOOP = "eager"
_PRODUCTS = "grouped_mm"  # transformers' own default for most models


@contextmanager
def traceable_modes() -> Iterator[list[str]]:
    """Within the block, checkpoints call their function directly, and inference mode only turns gradients off.

    A trace would record a reentrant checkpoint as a forward without gradients, and inference mode not at all.

    Yields:
        A list to which each use of a checkpoint adds the name of its function.
    """
    used: list[str] = []
    around = checkpoint._checkpoint_without_reentrant_generator

    def note(function: Any) -> None:
        used.append(getattr(function, "__qualname__", type(function).__qualname__))

    class Direct:
        """Calls a function directly, in place of `CheckpointFunction`."""

        @staticmethod
        def apply(function: Any, preserve_rng_state: bool, *args: Any) -> Any:
            note(function)
            return function(*args)

    def noted(function: Any, *args: Any, **kwargs: Any) -> Any:
        note(function)
        return around(function, *args, **kwargs)

    def enter(mode: Any) -> None:
        mode._inference_mode_context = torch.is_grad_enabled()
        torch.set_grad_enabled(not mode.mode)

    def leave(mode: Any, *_: object) -> None:
        torch.set_grad_enabled(mode._inference_mode_context)

    inference = patch.multiple(torch.inference_mode, __enter__=enter, __exit__=leave)
    direct = patch.multiple(checkpoint, CheckpointFunction=Direct, _checkpoint_without_reentrant_generator=noted)
    with direct, inference:
        yield used


@contextmanager
def experts_as_products(model: nn.Module) -> Iterator[None]:
    """Let a model whose experts run in a loop compute them by grouped products, within the block.

    The loop runs over the experts that some token uses, which a graph cannot know. transformers has both forms of every
    mixture of experts that it calls through its interface, and some models choose the loop.

    Args:
        model: The model; its form of experts is restored when the block ends.
    """
    with ExitStack() as changed:
        for part in model.modules():
            if isinstance(part, PreTrainedModel) and _loops(part):
                part.set_experts_implementation(_PRODUCTS)
                changed.callback(part.set_experts_implementation, _LOOP)
        yield


def _loops(model: PreTrainedModel) -> bool:
    """Whether a model's experts run in a loop, and may be computed otherwise."""
    return bool(model._can_set_experts_implementation()) and model.get_experts_implementation()[""] == _LOOP


def _drop(module: Any, hidden_states: Tensor) -> Tensor:
    """Stochastic depth, which `train()` and `eval()` switch in the graph like any dropout."""
    return DropPath.compute(x=hidden_states, p=module.drop_prob, train=module.training)


def _pad(features: Tensor, conv_layer: nn.Conv2d) -> Tensor:
    """TensorFlow's padding, by arithmetic on sizes where MobileNets branch on them.

    Zeros around features so that a convolution gives `ceil(size / stride)` values on an axis.
    """
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


DROP_PATH = Recognised(
    "swin.modeling_swin:SwinDropPath.forward",
    _drop,
    ending="DropPath",
    fits=lambda module: isinstance(module.drop_prob, float),
)
SAME_PADDING = (
    Recognised("mobilenet_v1.modeling_mobilenet_v1:apply_tf_padding", _pad),  # without dilations: all of its are one
    Recognised("mobilenet_v2.modeling_mobilenet_v2:apply_tf_padding", _pad),
)
IN_EVERY_MODEL = (DROP_PATH, *SAME_PADDING)

"""Normalisation and rotary embedding as one operator each in a trace, where a model has the code that most have.

Models of transformers copy these functions from each other word for word. One whose code is the same computes the same,
so an operator can stand for it: the graph shows what is meant, and to trace it takes half the time.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import CodeType, FunctionType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from gralora_fx.operators.namespace import NAMESPACE, define_shape_only, operators_for

_library: Any = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
_RMS_NORM = "rms_norm(Tensor x, Tensor? weight, float eps) -> Tensor"
_ROTATE = "rotate(Tensor x, Tensor cos, Tensor sin, int axis) -> Tensor"
_library.define(_RMS_NORM)
_library.define(_ROTATE)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """`x / sqrt(mean(x ** 2) + eps) * weight` over the last axis, as Llama computes it.

    Args:
        x: `[..., size]`.
        weight: `[size]`, or None for one of ones.
        eps: What is added to the mean.

    Returns:
        As `x`; the norm is computed in float32.
    """
    wide = x.to(torch.float32) if x.dtype != torch.float64 else x
    result = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    return result if weight is None else weight * result


def rms_norm_shape(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """A tensor of the shape and dtype of such a norm, without values."""
    return torch.empty_like(x, dtype=x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype))


def rotate(x: Tensor, cos: Tensor, sin: Tensor, axis: int) -> Tensor:
    """Turn the halves of the last axis against each other, as Llama does with queries and keys.

    Args:
        x: `[batch, heads, length, size]`, or with heads behind the length.
        cos: `[batch, length, size]`.
        sin: As `cos`.
        axis: Where the axis of heads is.

    Returns:
        As `x`.
    """
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return x * cos.unsqueeze(axis) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(axis)


def rotate_shape(x: Tensor, cos: Tensor, sin: Tensor, axis: int) -> Tensor:
    """A tensor of the shape of `rotate`'s result, without values."""
    return torch.empty_like(x)


_library.impl("rms_norm", rms_norm, "CompositeImplicitAutograd")
_library.impl("rotate", rotate, "CompositeImplicitAutograd")
define_shape_only(_RMS_NORM, rms_norm_shape, torch.ops.gralora.rms_norm.default)
define_shape_only(_ROTATE, rotate_shape, torch.ops.gralora.rotate.default)


@contextmanager
def known_as_operators(model: nn.Module) -> Iterator[None]:
    """Let a model call the operators in place of functions with the code of Llama's while the block lasts.

    Args:
        model: The model; its classes and modules are as before when the block ends.
    """
    with ExitStack() as changed:
        for module in model.modules():
            if same_code(type(module).forward, modeling_llama.LlamaRMSNorm.forward) and "forward" not in vars(module):
                changed.enter_context(patch.object(module, "forward", functools.partial(_norm, module)))
        for name in sorted({type(module).__module__ for module in model.modules()}):
            held = vars(sys.modules[name])
            if all(same_code(held.get(known.__name__), known) for known in _ROTARY):
                changed.enter_context(patch.object(sys.modules[name], "apply_rotary_pos_emb", _rotate_both))
        yield


_ROTARY: tuple[FunctionType, ...] = (modeling_llama.apply_rotary_pos_emb, modeling_llama.rotate_half)


def _norm(module: Any, hidden_states: Tensor) -> Tensor:
    result: Tensor = operators_for(hidden_states).rms_norm(hidden_states, module.weight, module.variance_epsilon)
    return result


def _rotate_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    turned: list[Tensor] = [operators_for(x).rotate(x, cos, sin, unsqueeze_dim) for x in (q, k)]
    return turned[0], turned[1]


def same_code(one: Any, other: Callable[..., Any]) -> bool:
    """Whether two functions have the same instructions over the same names, constants and defaults."""
    if not isinstance(one, FunctionType) or not isinstance(other, FunctionType):
        return False
    return _meaning(one.__code__) == _meaning(other.__code__) and one.__defaults__ == other.__defaults__


def _meaning(code: CodeType) -> tuple[Any, ...]:
    """What a function's code says, without where it stands and its docstring."""
    constants = [constant for constant in code.co_consts if not isinstance(constant, str)]
    return code.co_code, code.co_names, code.co_varnames, constants, code.co_freevars

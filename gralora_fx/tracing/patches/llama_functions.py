"""RMS norm and rotary embedding as one operator each in a trace, if a model has Llama's code for them.

transformers' models copy these functions from each other verbatim. A function with the same code computes the same, so
an operator can replace it: the graph is easier to match, and tracing takes half the time.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import CodeType, FunctionType, ModuleType
from typing import Any
from unittest.mock import patch

from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from gralora_fx.operators.layers import RmsNorm, Rotate


@contextmanager
def llama_functions_as_operators(model: nn.Module) -> Iterator[None]:
    """Let a model call the operators in place of functions with Llama's code, within the block.

    Args:
        model: The model; its classes and modules are restored when the block ends.
    """
    with ExitStack() as changed:
        for module in model.modules():
            if is_rms_norm(type(module)) and "forward" not in vars(module):
                changed.enter_context(patch.object(module, "forward", functools.partial(_norm, module)))
        for name in sorted({type(module).__module__ for module in model.modules()}):
            if has_rotary_embedding(sys.modules[name]):
                changed.enter_context(patch.object(sys.modules[name], "apply_rotary_pos_emb", _rotate_both))
        yield


def is_rms_norm(kind: type[nn.Module]) -> bool:
    """Whether a class of modules normalises by the code that Llama's has."""
    return same_code(kind.forward, modeling_llama.LlamaRMSNorm.forward)


def has_rotary_embedding(module: ModuleType) -> bool:
    """Whether a Python module turns queries and keys by the code that Llama's has."""
    known = (modeling_llama.apply_rotary_pos_emb, modeling_llama.rotate_half)
    return all(same_code(getattr(module, function.__name__, None), function) for function in known)


def _norm(module: Any, hidden_states: Tensor) -> Tensor:
    return RmsNorm.compute(x=hidden_states, weight=module.weight, eps=module.variance_epsilon)


def _rotate_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    query, key = (Rotate.compute(x=x, cos=cos, sin=sin, axis=unsqueeze_dim) for x in (q, k))
    return query, key


def same_code(one: Any, other: Callable[..., Any]) -> bool:
    """Whether two functions have the same instructions over the same names, constants and defaults."""
    if not isinstance(one, FunctionType) or not isinstance(other, FunctionType):
        return False
    return _meaning(one.__code__) == _meaning(other.__code__) and one.__defaults__ == other.__defaults__


def _meaning(code: CodeType) -> tuple[Any, ...]:
    """A function's code without its location and docstring."""
    constants = [constant for constant in code.co_consts if not isinstance(constant, str)]
    return code.co_code, code.co_names, code.co_varnames, constants, code.co_freevars

"""Code of models that a trace recognises, and replaces by operators or by a form that can be traced.

transformers' models copy functions from each other verbatim. A function with the same code computes the same, so one
replacement serves all of them: the graph is easier to match, and tracing takes half the time. A trace is compared with
the model afterwards, so that a replacement which is no longer right is found.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import CodeType, FunctionType, ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from gralora_fx.operators.layers import DropPath, RmsNorm, Rotate

_MODELS = "transformers.models"


@dataclass(frozen=True)
class Recognised:
    """Code of one model, which others may have copied, and what replaces it.

    Attributes:
        place: A method or a function by its path below `transformers.models`, as in
            `"llama.modeling_llama:LlamaRMSNorm.forward"`. It is imported once a model has code of that name.
        replacement: Takes the same arguments and gives the same results; a method's takes the module first.
        ending: How the names of the classes end whose method may be it.
        beside: Functions that a Python module must have of the same code too, since the function calls them.
        fits: Whether a module with the method is one that the replacement is for.
    """

    place: str
    replacement: Callable[..., Any]
    ending: str = ""
    beside: tuple[str, ...] = ()
    fits: Callable[[Any], bool] = lambda _: True

    @property
    def path(self) -> list[str]:
        """The function's name, after that of its class if it has one."""
        return self.place.partition(":")[2].split(".")

    def is_method_of(self, kind: type[nn.Module]) -> bool:
        """Whether a class has the method."""
        name = self.path[-1]
        is_one = len(self.path) == 2 and kind.__name__.endswith(self.ending)
        return is_one and same_code(getattr(kind, name, None), getattr(getattr(self._module(), self.path[0]), name))

    def is_function_of(self, module: ModuleType) -> bool:
        """Whether a Python module has the function, and those beside it."""
        names = (*self.path, *self.beside)
        has_names = len(self.path) == 1 and all(hasattr(module, name) for name in names)
        return has_names and all(same_code(getattr(module, name), getattr(self._module(), name)) for name in names)

    def replaces_in(self, module: nn.Module) -> bool:
        """Whether a module has the method, and is one that the replacement is for."""
        return self.path[-1] not in vars(module) and self.is_method_of(type(module)) and self.fits(module)

    def replaced_in(self, model: nn.Module, changed: ExitStack) -> None:
        """Replace it wherever a model has it, until the stack is closed."""
        name = self.path[-1]
        for module in model.modules():
            if self.replaces_in(module):
                changed.enter_context(patch.object(module, name, functools.partial(self.replacement, module)))
        for owner in sorted({type(module).__module__ for module in model.modules()} & sys.modules.keys()):
            if self.is_function_of(sys.modules[owner]):
                changed.enter_context(patch.object(sys.modules[owner], name, self.replacement))

    def _module(self) -> ModuleType:
        return importlib.import_module(f"{_MODELS}.{self.place.partition(':')[0]}")


def same_code(one: Any, other: Callable[..., Any]) -> bool:
    """Whether two functions have the same instructions over the same names, constants and defaults."""
    if not isinstance(one, FunctionType) or not isinstance(other, FunctionType):
        return False
    return _meaning(one.__code__) == _meaning(other.__code__) and one.__defaults__ == other.__defaults__


def _meaning(code: CodeType) -> tuple[Any, ...]:
    """A function's code without its location and docstring."""
    constants = [constant for constant in code.co_consts if not isinstance(constant, str)]
    return code.co_code, code.co_names, code.co_varnames, constants, code.co_freevars


@contextmanager
def replaced(model: nn.Module, table: Sequence[Recognised]) -> Iterator[None]:
    """Let a model call what replaces recognised code, within the block.

    Args:
        model: The model; its modules and Python modules are restored when the block ends.
        table: What to replace.
    """
    with ExitStack() as changed:
        for code in table:
            code.replaced_in(model, changed)
        yield


def _norm(module: Any, hidden_states: Tensor) -> Tensor:
    return RmsNorm.compute(x=hidden_states, weight=module.weight, eps=module.variance_epsilon)


def _rotate_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    query, key = (Rotate.compute(x=x, cos=cos, sin=sin, axis=unsqueeze_dim) for x in (q, k))
    return query, key


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


RMS_NORM = Recognised("llama.modeling_llama:LlamaRMSNorm.forward", _norm)
ROTARY_EMBEDDING = Recognised("llama.modeling_llama:apply_rotary_pos_emb", _rotate_both, beside=("rotate_half",))
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
IN_DECODERS = (RMS_NORM, ROTARY_EMBEDDING)  # with a cache

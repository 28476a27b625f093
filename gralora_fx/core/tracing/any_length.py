"""Layers that a trace would hold to one length: recurrent ones (`nn.LSTM`, `nn.GRU`, `nn.RNN`) and `nn.MaxPool1d`.

On tensors without values PyTorch runs recurrent layers step by step, so only their shapes are computed, and each is one
node. It reads the length as a number in `max_pool1d`, but not in `max_pool2d`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d
from torch.overrides import TorchFunctionMode

from gralora_fx.base.compat.torch_graphs import schema_of
from gralora_fx.core.operators.call import define_shape_only, operator_for
from gralora_fx.core.tracing.check import RECURRENT
from gralora_fx.errors import TraceError


def _shapes(x: Tensor, hx: Any, *rest: Any) -> tuple[Tensor, ...]:
    """Return empty tensors like a layer's output and its last states."""
    states, bidirectional = [hx] if isinstance(hx, Tensor) else hx, rest[5]
    output = x.new_empty((*x.shape[:2], states[0].shape[-1] * (1 + bidirectional)))
    return output, *(torch.empty_like(state) for state in states)


for _operator in RECURRENT.values():
    define_shape_only(str(schema_of(_operator)).removeprefix("aten::").replace(".input", "", 1), _shapes, _operator)


class AnyLength(TorchFunctionMode):
    """Lets calls of these layers on tensors without values leave the length open, in this thread."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of PyTorch; recurrent layers without values return the shapes."""
        name, kwargs = getattr(func, "__name__", "").removesuffix(".input"), kwargs or {}
        if name == "max_pool1d" and not (kwargs.get("return_indices") or any(args[6:])):
            return _max_pool(*args, **kwargs)
        operator = RECURRENT.get(name)
        if name == "_pack_padded_sequence" or (operator is not None and not isinstance(args[3], bool)):
            raise TraceError(
                "packed sequences depend on the values of the lengths, which a graph does not have; give the layer "
                "padded sequences, and choose each row's last state with gather"
            )
        return (func if operator is None else operator_for(operator, args[0]))(*args, **kwargs)


def _max_pool(
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    *_: bool,
    **__: bool,
) -> Tensor:
    given = (kernel_size, stride or kernel_size, padding, dilation)
    size, stride, padding, dilation = (each[0] if isinstance(each, (tuple, list)) else each for each in given)
    pooled = max_pool2d(x.unsqueeze(-2), (1, size), (1, stride), (0, padding), (1, dilation), ceil_mode)
    return pooled.squeeze(-2)

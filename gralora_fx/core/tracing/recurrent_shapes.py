"""Recurrent layers (`nn.LSTM`, `nn.GRU`, `nn.RNN`) as one node each in a trace, for sequences of any length.

On tensors without values PyTorch runs them step by step, which fixes the length. Here only the shapes are computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
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


class RecurrentShapes(TorchFunctionMode):
    """Lets calls of recurrent layers on tensors without values compute the shapes alone, in this thread."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of PyTorch; recurrent layers without values return the shapes."""
        operator = RECURRENT.get(name := getattr(func, "__name__", ""))
        if name == "_pack_padded_sequence" or (operator is not None and not isinstance(args[3], bool)):
            raise TraceError(
                "packed sequences depend on the values of the lengths, which a graph does not have; give the layer "
                "padded sequences, and choose each row's last state with gather"
            )
        return (func if operator is None else operator_for(operator, args[0]))(*args, **(kwargs or {}))

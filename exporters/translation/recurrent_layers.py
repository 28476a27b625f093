"""Translation of recurrent layers to ONNX's `LSTM`, `GRU` and `RNN`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset20 as op

from gralora_fx.errors import ExportError

# order of ONNX's gates in PyTorch's weights: i, o, f, c of i, f, c, o; and z, r, h of r, z, n
_GATES: dict[str, tuple[int, ...]] = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}


def _translation(op_type: str, activation: str | None = None, **attributes: Any) -> Callable[..., Any]:
    """Return the translation of a layer, which becomes one node for each of its levels."""

    def translation(
        x: Any,
        hx: Any,
        params: Sequence[Any],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> Any:
        count, width = 1 + bidirectional, 4 if has_biases else 2
        if len(params) != num_layers * count * width:
            raise ExportError("ONNX has no LSTM with projections (proj_size); project its output by a linear layer")
        named = {**attributes, "hidden_size": params[1].shape[1]}
        named |= {"direction": "bidirectional" if bidirectional else "forward"}
        named |= {"activations": [activation] * count} if activation else {}
        dtype, hx = x.dtype, list(hx) if op_type == "LSTM" else [hx]
        if dtype != ir.DataType.FLOAT:  # ONNX Runtime's CPU has no kernel, and crashes as it inserts the casts
            x, *wide = (op.Cast(value, to=ir.DataType.FLOAT) for value in (x, *hx, *params))
            hx, params = wide[: len(hx)], wide[len(hx) :]
        x = op.Transpose(x, perm=[1, 0, 2]) if batch_first else x
        states = [op.Split(state, axis=0, num_outputs=num_layers) if num_layers > 1 else [state] for state in hx]
        lasts = []
        for level in range(num_layers):
            own = [params[at * width : (at + 1) * width] for at in range(level * count, (level + 1) * count)]
            own = [[_ordered(weight, _GATES[op_type]) for weight in each] for each in own]
            biases = [op.Concat(*each[2:], axis=0) for each in own] if has_biases else None
            weights = [
                None if parts is None else _stacked(parts) for parts in (*list(zip(*own, strict=True))[:2], biases)
            ]
            y, *last = getattr(op, op_type)(x, *weights, None, *(state[level] for state in states), **named)
            x = op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1]))
            lasts.append(last)
        x = op.Transpose(x, perm=[1, 0, 2]) if batch_first else x
        results = [x, *(op.Concat(*levels, axis=0) for levels in zip(*lasts, strict=True))]
        return tuple(x if dtype == ir.DataType.FLOAT else op.Cast(x, to=dtype) for x in results)

    return translation


def _ordered(weight: Any, gates: tuple[int, ...]) -> Any:
    """Return the rows of a weight, or a bias, in the order of ONNX's gates."""
    parts = op.Split(weight, axis=0, num_outputs=len(gates)) if len(gates) > 1 else [weight]
    return op.Concat(*(parts[gate] for gate in gates), axis=0)


def _stacked(parts: Sequence[Any]) -> Any:
    """Return tensors stacked along a new first axis."""
    return op.Concat(*(op.Unsqueeze(part, op.Constant(value_ints=[0])) for part in parts), axis=0)


_aten = torch.ops.aten
TRANSLATIONS: dict[Any, Callable[..., Any]] = {
    _aten.lstm.input: _translation("LSTM"),
    _aten.gru.input: _translation("GRU", linear_before_reset=1),
    _aten.rnn_tanh.input: _translation("RNN"),
    _aten.rnn_relu.input: _translation("RNN", activation="Relu"),
}

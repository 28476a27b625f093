"""Operators that a graph is put in terms of before it is translated: larger than PyTorch's, named as the runtime's.

Each becomes one node of the domain `gralora`, which a later pass replaces by what ONNX Runtime has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

import gralora_fx.tracing.patches.attention
import gralora_fx.tracing.patches.llama_functions
import gralora_fx.tracing.patches.stochastic_depth  # noqa: F401  # all define operators
from gralora_fx.compat.torch_onnx import current_builder

DOMAIN = "gralora"

_library: Any = torch.library.Library(DOMAIN, "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("rotary(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor")
_library.define("reshape(Tensor x, int[] shape) -> Tensor")
_library.define("slice(Tensor x, int axis, int start, int stop, int step) -> Tensor")


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turn pairs of the last axis by an angle a position.

    Args:
        x: `[batch, heads, length, size]`.
        cos: `[batch, length, half]`; the first 2 * half of `size` are turned.
        sin: As `cos`.
        interleaved: Whether a pair are neighbours, or a member of the first half and one of the second.

    Returns:
        As `x`.
    """
    size = 2 * cos.shape[-1]
    cos, sin, turned, rest = cos.unsqueeze(1), sin.unsqueeze(1), x[..., :size], x[..., size:]
    if interleaved:
        first, second = turned[..., ::2], turned[..., 1::2]
        turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([turned, rest], dim=-1)


def reshape(x: Tensor, shape: list[int]) -> Tensor:
    """Reshape, 0 for a size that stays as it is."""
    return x.reshape([x.shape[axis] if size == 0 else size for axis, size in enumerate(shape)])


def slice_axis(x: Tensor, axis: int, start: int, stop: int, step: int) -> Tensor:
    """`x[..., start:stop:step]` along an axis."""
    return torch.ops.aten.slice.Tensor(x, axis, start, stop, step)  # type: ignore[no-any-return]


_FUNCTIONS = {"rotary": rotary, "reshape": reshape, "slice": slice_axis}
for _name, _function in _FUNCTIONS.items():
    _library.impl(_name, _function, "CompositeImplicitAutograd")

RMS_NORM = torch.ops.gralora.rms_norm.default
ROTATE = torch.ops.gralora.rotate.default
ROTARY = torch.ops.gralora.rotary.default
RESHAPE = torch.ops.gralora.reshape.default
SLICE = torch.ops.gralora.slice.default
ATTENTION = torch.ops.gralora.attention.default
MASK = torch.ops.gralora.mask.default
DROP_PATH = torch.ops.gralora.drop_path.default


def _rms_norm(x: Any, weight: Any, eps: float) -> Any:
    """`gralora.RMSNormalization(x, weight)` with `epsilon`: over the last axis; no weight is a weight of ones."""
    return _node(DOMAIN, "RMSNormalization", [x, weight], {"epsilon": eps})


def _rotary(x: Any, cos: Any, sin: Any, interleaved: bool) -> Any:
    """`gralora.RotaryEmbedding(x, cos, sin)` with `interleaved`.

    `x` is `[batch, heads, length, size]`, `cos` and `sin` are `[batch, length, half]`: the first 2 * half of `size` are
    turned, in pairs of neighbours where interleaved, else of the first half with the second.
    """
    return _node(DOMAIN, "RotaryEmbedding", [x, cos, sin], {"interleaved": int(interleaved)})


def _reshape(x: Any, shape: list[int]) -> Any:
    """ONNX `Reshape` to a constant shape, 0 for a size that stays as it is."""
    sizes = _node("", "Constant", [], {"value_ints": list(shape)})
    return _node("", "Reshape", [x, sizes], {})


def _slice(x: Any, axis: int, start: int, stop: int, step: int) -> Any:
    """ONNX `Slice` with constant limits."""
    limits = [_node("", "Constant", [], {"value_ints": [number]}) for number in (start, stop, axis, step)]
    return _node("", "Slice", [x, *limits], {})


def _attention(
    query: Any, key: Any, value: Any, mask: Any, sinks: Any, scale: float, window: int, softcap: float, dropout: float
) -> Any:
    """`gralora.Attention(query, key, value, mask, sinks)` with attributes `scale`, `window`, `softcap`."""
    attributes = {"scale": scale, "window": window, "softcap": softcap}
    return _node(DOMAIN, "Attention", [query, key, value, mask, sinks], attributes)


def _mask(padding: Any, length: Any, window: int, dtype: int) -> Any:
    """`gralora.Mask(padding, length)` with attributes `window` and `dtype`."""
    if isinstance(length, int):
        length = _node("", "Constant", [], {"value_int": length})
    return _node(DOMAIN, "Mask", [padding, length], {"window": window, "dtype": dtype})


def _node(domain: str, op_type: str, inputs: list[Any], attributes: dict[str, Any]) -> ir.Value:
    version = None if domain == "" else 1
    made = ir.Node(
        domain, op_type, inputs, ir.convenience.convert_attributes(attributes), num_outputs=1, version=version
    )
    tracer: Any = current_builder()
    tracer.nodes.append(made)
    return made.outputs[0]


TRANSLATIONS: dict[Any, Callable[..., Any]] = {
    RMS_NORM: _rms_norm,
    ROTARY: _rotary,
    RESHAPE: _reshape,
    SLICE: _slice,
    ATTENTION: _attention,
    MASK: _mask,
}

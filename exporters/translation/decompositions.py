"""Decompositions of operators for any size, where PyTorch's own, or its translation to ONNX, fix those of the example.

Arguments and results are those of the operators of PyTorch that `DECOMPOSITIONS` names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import linear

_aten = torch.ops.aten


def _tensor_split(x: Tensor, sections: int, dim: int = 0) -> list[Tensor]:
    size = x.shape[dim]
    ends = [size // sections * part + torch.sym_min(part, size % sections) for part in range(sections + 1)]  # type: ignore[no-untyped-call]
    return [_aten.slice(x, dim, start, end) for start, end in pairwise(ends)]


def _roll(x: Tensor, shifts: Sequence[Any], dims: Sequence[int] = ()) -> Tensor:
    if not dims:
        return _roll(x.reshape(-1), shifts, [0]).reshape(x.shape)
    for shift, dim in zip(shifts, dims, strict=True):
        start = x.shape[dim] - shift % x.shape[dim]
        x = torch.cat([_aten.slice(x, dim, start), _aten.slice(x, dim, 0, start)], dim)
    return x


def _windows(size: Any, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return which of `size` values each of `count` results reads `[count, size]`, and how many `[count, 1]`."""
    first = torch.arange(count, device=device).unsqueeze(-1)
    start = torch.div(first * size, count, rounding_mode="floor")
    end = torch.div((first + 1) * size + (count - 1), count, rounding_mode="floor")
    place = torch.arange(size, device=device)
    return (place >= start) & (place < end), end - start


def _adaptive_average(x: Tensor, output_size: Sequence[Any]) -> Tensor:
    axes = range(-len(output_size), 0)
    if all(count == 1 for count in output_size):
        return x.mean([*axes], keepdim=True)
    for axis, count in zip(axes, output_size, strict=True):
        seen, counted = _windows(x.shape[axis], count, x.device)
        shares = seen.to(x.dtype) / counted.to(x.dtype)
        x = (x.transpose(axis, -1) @ shares.transpose(0, 1)).transpose(axis, -1)
    return x


def _adaptive_maximum(x: Tensor, output_size: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
    indices = None
    for axis, count in zip(range(-len(output_size), 0), output_size, strict=True):
        seen, _ = _windows(x.shape[axis], count, x.device)
        hidden = torch.full((), torch.finfo(x.dtype).min, dtype=x.dtype, device=x.device)
        largest, indices = torch.where(seen, x.transpose(axis, -1).unsqueeze(-2), hidden).max(-1)
        x = largest.transpose(axis, -1)
    return x, indices if len(output_size) == 1 else None


def _masked_put(x: Tensor, masks: Sequence[Tensor], value: Tensor, accumulate: bool = False) -> Tensor:
    (mask,) = masks
    return torch.where(mask.reshape(*mask.shape, *[1] * (x.ndim - mask.ndim)), value.to(x.dtype), x)


def _linear_1d(x: Tensor, output_size: Any, align_corners: bool, scale_factors: Any) -> Tensor:
    if output_size is None and scale_factors[0] != int(scale_factors[0]):
        raise NotImplementedError("its scale is a fraction")
    size = x.shape[-1] * int(scale_factors[0]) if output_size is None else output_size[0]
    scale = None if scale_factors is None else scale_factors[0]
    return _aten.upsample_linear1d(x, [size], align_corners, scale)  # type: ignore[no-any-return]


def _gates(x: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None) -> Tensor:
    return linear(x, w_ih, b_ih) + linear(hx, w_hh, b_hh)


def _tanh_cell(*args: Any) -> Tensor:
    return _gates(*args).tanh()


def _relu_cell(*args: Any) -> Tensor:
    return _gates(*args).relu()


def _lstm_cell(x: Tensor, hx: Sequence[Tensor], *weights: Any) -> tuple[Tensor, Tensor]:
    gates = _parts(_gates(x, hx[0], *weights), 4)
    state = gates[1].sigmoid() * hx[1] + gates[0].sigmoid() * gates[2].tanh()
    return gates[3].sigmoid() * state.tanh(), state


def _gru_cell(x: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None) -> Tensor:
    ours, last = _parts(linear(x, w_ih, b_ih), 3), _parts(linear(hx, w_hh, b_hh), 3)
    new = (ours[2] + (ours[0] + last[0]).sigmoid() * last[2]).tanh()
    return new + (ours[1] + last[1]).sigmoid() * (hx - new)


def _parts(x: Tensor, count: int) -> list[Tensor]:
    size = x.shape[-1] // count
    return [_aten.slice(x, -1, size * part, size * (part + 1)) for part in range(count)]


def _over_all(reduce: Callable[..., Tensor], x: Tensor, dim: Sequence[int] = (), keepdim: bool = False) -> Tensor:
    return reduce(x, [*dim] or [*range(x.ndim)], keepdim)


DECOMPOSITIONS: Mapping[Any, Callable[..., Any]] = {
    _aten.tensor_split.sections: _tensor_split,
    _aten.roll.default: _roll,
    _aten.adaptive_avg_pool1d.default: _adaptive_average,
    _aten.adaptive_avg_pool2d.default: _adaptive_average,
    _aten.adaptive_avg_pool3d.default: _adaptive_average,
    _aten.adaptive_max_pool1d.default: _adaptive_maximum,
    _aten.adaptive_max_pool2d.default: _adaptive_maximum,
    _aten.index_put.default: _masked_put,
    _aten.upsample_linear1d.vec: _linear_1d,
    _aten.lstm_cell.default: _lstm_cell,
    _aten.gru_cell.default: _gru_cell,
    _aten.rnn_tanh_cell.default: _tanh_cell,
    _aten.rnn_relu_cell.default: _relu_cell,
    _aten.amax.default: partial(_over_all, torch.amax),
    _aten.amin.default: partial(_over_all, torch.amin),
}


def is_decomposed(target: Any, args: Sequence[Any]) -> bool:
    """Return whether a call has a decomposition that ONNX needs: those of numbers known in the graph translate."""
    if target in (_aten.amax.default, _aten.amin.default):
        return len(args) < 2 or not args[1]
    if target is _aten.roll.default:
        return any(not isinstance(shift, int) for shift in args[1])
    if target is _aten.index_put.default:  # of one number where a mask is true
        mask, number = args[1][0], args[2].meta["val"]
        is_mask = len(args[1]) == 1 and isinstance(mask, fx.Node) and mask.meta["val"].dtype is torch.bool
        return is_mask and number.ndim == 0 and args[3:] in ((), (False,))
    return target in DECOMPOSITIONS

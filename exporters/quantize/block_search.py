"""Block quantization by search: scales and zero points of least error, and GPTQ's error compensation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gralora_fx.base.compat.torch_graphs import multiplies_bfloat16
from gralora_fx.exporters.formats import Blocks
from gralora_fx.exporters.quantize.block_arrays import BlockArrays

_TOGETHER, _FEWEST, _IN_CACHE = 2**23, 1024, 2**17  # values and fewest columns rounded at once; values searched at once
_PANEL, _PART = 128, 16  # inputs rounded between two products with all errors so far, and with those of their panel
_RANGES = (1.05, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # shares of a block's range, tried in a search
_TINY = 1e-30  # minimum width of a block's range
_FARTHEST = 8.0  # limit of a column's squared error relative to rounding to nearest, `scale^2 / 12`
_DAMPING = 0.3  # damping added to each input's mean square, as a share of the mean
_Result = TypeVar("_Result")


class InputWindow(NamedTuple):
    """Rounding of neighbouring inputs together."""

    order: Tensor  # their order, `[width]`: largest weight first, so that later inputs compensate their errors
    feedback: Tensor  # `[width, width]`, in that order: the share of an input's error (row) added to a later input


@dataclass(frozen=True, eq=False)
class InputProducts:
    """Mean products of neighbouring inputs, shared by layers with the same input; derived values are cached."""

    means: Tensor  # `[windows, width, width]`; windows are whole blocks, products beyond the last input zero

    @cached_property
    def squares(self) -> Tensor:
        """Weight of a squared error at each input, `[windows * width]`."""
        return self._damped.diagonal(dim1=1, dim2=2).flatten()

    @cached_property
    def windows(self) -> tuple[InputWindow, ...]:
        """Error feedback of each window: GPTQ without an inverse, as in QuIP (arXiv:2307.13304).

        With `products = U D U'`, `U` upper triangular with unit diagonal, `U[i, j]` of the error at `i` is added at
        `j`.
        """
        found = []
        for products in self._damped:
            order = products.diagonal().argsort(descending=True, stable=True)
            last_first = order.flip(0)
            factor = torch.linalg.cholesky(products[last_first][:, last_first]).flip(0, 1)
            found.append(InputWindow(order, factor.div_(factor.diagonal().clone())))
        return tuple(found)

    @cached_property
    def _damped(self) -> Tensor:
        mean = self.means.diagonal(dim1=1, dim2=2).mean().clamp(min=_TINY)
        return self.means + _DAMPING * torch.eye(self.means.shape[1]) * mean


def searched_blocks(matrix: NDArray[Any], form: Blocks, inputs: InputProducts | None) -> BlockArrays:
    """Return a matrix `[K, N]` as blocks with the best scales and zero points found.

    If products of inputs are known, later integers of a window compensate the errors of earlier ones: GPTQ
    (arXiv:2210.17323) with second moments of neighbouring inputs only. Few or very similar inputs would let weights
    drift that other inputs read: a column that would end far from the matrix is rounded as if nothing were known.
    """
    height, outputs = matrix.shape
    count = -(-height // form.block_size)
    weights = torch.ones(count * form.block_size) if inputs is None else inputs.squares
    windows, dtype = None if inputs is None else inputs.windows, scale_dtype(form, matrix.dtype)
    step = max(_FEWEST, min(-(-outputs // torch.get_num_threads()), _TOGETHER // len(weights)))
    source = torch.from_numpy(matrix if matrix.flags.writeable else matrix.copy())

    def rounded(start: int) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8]]:
        columns = source[:, start : start + step]
        values = torch.zeros(len(weights), columns.shape[1])
        values[:height] = columns
        found = _search(values, weights, windows, form, dtype)
        if inputs is not None:
            found = _without_drift(found, values, form, dtype)
        return found.stored(count, form.bits)

    parts = in_threads(rounded, range(0, outputs, step))
    integers, scales, zero_points = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return BlockArrays(integers, scales.astype(matrix.dtype), zero_points)


def in_threads(function: Callable[[int], _Result], starts: Sequence[int]) -> list[_Result]:
    """Call a function with each start, in as many threads as PyTorch uses, each with operators of one thread."""
    threads = torch.get_num_threads()
    if min(threads, len(starts)) < 2:
        return list(map(function, starts))
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(function, starts))
    finally:
        torch.set_num_threads(threads)


class _Found(NamedTuple):
    """Quantized columns of a matrix."""

    integers: Tensor  # `[inputs, N]`, uint8
    scales: Tensor  # `[blocks, N]`, as they are stored
    zeros: Tensor  # `[blocks, N]`
    errors: Tensor  # rounding errors, `[inputs, N]`

    def stored(self, count: int, bits: int) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8]]:
        """Return the arrays of the first `count` blocks, as in `BlockArrays`."""
        rows = self.integers.t().contiguous().numpy()
        integers = rows.reshape(len(rows), len(self.scales), -1)[:, :count]
        zeros = np.pad(self.zeros.t().numpy()[:, :count].astype(np.uint8), ((0, 0), (0, -count % (8 // bits))))
        return packed(integers, bits), np.ascontiguousarray(self.scales.t().numpy()[:, :count]), packed(zeros, bits)


def _without_drift(found: _Found, values: Tensor, form: Blocks, dtype: Any) -> _Found:
    """Replace columns that are far from their values by columns searched without knowledge of inputs."""
    usual = found.scales.square().sum(0) * (form.block_size / 12)
    is_far = torch.linalg.vector_norm(found.errors, dim=0).square() > _FARTHEST * usual
    if not is_far.any():
        return found
    plain = _search(values[:, is_far], torch.ones(len(values)), None, form, dtype)
    for part, other in zip(found, plain, strict=True):
        part[:, is_far] = other
    return found


def _search(values: Tensor, weights: Tensor, windows: Sequence[InputWindow] | None, form: Blocks, dtype: Any) -> _Found:
    """Round columns `[inputs, N]` of whole blocks; `weights` `[inputs]` are those of squared errors."""
    size, largest = form.block_size, float(2**form.bits - 1)
    blocks = values.reshape(-1, size, values.shape[1])
    step = max(1, _IN_CACHE // blocks[0].numel())
    parts = zip(torch.split(blocks, step), torch.split(weights.reshape(-1, size), step), strict=True)
    grids = [_grid(part, of_part, largest, dtype) for part, of_part in parts]
    scales, zeros = (torch.cat(tensors) for tensors in zip(*grids, strict=True))
    divisors = torch.where(scales > 0, scales, 1.0)
    if windows is None:
        whole = (blocks / divisors[:, None]).add_(zeros[:, None]).round_().clamp_(0, largest)
        errors = blocks - (whole - zeros[:, None]) * divisors[:, None]
        return _Found(whole.to(torch.uint8).reshape(values.shape), scales, zeros, errors.reshape(values.shape))
    integers, errors = torch.empty_like(values, dtype=torch.uint8), torch.empty_like(values)
    width = len(values) // len(windows)
    for index, window in enumerate(windows):
        begin = index * width
        part, own = slice(begin, begin + width), slice(begin // size, (begin + width) // size)
        integers[part], errors[part] = _made_up_for(values[part], window, divisors[own], zeros[own], largest)
    return _Found(integers, scales, zeros, errors)


def _made_up_for(
    values: Tensor, window: InputWindow, scales: Tensor, zeros: Tensor, largest: float
) -> tuple[Tensor, Tensor]:
    """Round a window `[inputs, N]` with error compensation; return integers and errors of the same shape.

    Scales, none of them zero, and zero points are `[blocks, N]`.
    """
    blocks = window.order // (len(values) // len(scales))
    integers, errors = torch.empty_like(values, dtype=torch.uint8), torch.empty_like(values)
    # rounded to eight bits where such products are faster: shares of errors, far smaller than a step
    known = torch.empty_like(errors, dtype=torch.bfloat16) if multiplies_bfloat16() else errors
    rows, of_blocks = errors.unbind(), list(zip(scales.unbind(), (1 / scales).unbind(), zeros.unbind(), strict=True))
    for begin in range(0, len(values), _PANEL):  # one product adds the errors of all inputs before a panel
        places, own = window.order[begin : begin + _PANEL], blocks[begin : begin + _PANEL]
        ordered, feedback = values[places], window.feedback[:, begin : begin + _PANEL].t().contiguous()
        wanted = ordered + feedback[:, :begin].to(known.dtype) @ known[:begin]
        ordered.addcmul_(scales[own], zeros[own])
        for place, (block, target, value) in enumerate(
            zip(own.tolist(), wanted.unbind(), ordered.unbind(), strict=True)
        ):
            index, (scale, step, zero) = begin + place, of_blocks[block]
            first = begin + place // _PART * _PART
            if begin < index == first:  # and another those of the panel before a part of it
                part = slice(place, place + _PART)
                wanted[part].addmm_(feedback[part, begin:index], errors[begin:index])
            target.addmv_(errors[first:index].t(), feedback[place, first:index])
            torch.addcmul(zero, target, step, out=target).round_().clamp_(0, largest)
            torch.addcmul(value, target, scale, value=-1, out=rows[index])
        known[begin : begin + _PANEL] = errors[begin : begin + _PANEL]
        integers[places] = wanted.to(torch.uint8)
    result = torch.empty_like(errors)
    result[window.order] = errors
    return integers, result


def _grid(blocks: Tensor, weights: Tensor, largest: float, dtype: Any) -> tuple[Tensor, Tensor]:
    """Return scales, as they are stored, and zero points `[blocks, N]` of least weighted error.

    Each of several ranges, a block's own and narrower ones, gives a zero point. The best scale for its integers is then
    a quotient, as in llama.cpp's k-quants: `sum w c b / sum w c^2` with `c = q - zero`; the error is `sum w b^2` less
    the numerator's square over the denominator. Blocks are `[blocks, size, N]`, weights `[blocks, size]`.
    """
    low, high = blocks.amin(1, keepdim=True).clamp_(max=0), blocks.amax(1, keepdim=True).clamp_(min=0)
    extent = (high - low).clamp_(min=_TINY)
    zeros = (-low * (largest / extent)).round_().clamp_(0, largest)
    least, most = -zeros, largest - zeros
    steps, weighted = blocks * (largest / extent), blocks * weights[..., None]
    best = scales = torch.zeros_like(extent)
    for factor in _RANGES:
        centred = (steps * (1 / factor)).round_().clamp_(least, most)
        numerator = (centred * weighted).sum(1, keepdim=True)
        denominator = torch.bmm(weights[:, None], centred.square_()).clamp_(min=_TINY)
        gain = numerator.square() / denominator
        scales = torch.where(gain > best, numerator / denominator, scales)
        best = torch.maximum(gain, best)
    stored = torch.from_numpy(scales[:, 0].numpy().astype(dtype).astype(np.float32))
    return stored, zeros[:, 0]


def scale_dtype(form: Blocks, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype in which the scales of a matrix's blocks are stored."""
    half = np.float16 if form.scale_dtype == "float16" else ml_dtypes.bfloat16
    return np.dtype(half) if form.scale_bits == 16 and dtype == np.float32 else dtype


def packed(integers: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Pack integers into bytes along the last axis; with 4 bits, the first of two is the low nibble."""
    if bits == 4:
        integers = integers[..., ::2] | (integers[..., 1::2] * np.uint8(16))
    return integers

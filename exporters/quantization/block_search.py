"""Blocks by search: scales and zero points of least error, and integers that make up for each other's errors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gralora_fx.exporters.quantization.formats import Blocks

_TOGETHER = 2**20  # values that are rounded at once
_RANGES = (1.05, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # of a block's values, tried in a search
_TINY = 1e-30  # the least width of a block
# What every input counts beside its own mean square, as a share of the mean of all: more where errors are made up for,
# since a thousand positions tell products of inputs less well than squares.
_LEAST, _DAMPING = 0.001, 0.3


class BlockArrays(NamedTuple):
    """The values of a quantized matrix.

    Attributes:
        packed: `[N, K/block, block * bits / 8]`, uint8.
        scales: `[N, K/block]`.
        zero_points: `[N, ceil(K/block * bits / 8)]`, uint8; None where all are half of the integers' range.
    """

    packed: NDArray[np.uint8]
    scales: NDArray[Any]
    zero_points: NDArray[np.uint8] | None


@dataclass(frozen=True, eq=False)
class InputProducts:
    """Mean products of neighbouring inputs, for layers that read the same: what follows of them is computed once.

    Attributes:
        means: `[windows, width, width]`. Windows are of whole blocks; products with inputs beyond the last are zero.
    """

    means: Tensor

    @cached_property
    def squares(self) -> Tensor:
        """What the square of an error at each input counts, `[windows * width]`."""
        return self._damped.diagonal(dim1=1, dim2=2).flatten()

    @cached_property
    def factors(self) -> Tensor:
        """Upper Cholesky factors of the inverses, with a diagonal of one: what an error adds to the later weights."""
        inverses = torch.cholesky_inverse(torch.linalg.cholesky(self._damped.double()))
        factors: Tensor = torch.linalg.cholesky(inverses, upper=True)
        return (factors / factors.diagonal(dim1=1, dim2=2)[..., None]).float()

    @property
    def _damped(self) -> Tensor:
        mean = self.means.diagonal(dim1=1, dim2=2).mean().clamp(min=_TINY)
        return self.means + _DAMPING * torch.eye(self.means.shape[1]) * mean


def searched_blocks(matrix: NDArray[Any], form: Blocks, inputs: InputProducts | Tensor | None) -> BlockArrays:
    """A matrix as blocks with the scales and zero points that a search finds best.

    Where products of inputs are known, an error of one integer is made up for by those after it in its window: the
    error of the products is least, not that of the weights. That is GPTQ (arXiv:2210.17323) with the second moments of
    neighbouring inputs alone, which take little memory and bring most of what all bring.

    Args:
        matrix: `[K, N]`, float32 or float16.
        form: How to quantize it.
        inputs: What is known of the inputs: mean products, in windows of whole blocks; mean squares alone, `[K]`, which
            say how much an error at each counts; or None for inputs that count alike.

    Returns:
        The blocks, scales in the matrix's dtype, rounded as they are stored.
    """
    size, (height, outputs) = form.block_size, matrix.shape
    count = -(-height // size)
    factors, width = None, size
    if isinstance(inputs, InputProducts):
        factors, weights, width = inputs.factors, inputs.squares, inputs.means.shape[1]
    else:
        squares = torch.ones(height) if inputs is None else inputs + _LEAST * inputs.mean().clamp(min=_TINY)
        weights = torch.nn.functional.pad(squares, (0, count * size - height))
    windows = len(weights) // width
    weights = weights.reshape(windows, -1, size).permute(1, 2, 0)[..., None]  # [blocks, size, windows, 1]
    parts = []
    step = max(1, _TOGETHER // (windows * width))
    for start in range(0, outputs, step):
        columns = matrix[:, start : start + step]
        values = np.zeros((windows * width, columns.shape[1]), np.float32)
        values[:height] = columns
        blocks = torch.from_numpy(values).reshape(windows, -1, size, columns.shape[1]).permute(1, 2, 0, 3).contiguous()
        whole, scale, zero = _search(blocks, weights, factors, form, scale_dtype(form, matrix.dtype))
        found = whole.to(torch.uint8), scale, zero.to(torch.uint8)  # a matrix of floats would take much memory
        parts.append(
            [part.permute(3, 2, 0, 1).reshape(len(part[0, 0, 0]), -1, part.shape[1])[:, :count] for part in found]
        )
    integers, scales, zeros = (torch.cat(tensors).numpy() for tensors in zip(*parts, strict=True))
    padded = np.pad(zeros[..., 0], ((0, 0), (0, -count % (8 // form.bits))))
    return BlockArrays(packed(integers, form.bits), scales[..., 0].astype(matrix.dtype), packed(padded, form.bits))


def _search(
    blocks: Tensor, weights: Tensor, factors: Tensor | None, form: Blocks, dtype: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Integers `[blocks, size, windows, N]`, and scales and zero points `[blocks, 1, windows, N]`.

    Args:
        blocks: The values, `[blocks, size, windows, N]`; they are changed.
        weights: What the squares of their errors count, `[blocks, size, windows, 1]`.
        factors: What an error adds to the values after it (see `InputProducts`); None for nothing.
        form: How they are stored.
        dtype: Dtype of the stored scales.
    """
    count, size = blocks.shape[:2]
    largest = 2**form.bits - 1
    integers = torch.empty_like(blocks)
    scales, zeros = torch.empty_like(blocks[:, :1]), torch.empty_like(blocks[:, :1])
    for index, block in enumerate(blocks):
        scale, zero = _parameters(block, weights[index], largest)
        scale = torch.from_numpy(scale.numpy().astype(dtype).astype(np.float32))  # as it is stored
        scales[index], zeros[index] = scale, zero
        scale = torch.where(scale > 0, scale, 1.0)
        if factors is None:
            integers[index] = (block / scale).add_(zero).round_().clamp_(0, largest)
            continue
        errors = torch.empty_like(block)
        begin = index * size
        own = factors[:, begin : begin + size]  # [windows, size, width]
        for place in range(size):
            rounded = (block[place] / scale[0]).add_(zero[0]).round_().clamp_(0, largest)
            integers[index, place] = rounded
            errors[place] = block[place] - (rounded - zero[0]) * scale[0]
            later = own[:, place, begin + place + 1 : begin + size].t()[..., None]
            block[place + 1 :].addcmul_(later, errors[place], value=-1)
        if index + 1 < count:
            rest = torch.einsum("swn,wsr->rwn", errors, own[:, :, begin + size :])
            blocks[index + 1 :] -= rest.reshape(count - index - 1, size, *rest.shape[1:])
    return integers, scales, zeros


def _parameters(block: Tensor, weights: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """The scale and the zero point `[1, ...]` of blocks `[size, ...]` for which the weighted error is least.

    Of several ranges, each as wide as the block's or narrower, a zero point follows. The scale for which the error of
    the integers is least is then a quotient, as in llama.cpp's k-quants: `sum w c b / sum w c^2` with `c = q - zero`,
    and the error is `sum w b^2` less the square of its numerator over its denominator.
    """
    low, high = block.amin(0, keepdim=True).clamp(max=0), block.amax(0, keepdim=True).clamp(min=0)
    extent = (high - low).clamp(min=_TINY)
    best = scales = zeros = torch.zeros_like(extent)
    for factor in _RANGES:
        step = extent * (factor / largest)
        zero = (-low * factor / step).round_().clamp_(0, largest)
        centred = (block / step).add_(zero).round_().clamp_(0, largest).sub_(zero)
        weighted = centred * weights
        numerator = (weighted * block).sum(0, keepdim=True)
        denominator = weighted.mul_(centred).sum(0, keepdim=True).clamp_(min=_TINY)
        gain = numerator.square() / denominator
        is_better = gain > best
        best = torch.where(is_better, gain, best)
        scales = torch.where(is_better, numerator / denominator, scales)
        zeros = torch.where(is_better, zero, zeros)
    return scales, zeros


def scale_dtype(form: Blocks, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype in which the scales of a matrix's blocks are stored.

    Args:
        form: How the matrix is stored.
        dtype: Its dtype before.
    """
    return np.dtype(ml_dtypes.bfloat16) if form.scale_bits == 16 and dtype == np.float32 else dtype


def packed(integers: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Integers as bytes along the last axis; of two in a byte the first is the low nibble.

    Args:
        integers: Of four bits, an even number of them along the axis.
        bits: 4 or 8.
    """
    if bits == 4:
        integers = integers[..., ::2] | (integers[..., 1::2] * np.uint8(16))
    return integers

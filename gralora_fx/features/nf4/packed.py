"""Four-bit weights in memory, and the operator that unpacks one in a graph."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gralora_fx.base.compat.torch_graphs import has_kernel, is_traced
from gralora_fx.base.progress.stages import quiet
from gralora_fx.core.graph.packed_weights import PackedWeight
from gralora_fx.core.operators.call import Call, V, operator
from gralora_fx.features.nf4.four_bits import FourBits
from gralora_fx.features.nf4.stored import FourBitTensor, quantized

_LARGEST_BLOCK = 1024  # bitsandbytes unpacks larger ones with torch.compile


@operator("unpack_four_bits")
class UnpackFourBits(Call[V]):
    """`gralora::unpack_four_bits`: the values of a weight in four bits, `table[code] * scale of the block`."""

    codes: V  # `[ceil(out * in / 2)]`, uint8: two codes a byte, the first in the upper half
    scales: V  # `[blocks]`, the float32 scales as int32, which no conversion of a model's floats changes
    table: V  # `[16]`, the float32 values of the codes as int32
    shape: Sequence[int]  # `[out, in]`
    block_size: int  # consecutive values with one scale
    stored: torch.dtype  # dtype to which the values are rounded, as bitsandbytes does for half-precision products
    dtype: torch.dtype  # dtype of the result
    is_turned: bool  # whether the result is `[in, out]`

    def result(self: UnpackFourBits[Tensor]) -> Tensor:
        """Return the weight, by a kernel if one is installed, else with PyTorch operators; both are bit-identical."""
        rows, columns = self.shape
        count, scales, table = rows * columns, self.scales.view(torch.float32), self.table.view(torch.float32)
        values = None
        if not is_traced(self.codes):
            values = _by_kernel(self.codes, scales, table, self.block_size, count)
        if values is None:
            values = self.by_pytorch(count, scales, table)
        weight = values.view(rows, columns).to(self.stored).to(self.dtype)
        return weight.T if self.is_turned else weight

    def by_pytorch(self: UnpackFourBits[Tensor], count: int, scales: Tensor, table: Tensor) -> Tensor:
        """Compute the reference `[count]` in float32."""
        pairs = torch.stack((table.repeat_interleave(16), table.repeat(16)), dim=1).view(torch.float64)  # of each byte
        values = pairs.view(-1).index_select(0, self.codes.to(torch.int32)).view(torch.float32)[:count]
        whole = count // self.block_size * self.block_size
        blocks = values[:whole].view(-1, self.block_size).mul_(scales[: whole // self.block_size, None])
        return blocks if whole == count else torch.cat((blocks.view(-1), values[whole:] * scales[-1]))


def _by_kernel(codes: Tensor, scales: Tensor, table: Tensor, block_size: int, count: int) -> Tensor | None:
    """Return `count` values by a kernel; None if no kernel handles them.

    On processors with AVX-512 the kernel misreads rows that are not whole blocks, so each block is passed as a row.
    """
    if block_size > _LARGEST_BLOCK or count % block_size or codes.device.type != "cpu":
        return None
    if (kind := _kernels().get(table.numpy().tobytes())) is None:
        return None
    return _unpack(codes, scales, block_size, kind).view(-1)


@functools.cache
def _kernels() -> Mapping[bytes, str]:
    """Return the kernels' value types by the bytes of their tables; empty without bitsandbytes."""
    try:
        with quiet():  # it logs missing kernels
            import bitsandbytes  # noqa: F401  # it registers operators
    except ImportError:
        return {}
    if not has_kernel("bitsandbytes::dequantize_4bit", "CPU"):  # its fallback is made by torch.compile
        return {}
    each = torch.arange(16, dtype=torch.uint8)
    found = {}
    for kind in ("nf4", "fp4"):
        table = _unpack(each[::2] * 16 + each[1::2], torch.ones(1), 16, kind)
        found[table.numpy().tobytes()] = kind
    return found


def _unpack(codes: Tensor, scales: Tensor, block_size: int, kind: str) -> Tensor:
    shape = [scales.numel(), block_size]
    values: Tensor = torch.ops.bitsandbytes.dequantize_4bit(codes, scales, block_size, kind, shape, torch.float32)
    return values


@dataclass(frozen=True)
class PackedFourBits(PackedWeight):
    """A weight in four bits."""

    tensors: Mapping[str, Tensor]  # the tensor arguments of the operator
    shape: tuple[int, int]  # `[out, in]`
    quantization: FourBits
    is_turned: bool  # whether the layer's weight is `[in, out]`

    def unpacked(self, tensors: Mapping[str, Any]) -> Any:
        """Call the operator."""
        stored = getattr(torch, self.quantization.compute_dtype)
        rest = (list(self.shape), self.quantization.block_size, stored, torch.float32, self.is_turned)
        return UnpackFourBits.target(tensors["codes"], tensors["scales"], tensors["table"], *rest)


def packed_weight(
    weight: NDArray[np.float32] | FourBitTensor, name: str, quantization: FourBits, *, is_turned: bool
) -> PackedFourBits:
    """Return a weight in four bits, quantized from floats `[out, in]` or taken from a checkpoint.

    `is_turned`: the layer's weight is `[in, out]`. Raises a `CheckpointError` if a scale is not finite.
    """
    if isinstance(weight, FourBitTensor):
        codes = np.empty(weight.codes.nbytes, np.uint8)
        weight.codes.read_into(codes)
        scales = weight.scales.between(0, -(-weight.numel // weight.block_size))
        table, quantization, shape = weight.table, weight.quantization, weight.shape  # type: ignore[assignment]
        shape = shape[::-1] if weight.is_turned else shape
    else:
        codes, scales, table = quantized(weight, quantization, name)
        shape = weight.shape
    tensors = {
        "codes": torch.from_numpy(codes),
        "scales": torch.from_numpy(scales.astype(np.float32)).view(torch.int32),
        "table": torch.from_numpy(table.astype(np.float32)).view(torch.int32),
    }
    return PackedFourBits(tensors, (int(shape[0]), int(shape[1])), quantization, is_turned)

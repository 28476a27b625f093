"""Four-bit weights in memory, and the operator that unpacks one in a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gralora_fx.core.graph.packed_weights import PackedWeight
from gralora_fx.core.operators.call import Call, V, operator
from gralora_fx.errors import CheckpointError
from gralora_fx.features.nf4.four_bits import FourBits
from gralora_fx.features.nf4.stored import FourBitTensor, quantized


@operator("unpack_four_bits")
class UnpackFourBits(Call[V]):
    """`gralora::unpack_four_bits`: the values of a weight in four bits, `table[code] * scale of the block`.

    Attributes:
        codes: `[ceil(out * in / 2)]`, uint8: two codes a byte, the first in the upper half.
        scales: `[blocks]`, the float32 scales as int32, which no conversion of a model's floats changes.
        table: `[16]`, the float32 values of the codes as int32.
        shape: `[out, in]`.
        block_size: Values with one scale; they follow each other in the weight.
        stored: What the values are rounded to, as bitsandbytes does for products in half precision.
        dtype: Dtype of the result.
        is_turned: Whether the result is `[in, out]`.
    """

    codes: V
    scales: V
    table: V
    shape: Sequence[int]
    block_size: int
    stored: torch.dtype
    dtype: torch.dtype
    is_turned: bool

    def result(self: UnpackFourBits[Tensor]) -> Tensor:
        """The reference, in PyTorch's own operators."""
        rows, columns = self.shape
        count, scales, table = rows * columns, self.scales.view(torch.float32), self.table.view(torch.float32)
        pairs = torch.stack((table.repeat_interleave(16), table.repeat(16)), dim=1).view(torch.float64)  # of each byte
        values = pairs.view(-1).index_select(0, self.codes.to(torch.int32)).view(torch.float32)[:count]
        whole = count // self.block_size * self.block_size
        blocks = values[:whole].view(-1, self.block_size).mul_(scales[: whole // self.block_size, None])
        if whole < count:
            blocks = torch.cat((blocks.view(-1), values[whole:] * scales[-1]))
        weight = blocks.view(rows, columns).to(self.stored).to(self.dtype)
        return weight.T if self.is_turned else weight


@dataclass(frozen=True)
class PackedFourBits(PackedWeight):
    """A weight in four bits.

    Attributes:
        tensors: The arguments of the operator that are tensors.
        shape: `[out, in]`.
        quantization: How it was rounded.
        is_turned: Whether the layer's weight is `[in, out]`.
    """

    tensors: Mapping[str, Tensor]
    shape: tuple[int, int]
    quantization: FourBits
    is_turned: bool

    def unpacked(self, tensors: Mapping[str, Any]) -> Any:
        """Call the operator."""
        stored = getattr(torch, self.quantization.compute_dtype)
        rest = (list(self.shape), self.quantization.block_size, stored, torch.float32, self.is_turned)
        return UnpackFourBits.target(tensors["codes"], tensors["scales"], tensors["table"], *rest)


def packed_weight(
    weight: NDArray[np.float32] | FourBitTensor, name: str, quantization: FourBits, *, is_turned: bool
) -> PackedFourBits:
    """Return a weight in four bits: of floats, or of a checkpoint in which it is stored so.

    Args:
        weight: Floats `[out, in]`, or what is stored of them.
        name: Its name in messages.
        quantization: How it is rounded.
        is_turned: Whether the layer's weight is `[in, out]`.

    Raises:
        CheckpointError: A scale is not finite.
    """
    if isinstance(weight, FourBitTensor):
        codes = np.empty(weight.codes.nbytes, np.uint8)
        weight.codes.read_into(codes)
        scales = weight.scales.between(0, -(-weight.numel // weight.block_size))
        table, quantization, shape = weight.table, weight.quantization, weight.shape  # type: ignore[assignment]
        shape = shape[::-1] if weight.is_turned else shape
    else:
        codes, scales, table = quantized(weight, quantization)
        shape = weight.shape
    if not np.isfinite(scales).all():
        raise CheckpointError(f"the scales of {name} in four bits are not finite; copy or save the model again")
    tensors = {
        "codes": torch.from_numpy(codes),
        "scales": torch.from_numpy(scales.astype(np.float32)).view(torch.int32),
        "table": torch.from_numpy(table.astype(np.float32)).view(torch.int32),
    }
    return PackedFourBits(tensors, (int(shape[0]), int(shape[1])), quantization, is_turned)

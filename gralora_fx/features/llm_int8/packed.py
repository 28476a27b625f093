"""Eight-bit weights in memory, and the operator that unpacks one in a graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gralora_fx.core.graph.packed_weights import PackedWeight
from gralora_fx.core.operators.call import Call, V, operator
from gralora_fx.features.llm_int8.eight_bits import EightBits
from gralora_fx.features.llm_int8.stored import EightBitTensor, quantized


@operator("unpack_eight_bits")
class UnpackEightBits(Call[V]):
    """`gralora::unpack_eight_bits`: the values of a weight in eight bits, `code * step of the row`."""

    codes: V  # `[out, in]`, int8
    steps: V  # `[out]`, float32 as int32, which no conversion of a model's floats changes
    is_turned: bool  # whether the result is `[in, out]`

    def result(self: UnpackEightBits[Tensor]) -> Tensor:
        """Compute the reference with PyTorch operators."""
        weight = self.codes.to(torch.float32).mul_(self.steps.view(torch.float32)[:, None])
        return weight.T if self.is_turned else weight


@dataclass(frozen=True)
class PackedEightBits(PackedWeight):
    """A weight in eight bits."""

    tensors: Mapping[str, Tensor]  # the arguments of the operator that are tensors
    is_turned: bool  # whether the layer's weight is `[in, out]`

    def unpacked(self, tensors: Mapping[str, Any]) -> Any:
        """Call the operator."""
        return UnpackEightBits.target(tensors["codes"], tensors["steps"], self.is_turned)


def packed_weight(
    weight: NDArray[np.float32] | EightBitTensor, name: str, _quantization: EightBits, *, is_turned: bool
) -> PackedEightBits:
    """Return a weight in eight bits, quantized from floats `[out, in]` or taken from a checkpoint."""
    if isinstance(weight, EightBitTensor):
        codes, steps = np.empty(weight.codes.shape, np.int8), weight.scales
        weight.codes.read_into(codes)
    else:
        codes, steps = quantized(weight, name)
    return PackedEightBits(
        {"codes": torch.from_numpy(codes), "steps": torch.from_numpy(steps).view(torch.int32)}, is_turned
    )

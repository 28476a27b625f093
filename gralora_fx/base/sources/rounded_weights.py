"""Float weights rounded to four bits, as bitsandbytes rounds the base that a QLoRA adapter is trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gralora_fx.base.compat.extras import installation
from gralora_fx.base.progress.stages import quiet
from gralora_fx.base.sources.base_quantization import BaseQuantization
from gralora_fx.base.sources.four_bits import as_tensor, scales_of, values_of
from gralora_fx.base.sources.rewriting import bytes_of
from gralora_fx.base.sources.safetensors_files import FLOATS, StoredTensor
from gralora_fx.errors import ConfigError, option

if TYPE_CHECKING:
    from torch import Tensor


def rounded_to_four_bits(weight: NDArray[Any], quantization: BaseQuantization) -> NDArray[np.float32]:
    """A float weight `[out, in]` as its layer in bitsandbytes multiplies by it, in float32.

    bitsandbytes rounds it. What it rounded to is read as from a file, since its own kernel for processors with AVX-512
    reads rows wrong that are not a whole number of blocks (0.50; those for GPUs do not).
    """
    import torch

    try:
        with quiet():
            from bitsandbytes.functional import quantize_4bit
    except ImportError as error:
        raise ConfigError(
            f"{option(base_quantization=str(quantization))} needs bitsandbytes, which rounds the base as it did for "
            f"the adapter ({error}): {installation('nf4')}. A base that it saved in four bits is read without it"
        ) from error
    values = torch.from_numpy(np.array(weight, np.float32, order="C"))
    codes, state = quantize_4bit(
        values,
        blocksize=quantization.block_size,
        compress_statistics=quantization.double,
        quant_type=quantization.kind,
    )
    scales = state.absmax.numpy()
    if quantization.double:
        outer = state.state2
        scales = scales_of(scales, 0, outer.code.numpy(), outer.absmax.numpy(), outer.blocksize, float(state.offset))
    packed, table = codes.reshape(-1).numpy(), state.code.numpy()
    floats = values_of(packed, scales, table, quantization.block_size, 0, values.numel()).reshape(weight.shape)
    return floats.astype(FLOATS[quantization.stored_dtype], copy=False).astype(np.float32, copy=False)


@dataclass(frozen=True)
class RoundedTensor(StoredTensor):
    """A weight of floats, which is read as it is after it was rounded to four bits.

    Attributes:
        floats: The stored weight.
        quantization: How it is rounded.
        is_turned: Whether it is stored as `[in, out]`, as transformers' `Conv1D` has it.
    """

    floats: StoredTensor
    quantization: BaseQuantization
    is_turned: bool = False

    @classmethod
    def of(cls, floats: StoredTensor, quantization: BaseQuantization, *, is_turned: bool) -> RoundedTensor:
        """The weight of a file, in its own dtype."""
        file, begin, end = floats.file, floats.begin, floats.end
        return cls(file, begin, end, floats.key, floats.dtype, floats.shape, floats, quantization, is_turned)

    @property
    def is_whole(self) -> bool:
        """Whether all values are read for a part of them."""
        return True

    def __call__(self) -> Tensor:
        """The values as a tensor in memory of its own."""
        return as_tensor(self.array())

    def read_into(self, values: NDArray[Any], first: int = 0) -> None:
        """Fill a contiguous array with the bytes of the rounded values, from the `first` on."""
        floats, target = self.floats.array(), bytes_of(values)
        rounded = rounded_to_four_bits(floats.T if self.is_turned else floats, self.quantization)
        stored = np.ascontiguousarray(rounded.T if self.is_turned else rounded).astype(FLOATS[self.dtype], copy=False)
        target[:] = bytes_of(stored)[first : first + len(target)]

"""Quantized weights, stored or simulated, each read as a float tensor."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from gralora_fx.base.sources.base_quantization import BaseQuantization
from gralora_fx.base.sources.rewriting import BLOCK, as_tensor, bytes_of
from gralora_fx.base.sources.safetensors_files import FLOATS, StoredTensor
from gralora_fx.base.sources.stored_integers import StoredIntegers

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PackedTensor(StoredTensor):
    """A quantized weight, read as floats in its original shape and compute dtype."""

    quantization: BaseQuantization  # how it is stored
    # whether it is read transposed, `[in, out]`, for transformers' `Conv1D`
    is_turned: bool = field(default=False, kw_only=True)

    @property
    def is_whole(self) -> bool:
        """Return whether reading a part computes all values."""
        return self.is_turned

    def turned(self) -> Self:
        """Return the same weight transposed."""
        return replace(self, shape=self.shape[::-1], is_turned=not self.is_turned)

    def __call__(self) -> Tensor:
        """Return the values as a newly allocated tensor."""
        return as_tensor(self.array())

    def read_into(self, values: NDArray[Any], first: int = 0) -> None:
        """Fill a contiguous array with bytes of the floats, starting at byte `first`."""
        dtype, target = FLOATS[self.dtype], bytes_of(values)
        if self.is_turned:
            whole = replace(self, shape=self.shape[::-1], is_turned=False).array()
            target[:] = bytes_of(np.ascontiguousarray(whole.T))[first : first + len(target)]
            return
        most = self.numel if self.is_whole else BLOCK
        while target:
            start, ahead = divmod(first, dtype.itemsize)
            stop = min(start + most, math.ceil((first + len(target)) / dtype.itemsize))
            part = bytes_of(self.floats(start, stop).astype(dtype, copy=False))[ahead : ahead + len(target)]
            target[: len(part)] = part
            target, first = target[len(part) :], first + len(part)

    def integers(self) -> StoredIntegers | None:
        """Return the stored integers of the weight `[out, in]`; None if its values are none times a scale."""
        return None

    @abstractmethod
    def floats(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return the values `start` to `stop` in float32, in the order of the weight `[out, in]`."""


@dataclass(frozen=True)
class RoundedTensor(StoredTensor):
    """A float weight, read with the values that quantization would give it."""

    stored: StoredTensor  # the stored weight
    quantization: BaseQuantization  # how it is quantized
    is_turned: bool = False  # whether it is stored transposed, `[in, out]`, as in transformers' `Conv1D`

    @classmethod
    def of(cls, stored: StoredTensor, quantization: BaseQuantization, *, is_turned: bool) -> RoundedTensor:
        """Wrap a file's weight, keeping its dtype."""
        file, begin, end = stored.file, stored.begin, stored.end
        return cls(file, begin, end, stored.key, stored.dtype, stored.shape, stored, quantization, is_turned)

    @property
    def is_whole(self) -> bool:
        """Return whether reading a part computes all values."""
        return True

    def __call__(self) -> Tensor:
        """Return the values as a newly allocated tensor."""
        return as_tensor(self.array())

    def read_into(self, values: NDArray[Any], first: int = 0) -> None:
        """Fill a contiguous array with bytes of the rounded values, starting at byte `first`."""
        floats, target = self.stored.array(), bytes_of(values)
        name = f"{self.file}, {self.key}"
        rounded = self.quantization.rounded(floats.T if self.is_turned else floats, name)
        stored = np.ascontiguousarray(rounded.T if self.is_turned else rounded).astype(FLOATS[self.dtype], copy=False)
        target[:] = bytes_of(stored)[first : first + len(target)]


def packed_tensors(tensors: Mapping[str, StoredTensor]) -> Iterator[PackedTensor]:
    """Yield those of a model's tensors that are quantized."""
    return (tensor for tensor in tensors.values() if isinstance(tensor, PackedTensor))

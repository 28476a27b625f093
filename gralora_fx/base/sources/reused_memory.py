"""Memory of weights that were read, used again for the next ones: fresh pages cost several times what reading does."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

_MOST, _COUNT = 2**26, 2  # values of a weight that gets such memory, and the number of weights that have it at once
_FREE = 3  # references to an array that no tensor uses: the list's, the loop's and the call's own


class ReusedMemory:
    """Casts tensors in memory that no tensor uses any more."""

    def __init__(self) -> None:
        """Begin without any."""
        self._arrays: list[NDArray[Any]] = []
        self._lock = threading.Lock()

    def cast(self, values: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the values in a dtype: the tensor itself if it has it; float32 in memory of its own while it lives."""
        if dtype != torch.float32 or values.dtype == dtype:
            return values.to(dtype)
        return self.empty(values.shape).copy_(values)

    def empty(self, shape: Sequence[int]) -> Tensor:
        """Return a float32 tensor that is not initialized, in memory that is its own while it lives."""
        count = math.prod(shape)
        if count > _MOST:
            return torch.empty(shape)
        with self._lock:
            return self._memory(count).view(shape)

    def _memory(self, count: int) -> Tensor:
        """Return a tensor over an array that no other tensor uses; CPython counts those that do."""
        for array in self._arrays:
            if len(array) >= count and sys.getrefcount(array) == _FREE:
                return torch.from_numpy(array)[:count]
        array = torch.empty(count).numpy()  # aligned as other tensors are, on which last digits of products depend
        self._arrays = sorted([*self._arrays, array], key=len)[-_COUNT:]
        return torch.from_numpy(array)


READ = ReusedMemory()  # of weights while a graph reads them

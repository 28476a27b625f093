"""Array functions that numpy and torch call by different names, for the formulas of an update.

Each formula is written once, and a saved adapter is folded into files without importing torch. Both libraries have
indexing, `.T`, `@`, `.reshape` and `.shape`; the rest is here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Array = Any  # a numpy array or a torch tensor
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
F = TypeVar("F", bound=Callable[..., Any])


def is_numpy(array: Array) -> bool:
    """Return whether an array is numpy's rather than torch's."""
    return isinstance(array, np.ndarray)


def zeros(shape: Sequence[int], like: Array) -> Array:
    """Return zeros of another array's library, dtype and device."""
    return np.zeros(shape, like.dtype) if is_numpy(like) else like.new_zeros(tuple(shape))


def identity(size: int, like: Array) -> Array:
    """Return the identity matrix, in another array's library and dtype."""
    if is_numpy(like):
        return np.eye(size, dtype=like.dtype)
    import torch

    return torch.eye(size, dtype=like.dtype, device=like.device)


def concatenated(parts: Sequence[Array], axis: int = 0) -> Array:
    """Concatenate arrays of one library along an axis."""
    if is_numpy(parts[0]):
        return np.concatenate(parts, axis)
    import torch

    return torch.cat(list(parts), axis)


def accumulator_of(*arrays: Array) -> Any:
    """Return the dtype to add values up in: float32, or the arrays' own if it is wider."""
    if is_numpy(arrays[0]):
        return functools.reduce(np.promote_types, (array.dtype for array in arrays), np.dtype(np.float32))
    import torch

    return functools.reduce(torch.promote_types, (array.dtype for array in arrays), torch.float32)


def cast(array: Array, dtype: Any) -> Array:
    """Return an array in another dtype of its library; the array itself if it has that dtype."""
    return array.astype(dtype, copy=False) if is_numpy(array) else array.to(dtype)


def moved(array: Array, source: int, target: int) -> Array:
    """Return an array with an axis moved to another position; works on proxies too."""
    return np.moveaxis(array, source, target) if is_numpy(array) else array.movedim(source, target)


def contiguous(array: Array) -> Array:
    """Return a contiguous array; the array itself if it is contiguous."""
    return np.ascontiguousarray(array) if is_numpy(array) else array.contiguous()


def to_numpy(array: Array) -> NDArray[Any]:
    """Return a tensor, bfloat16 included, as a numpy array; a numpy array is returned unchanged."""
    if is_numpy(array):
        return array  # type: ignore[no-any-return]
    import torch

    values = array.detach().cpu().contiguous()
    if values.dtype == torch.bfloat16:
        halves: NDArray[Any] = values.view(torch.uint16).numpy().view(BFLOAT16)
        return halves
    return values.numpy()  # type: ignore[no-any-return]


def to_torch(array: Array) -> Tensor:
    """Return a numpy array, bfloat16 included, as a tensor; a tensor is returned unchanged."""
    if not is_numpy(array):
        return array  # type: ignore[no-any-return]
    import torch

    values = np.require(array, requirements=["C", "W"])
    if values.dtype == BFLOAT16:
        return torch.from_numpy(values.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def row_norms(matrix: Array) -> Array:
    """Return Euclidean norms `[n]` of the rows of a matrix `[n, m]`, without gradients; works on proxies too."""
    if is_numpy(matrix):
        return np.linalg.norm(matrix, axis=1)
    import torch

    return torch.linalg.vector_norm(matrix.detach(), dim=1)


def without_gradients(function: F) -> F:
    """Make a function record no gradients of tensors, and numpy as silent about overflow and division by zero as torch.

    The code that writes the values checks that they are finite.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        import sys

        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            if "torch" not in sys.modules:  # so no argument is a tensor
                return function(*args, **kwargs)
            import torch

            with torch.no_grad():
                return function(*args, **kwargs)

    return run  # type: ignore[return-value]

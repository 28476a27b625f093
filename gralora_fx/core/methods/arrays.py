"""What the formulas of an update ask of arrays: the same of numpy's arrays as of torch's tensors.

So each formula is written once, and a saved adapter is folded into files without importing torch. Both have indexing,
`.T`, `@`, `.reshape` and `.shape`; what they call by other names is here.
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
    """Whether it is numpy's, rather than torch's."""
    return isinstance(array, np.ndarray)


def zeros(shape: Sequence[int], like: Array) -> Array:
    """Zeros of the library, dtype and device of another array."""
    return np.zeros(shape, like.dtype) if is_numpy(like) else like.new_zeros(tuple(shape))


def identity(size: int, like: Array) -> Array:
    """The identity matrix, of the library and dtype of another array."""
    if is_numpy(like):
        return np.eye(size, dtype=like.dtype)
    import torch

    return torch.eye(size, dtype=like.dtype, device=like.device)


def concatenated(parts: Sequence[Array], axis: int = 0) -> Array:
    """Arrays of one library, one after the other along an axis."""
    if is_numpy(parts[0]):
        return np.concatenate(parts, axis)
    import torch

    return torch.cat(list(parts), axis)


def accumulator_of(*arrays: Array) -> Any:
    """The dtype to add values up in: float32, or that of the arrays if it is wider."""
    if is_numpy(arrays[0]):
        return functools.reduce(np.promote_types, (array.dtype for array in arrays), np.dtype(np.float32))
    import torch

    return functools.reduce(torch.promote_types, (array.dtype for array in arrays), torch.float32)


def cast(array: Array, dtype: Any) -> Array:
    """An array in another dtype of its library; itself if it has that."""
    return array.astype(dtype, copy=False) if is_numpy(array) else array.to(dtype)


def moved(array: Array, source: int, target: int) -> Array:
    """An array with an axis at another place. A proxy will do too."""
    return np.moveaxis(array, source, target) if is_numpy(array) else array.movedim(source, target)


def contiguous(array: Array) -> Array:
    """An array whose values follow each other; itself if they do."""
    return np.ascontiguousarray(array) if is_numpy(array) else array.contiguous()


def to_numpy(array: Array) -> NDArray[Any]:
    """A tensor as a numpy array, of bfloat16 too; numpy's own is returned as it is."""
    if is_numpy(array):
        return array  # type: ignore[no-any-return]
    import torch

    values = array.detach().cpu().contiguous()
    if values.dtype == torch.bfloat16:
        halves: NDArray[Any] = values.view(torch.uint16).numpy().view(BFLOAT16)
        return halves
    return values.numpy()  # type: ignore[no-any-return]


def to_torch(array: Array) -> Tensor:
    """A numpy array as a tensor, of bfloat16 too; a tensor is returned as it is."""
    if not is_numpy(array):
        return array  # type: ignore[no-any-return]
    import torch

    values = np.require(array, requirements=["C", "W"])
    if values.dtype == BFLOAT16:
        return torch.from_numpy(values.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def row_norms(matrix: Array) -> Array:
    """Euclidean norms `[n]` of the rows of a matrix `[n, m]`; no gradient goes through them. A proxy will do too."""
    if is_numpy(matrix):
        return np.linalg.norm(matrix, axis=1)
    import torch

    return torch.linalg.vector_norm(matrix.detach(), dim=1)


def without_gradients(function: F) -> F:
    """A function that records no gradients of tensors; numpy's arrays have none.

    numpy is as silent about an overflow or a division by zero as torch: whoever writes the values checks that they are
    finite.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        import sys

        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            if "torch" not in sys.modules:  # so there is no tensor either
                return function(*args, **kwargs)
            import torch

            with torch.no_grad():
                return function(*args, **kwargs)

    return run  # type: ignore[return-value]

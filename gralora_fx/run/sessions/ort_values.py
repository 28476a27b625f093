"""ONNX Runtime values as tensors without a copy, and memory that is committed as it fills."""

from __future__ import annotations

import contextlib
import functools
import math
import mmap
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import TensorProto
from onnxruntime import OrtValue
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from gralora_fx.errors import ExportError, GraloraError, ServingError, first_line
from gralora_fx.format.cache_slots import past_slots
from gralora_fx.format.input_names import IDS, beside_ids

_ALIKE = ("float16", "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
_NAMES = {"float": "float32", "double": "float64", **{name: name for name in _ALIKE}}  # numpy's and torch's of a type
DTYPES = {f"tensor({name})": np.dtype(other) for name, other in _NAMES.items()}
TORCH_DTYPES = {
    "tensor(bfloat16)": torch.bfloat16,
    **{kind: getattr(torch, dtype.name) for kind, dtype in DTYPES.items()},
}
_KINDS = {"i": "iu", "u": "iu", "f": "iuf", "b": "biu"}  # array kinds that are cast to an input kind


def run_values(
    session: Any,
    feed: Mapping[str, Any],
    description: str,
    names: Sequence[str] | None = None,
    error: type[GraloraError] = ExportError,
) -> dict[str, Any]:
    """Run a session on tensors, cast to its input dtypes, or on its own output values."""
    kinds = {value.name: value.type for value in (*session.get_inputs(), *optional_arguments(session))}
    if unknown := [name for name in feed if name not in kinds]:
        raise error(f"{description}: the session takes no {', '.join(unknown)}")
    values = {
        name: as_value(value, kinds[name]) if isinstance(value, Tensor) else value for name, value in feed.items()
    }
    names = [value.name for value in session.get_outputs()] if names is None else names
    try:
        results = session.run_with_ort_values(names, values)
    except Exception as failure:  # ONNX Runtime raises types of its own
        raise error(f"ONNX Runtime fails on {description}: {first_line(failure)}") from failure
    return dict(zip(names, results, strict=True))


def run_arrays(session: Any, feed: Mapping[str, NDArray[Any]], description: str) -> dict[str, NDArray[Any]]:
    """Run a session on arrays of its input dtypes; return its outputs by name."""
    names = [value.name for value in session.get_outputs()]
    try:
        results = session.run(names, dict(feed))
    except Exception as failure:  # ONNX Runtime raises types of its own
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feed.items())
        raise ServingError(f"ONNX Runtime fails on {description}, {shapes}: {first_line(failure)}") from failure
    return dict(zip(names, results, strict=True))


def optional_arguments(session: Any) -> list[Any]:
    """Return a decoder session's inputs beside ids that text alone does not need (see `beside_ids`)."""
    optional: list[Any] = getattr(session, "get_overridable_initializers", list)()
    known = beside_ids([IDS, *(value.name for value in optional)])
    return [value for value in optional if value.name in known]


def as_value(tensor: Tensor, kind: str) -> Any:
    """Return a tensor as an `OrtValue` for a session."""
    array = tensor.detach().to(TORCH_DTYPES[kind]).contiguous()
    if array.dtype == torch.bfloat16:
        return OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(torch.uint16).numpy(), TensorProto.BFLOAT16)
    return OrtValue.ortvalue_from_numpy(array.numpy())


def own_value(tensor: Tensor, kind: str) -> Any:
    """Copy a tensor into a new `OrtValue`, like a session's output; not for bfloat16."""
    array = tensor.detach().to(TORCH_DTYPES[kind]).contiguous().numpy()
    value = OrtValue.ortvalue_from_shape_and_type(list(array.shape), array.dtype)
    value.update_inplace(array)
    return value


def empty_values(session: Any, batch: int, length: int = 0) -> dict[str, Any]:
    """Return an empty cache for a session: every `past_key_values.N...` input, states zeros."""
    values: dict[str, Any] = {}
    for slot, value in past_slots(session.get_inputs()).items():
        shape, dtype = slot.kind.shape(value.shape, batch, length), TORCH_DTYPES[value.type]
        # untouched pages of numpy's zeros take no memory; torch writes its zeros
        count = math.prod(shape)
        zeros = np.zeros(max(count, 1) * dtype.itemsize, np.uint8)
        values[value.name] = as_value(torch.from_numpy(zeros).view(dtype)[:count].reshape(shape), value.type)
    return values


def as_tensor(value: Any) -> Tensor:
    """Return an `OrtValue` as a tensor sharing its memory (an array's memory if `as_value` made it)."""
    tensor: Tensor = from_dlpack(value)
    return tensor


def as_array(name: str, value: Any, expected: Any) -> NDArray[Any]:
    """Convert an input to an array of the type and shape that a session takes."""
    array = plain_array(name, value)
    dtype = DTYPES.get(expected.type, array.dtype)
    shape = list(expected.shape)
    fixed = [(axis, size) for axis, size in enumerate(shape) if isinstance(size, int)]
    if array.dtype.kind not in "biuf":
        raise ServingError(f"input {name!r} is {array.dtype}, but the model takes {dtype}")
    if array.ndim != len(shape) or any(array.shape[axis] != size for axis, size in fixed):
        raise ServingError(f"input {name!r} has shape {list(array.shape)}, but the model takes {shape}")
    if any(size == 0 and not str(axis).startswith("past_") for axis, size in zip(shape, array.shape, strict=True)):
        raise ServingError(f"input {name!r} is empty, of shape {list(array.shape)}; give at least one of {shape}")
    allowed = _KINDS.get(dtype.kind, dtype.kind) + ("b" if name.endswith("mask") else "")
    if array.dtype.kind not in allowed:
        raise ServingError(f"input {name!r} is {array.dtype}, but the model takes {dtype}")
    if dtype.kind in "iu" and array.size and not np.can_cast(array.dtype, dtype):
        least, most = np.iinfo(dtype).min, np.iinfo(dtype).max
        if int(array.min()) < least or int(array.max()) > most:
            wrong = array.min() if int(array.min()) < least else array.max()
            raise ServingError(f"input {name!r} holds {wrong}, which {dtype} does not hold")
    return np.asarray(array, dtype=dtype, order="C")


def plain_array(name: str, value: Any) -> NDArray[Any]:
    """Convert a value to an array of any type and shape."""
    try:
        if not isinstance(value, Tensor):
            return np.asarray(value)
        tensor = value.detach().cpu()
        return (tensor.float() if tensor.dtype in (torch.bfloat16, torch.float8_e4m3fn) else tensor).numpy()
    except Exception as error:  # array-likes and tensors without values raise what they like
        hint = "pad its rows to one length" if isinstance(value, Sequence) else "give an array, a tensor or a list"
        raise ServingError(f"input {name!r} is not an array ({first_line(error)}); {hint}") from error


PAGE = mmap.PAGESIZE
_POPULATE = 23  # MADV_POPULATE_WRITE of Linux since 5.14, for which `mmap` has no name


class PagedBytes:
    """Zeros in pages of the smallest size.

    A large numpy array commits memory as it is written, too, but in huge pages, which numpy requests from the kernel,
    as glibc does if `GLIBC_TUNABLES` says so: one byte then takes 2 MiB.
    """

    def __init__(self, count: int) -> None:
        """Reserve address space for a number of bytes."""
        self._map = _mapped(max(count, 1))
        if sys.platform == "linux":
            with contextlib.suppress(OSError):  # a kernel without huge pages
                self._map.madvise(mmap.MADV_NOHUGEPAGE)
        self.array = np.frombuffer(self._map, np.uint8, count)

    def take(self, start: int, stop: int) -> None:
        """Commit the pages of bytes that are written soon.

        Pages committed together are mostly contiguous, so that address translation is faster. If the system cannot,
        each page is committed on its first write.
        """
        if sys.platform == "linux":
            with contextlib.suppress(OSError):  # an older kernel
                self._map.madvise(_POPULATE, start, stop - start)

    def give_back(self, start: int, stop: int) -> None:
        """Release the pages that lie wholly within some bytes, which are zeros afterwards.

        If the system cannot, the bytes stay unchanged (see `kept_reason`).
        """
        first, end = whole_pages(start), stop // PAGE * PAGE
        if sys.platform == "linux" and first < end and kept_reason() is None:
            self._map.madvise(mmap.MADV_DONTNEED, first, end - first)


def _mapped(size: int) -> mmap.mmap:
    if sys.platform == "win32":
        return mmap.mmap(-1, size)
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


@functools.cache
def kept_reason() -> str | None:
    """Return why pages are not released; None if they are."""
    if sys.platform != "linux":
        return f"{sys.platform} does not take single pages back"
    try:
        _mapped(PAGE).madvise(mmap.MADV_DONTNEED)
    except OSError as error:
        return f"the kernel does not take single pages back ({error})"
    return None


def whole_pages(count: int) -> int:
    """Return the size of the pages that some bytes take."""
    return -(-count // PAGE) * PAGE

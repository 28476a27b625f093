"""Adapter tensors as arrays, including bfloat16, which numpy lacks; several stacked or summed exactly.

Rows of a batch choose an adapter of a stack by its id. A weighted sum of adapters has the sum of their ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime
from numpy.typing import NDArray

from gralora_fx.base.compat.onnx_messages import TensorProto
from gralora_fx.format.adapter_inputs import BASE, AdapterInputs, AdapterSite

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": _BFLOAT16}

Arrays = Mapping[str, NDArray[Any]]
# of ONNX Runtime's product of float32 matrices on a CPU
_ONE_THREAD = 2**16  # multiplications from which there may be two threads
_NARROW = 16  # columns that are never split among threads
_SHORT_SUM = 128  # numbers that are added in one order whatever the number of columns
_ANY = 2**31
Ranks = Sequence[tuple[int, int]]  # at each layer of an export, of blocks and of plain LoRA


def as_ort_value(array: NDArray[Any]) -> Any:
    """Return an array as an `OrtValue`; bfloat16 works too."""
    if array.dtype == _BFLOAT16:
        raw = np.ascontiguousarray(array).view(np.uint16)
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, TensorProto.BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def cast(array: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Cast an array to one of the dtypes of adapter tensors."""
    found: NDArray[Any] = array.astype(DTYPES[dtype])
    return found


def stacked(adapters: Sequence[Arrays], inputs: AdapterInputs) -> dict[str, Any]:
    """Stack adapters as `OrtValue`s by name, padded with zeros to the largest rank at each layer."""
    ranks = largest_ranks([ranks_of(tensors, inputs) for tensors in adapters], inputs)
    arrays = empty_stack(len(adapters), ranks, inputs)
    for number, tensors in enumerate(adapters, BASE + 1):
        write_adapter(arrays, number, tensors, inputs)
    return {name: as_ort_value(array) for name, array in arrays.items()}


def ranks_of(tensors: Arrays, inputs: AdapterInputs) -> Ranks:
    """Return an adapter's ranks at each layer of an export, 0 for a part that it lacks."""
    parts = (site.parts(tensors) for site in inputs.sites)
    return tuple(
        (0 if A is None else A.shape[2], 0 if general is None else general.shape[1]) for A, _, general, *_ in parts
    )


def largest_ranks(several: Sequence[Ranks], inputs: AdapterInputs) -> Ranks:
    """Return the largest ranks at each layer; 0 without adapters."""
    by_site = zip(*several, strict=True) if several else ([(0, 0)] for _ in inputs.sites)
    return tuple((max(r for r, _ in ranks), max(general for _, general in ranks)) for ranks in by_site)


def empty_stack(count: int, ranks: Ranks, inputs: AdapterInputs) -> dict[str, NDArray[Any]]:
    """Return zeros `[1 + count, ...]` by name, for the base and adapters; pages take no memory until written."""
    dtype = DTYPES[inputs.dtype]
    return {name: np.zeros((1 + count, *shape), dtype) for name, shape in _shapes(ranks, inputs).items()}


def slot_size(ranks: Ranks, inputs: AdapterInputs) -> int:
    """Return the bytes of an adapter in a stack with the given ranks."""
    count = sum(math.prod(shape) for shape in _shapes(ranks, inputs).values())
    return count * int(DTYPES[inputs.dtype].itemsize)


def most_tokens_alone(ranks: Ranks, inputs: AdapterInputs) -> int:
    """Return the most tokens that an adapter can read in a stack of its own, with the same bits as beside others.

    ONNX Runtime multiplies the matrices of a stack each on one thread while they are at least as many as the threads,
    and may split a lone one among threads, by columns or rows. It adds products in an order that depends on the number
    of columns, unless the sum is short, and multiplies a lone row in yet another order. So a lone product has to be
    small enough for one thread, or too narrow to be split.
    """
    most = _ANY
    for name, shape in _shapes(ranks, inputs).items():
        if len(shape) == 1 or not math.prod(shape):
            continue
        *_, length, width = shape
        is_second = name.removesuffix("_general").endswith("_B")
        whole = _ANY if is_second and length <= _SHORT_SUM else width if width <= _NARROW else 0
        most = min(most, max((_ONE_THREAD - 1) // (length * width), whole))
    return most


def _shapes(ranks: Ranks, inputs: AdapterInputs) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(map(int, shape))
        for site, (r, general) in zip(inputs.sites, ranks, strict=True)
        for name, shape in site.shapes(inputs.k, r, general).items()
    }


def write_adapter(stack: Mapping[str, NDArray[Any]], number: int, tensors: Arrays, inputs: AdapterInputs) -> None:
    """Write an adapter into a stack in place; zeros fill missing tensors and smaller ranks.

    Ranks are padded within the part of each pair of blocks: with s = r / k, columns `j * s` to `(j + 1) * s` of `A`
    belong to output block j, likewise the rows of `B`.
    """
    for site in inputs.sites:
        for place, name in zip(_places(site, inputs.k), site.names(inputs.k), strict=True):
            room, own = stack[name][number], tensors.get(name)
            if own is not None and own.shape == room.shape:
                room[...] = own
                continue
            room[...] = 0
            if own is not None:
                within = tuple(slice(size) for size in place(own).shape)
                place(room)[within] = place(own)


def _places(site: AdapterSite, k: int) -> Iterator[Callable[[NDArray[Any]], NDArray[Any]]]:
    """Return for each tensor at a layer the view in which a smaller one is padded at the end of each axis."""
    k, ins, outs = site.blocks(k), site.in_features, site.out_features

    def of_A(array: NDArray[Any]) -> NDArray[Any]:
        return array.reshape(k, ins // k, k, array.shape[-1] // k)

    def of_B(array: NDArray[Any]) -> NDArray[Any]:
        return array.reshape(k, k, array.shape[1] // k, outs // k)

    yield from (of_A, of_B) if k else ()
    yield from [lambda array: array] * (len(site.names(k)) - (2 if k else 0))


def mixed(parts: Sequence[tuple[Arrays, float]], inputs: AdapterInputs) -> dict[str, NDArray[Any]]:
    """Return an adapter whose update is the weighted sum of others'.

    The weights become part of the `B` tensors, in float32, rounded once. Each block pair (j, n) of GraLoRA has its own
    s columns of `A[n]` and rows of `B[j]`, so those are concatenated pair by pair; plain LoRA's are concatenated whole.
    Changes of biases and of output scales are summed as well.
    """
    tensors: dict[str, NDArray[Any]] = {}
    for site in inputs.sites:
        names = site.names(inputs.k)
        there = [(arrays, weight) for arrays, weight in parts if names[0] in arrays]
        if there:
            tensors |= dict(zip(names, _sum_at(site, there, inputs.k), strict=True))
    return tensors


def _sum_at(site: AdapterSite, adapters: Sequence[tuple[Arrays, float]], k: int) -> Iterator[NDArray[Any]]:
    """Yield the sum's tensors at a layer, in the order of their names."""
    parts = [(site.parts(arrays), weight) for arrays, weight in adapters]
    blocks = [(A, _scaled(B, weight)) for (A, B, *_), weight in parts if A is not None and B is not None]
    if blocks:
        yield from _blocks(site, blocks, k)
    general = [(A, _scaled(B, weight)) for (_, _, A, B, *_), weight in parts if A is not None and B is not None]
    if general:
        yield np.concatenate([A for A, _ in general], 1)
        yield np.concatenate([B for _, B in general], 0)
    for vectors in zip(*(vectors for (_, _, _, _, *vectors), _ in parts), strict=True):  # bias, output scales
        there = [(vector, weight) for vector, (_, weight) in zip(vectors, parts, strict=True) if vector is not None]
        if there:
            total = sum(vector.astype(np.float32) * weight for vector, weight in there)
            yield np.asarray(total).astype(there[0][0].dtype)


def _blocks(site: AdapterSite, parts: Sequence[tuple[NDArray[Any], NDArray[Any]]], k: int) -> Iterator[NDArray[Any]]:
    ins, outs = site.in_features // k, site.out_features // k
    ranks = [A.shape[2] // k for A, _ in parts]  # of a block pair
    pairs = list(zip(parts, ranks, strict=True))
    r = k * sum(ranks)
    A = np.concatenate([A.reshape(k, ins, k, s) for (A, _), s in pairs], 3)  # [n, in/k, j, s]
    yield A.reshape(k, ins, r)
    B = np.concatenate([B.reshape(k, k, s, outs) for (_, B), s in pairs], 2)  # [j, n, s, out/k]
    yield B.reshape(k, r, outs)


def _scaled(array: NDArray[Any], weight: float) -> NDArray[Any]:
    """Scale an array in float32, keeping its dtype."""
    found: NDArray[Any] = array if weight == 1.0 else (array.astype(np.float32) * weight).astype(array.dtype)
    return found

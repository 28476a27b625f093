"""Several adapters joined: stacked, so that rows of a batch choose one by its id, or summed to another one, exactly."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gralora_fx.errors import ServingError, listed, shown
from gralora_fx.runtime.adapter_arrays import Arrays, as_ort_value, cast
from gralora_fx.runtime.adapter_inputs import AdapterInputs, AdapterSite

BASE = 0  # the id of no adapter


@dataclass(frozen=True)
class Stack:
    """Adapters at one time.

    Attributes:
        adapters: The id and the tensors of each adapter by its name.
        values: The export's adapter tensors as `OrtValue`s, by name.
    """

    adapters: Mapping[str, tuple[int, Arrays]]
    values: Mapping[str, Any]

    @property
    def ids(self) -> dict[str, int]:
        """The id of each adapter by its name."""
        return {name: number for name, (number, _) in self.adapters.items()}

    def has(self, tensors: Arrays) -> bool:
        """Whether an adapter has some tensors, the very same."""
        return any(own is tensors for _, own in self.adapters.values())

    def id_of(self, tensors: Arrays) -> int:
        """The id of the adapter that has some tensors, the very same, which one has."""
        return next(number for number, own in self.adapters.values() if own is tensors)


class AdapterStack:
    """The adapters that rows can choose among.

    An id stays that of its adapter until the adapter is unloaded. The tensors are stacked anew when a run needs an
    adapter that the last stack lacks, padded with zeros to the largest rank at each layer. Runs in other threads go on
    with the stack that they have, and wait for none that is being made for adapters of others.
    """

    def __init__(self, inputs: AdapterInputs) -> None:
        """Begin without adapters.

        Args:
            inputs: The adapter tensors of the export.
        """
        self._inputs = inputs
        self._adapters: dict[str, tuple[int, Arrays]] = {}
        self._stack: Stack | None = None
        self._lock, self._stacking = threading.Lock(), threading.Lock()

    def add(self, name: str, tensors: Arrays) -> int:
        """Add an adapter of tensors that fit the export; its id.

        Args:
            name: What to call it, which no other is called.
            tensors: Its tensors.
        """
        with self._lock:
            taken = {number for number, _ in self._adapters.values()}
            number = next(number for number in range(1, len(taken) + 2) if number not in taken)
            self._adapters = {**self._adapters, name: (number, tensors)}
        return number

    def remove(self, name: str) -> None:
        """Remove an adapter that is there, and free its memory once no run has its stack; the ids of others stay."""
        with self._lock:
            self._adapters = {other: entry for other, entry in self._adapters.items() if other != name}
        if self._stack is not None:
            self.current()

    def current(self, names: Iterable[str] | None = None) -> Stack:
        """The adapters as they are.

        Args:
            names: Those that are needed: a stack that has them will do, whatever else has come or gone since. None for
                exactly all, which frees the memory of those that are gone.
        """
        needed = None if names is None else tuple(names)
        if (found := self._fitting(needed)) is not None:
            return found
        with self._stacking:
            if (found := self._fitting(needed)) is None:
                adapters = self._adapters
                found = self._stack = Stack(adapters, self._stacked(adapters))
            return found

    def _fitting(self, names: Iterable[str] | None) -> Stack | None:
        """The last stack, if its adapters of some names, or all of them, are those that are loaded."""
        stack, adapters = self._stack, self._adapters
        if stack is None or (names is None and stack.adapters is not adapters):
            return None
        is_same = all(stack.adapters.get(name) is adapters.get(name) for name in names or ())
        return stack if is_same else None

    def _stacked(self, adapters: Mapping[str, tuple[int, Arrays]]) -> dict[str, Any]:
        by_id = dict(adapters.values())
        count = 1 + max(by_id, default=0)
        return {
            name: as_ort_value(array)
            for site in self._inputs.sites
            for name, array in _stacked_site(site, by_id, count, self._inputs)
        }


def names_of_rows(adapter: object, batch: int) -> list[Any]:
    """What is given as the name of each row's adapter.

    Args:
        adapter: A name or None for all rows, or a list of one for each.
        batch: How many rows there are.

    Raises:
        ServingError: There are not as many names as rows.
    """
    names = list(adapter) if isinstance(adapter, (list, tuple)) else [adapter] * batch
    if len(names) != batch:
        raise ServingError(f"adapter has {len(names)} names for {batch} rows; give one for each row, or one for all")
    return names


def row_ids(stack: Stack, adapter: object, batch: int) -> NDArray[np.int64]:
    """The ids of a batch's rows.

    Args:
        stack: The adapters.
        adapter: The name of one for all rows, one for each row, or None for the base; likewise for each row.
        batch: How many rows there are.

    Raises:
        ServingError: An adapter is not loaded, or there are not as many names as rows.
    """
    names = names_of_rows(adapter, batch)
    ids = stack.ids
    unknown = [name for name in names if name is not None and not (isinstance(name, str) and name in ids)]
    if unknown:
        loaded = listed(map(repr, ids)) or "none"
        raise ServingError(f"no adapter {shown(unknown[0])} is loaded; there are {loaded}: load it with load_adapter()")
    return np.array([BASE if name is None else ids[name] for name in names], dtype=np.int64)


def _stacked_site(
    site: AdapterSite, adapters: Mapping[int, Arrays], count: int, inputs: AdapterInputs
) -> Iterator[tuple[str, NDArray[Any]]]:
    """A layer's tensors of all adapters, `[adapters, ...]`, zeros where there is none.

    Ranks are padded within the part of each pair of blocks: with s = r / k, columns `j * s` to `(j + 1) * s` of `A`
    belong to output block j, and so for the rows of `B`.
    """
    given = {number: site.parts(tensors) for number, tensors in adapters.items()}
    r = max((A.shape[2] for A, *_ in given.values() if A is not None), default=0)
    hybrid_r = max((general.shape[1] for _, _, general, *_ in given.values() if general is not None), default=0)
    for place, (name, shape) in zip(_places(site, inputs.k), site.shapes(inputs.k, r, hybrid_r).items(), strict=True):
        stacked = cast(np.zeros((count, *map(int, shape)), np.float32), inputs.dtype)
        for number, tensors in adapters.items():
            if name in tensors:
                own = tensors[name]
                within = tuple(slice(size) for size in place(own).shape)
                place(stacked[number])[within] = place(own)
        yield name, stacked


def _places(site: AdapterSite, k: int) -> Iterator[Callable[[NDArray[Any]], NDArray[Any]]]:
    """For each tensor at a layer, the view of it in which a smaller one is padded at the end of each axis."""
    k, ins, outs = site.blocks(k), site.in_features, site.out_features

    def of_A(array: NDArray[Any]) -> NDArray[Any]:
        return array.reshape(k, ins // k, k, array.shape[-1] // k)

    def of_B(array: NDArray[Any]) -> NDArray[Any]:
        return array.reshape(k, k, array.shape[1] // k, outs // k)

    yield from (of_A, of_B) if k else ()
    yield from [lambda array: array] * (len(site.names(k)) - (2 if k else 0))


def mixed(parts: Sequence[tuple[Arrays, float]], inputs: AdapterInputs) -> dict[str, NDArray[Any]]:
    """The adapter whose update is the weighted sum of others'.

    The weights become part of the `B` tensors, in float32, rounded once. Each block pair (j, n) of GraLoRA has its own
    s columns of `A[n]` and rows of `B[j]`, so those are joined pair by pair; plain LoRA's are joined as they are.
    Changes of biases are added.

    Args:
        parts: The tensors of each adapter by name, and its weight; at least one.
        inputs: The adapter tensors of the export.

    Returns:
        Tensors by name at every layer that one of them adapts.
    """
    tensors: dict[str, NDArray[Any]] = {}
    for site in inputs.sites:
        names = site.names(inputs.k)
        found = [(arrays, weight) for arrays, weight in parts if names[0] in arrays]
        if found:
            tensors |= dict(zip(names, _sum_at(site, found, inputs.k), strict=True))
    return tensors


def _sum_at(site: AdapterSite, found: Sequence[tuple[Arrays, float]], k: int) -> Iterator[NDArray[Any]]:
    """The sum's tensors at a layer, in the order of their names."""
    parts = [(site.parts(arrays), weight) for arrays, weight in found]
    blocks = [(A, _scaled(B, weight)) for (A, B, *_), weight in parts if A is not None and B is not None]
    if blocks:
        yield from _blocks(site, blocks, k)
    general = [(A, _scaled(B, weight)) for (_, _, A, B, _), weight in parts if A is not None and B is not None]
    if general:
        yield np.concatenate([A for A, _ in general], 1)
        yield np.concatenate([B for _, B in general], 0)
    biases = [bias.astype(np.float32) * weight for (*_, bias), weight in parts if bias is not None]
    if biases:
        dtype = next(bias.dtype for (*_, bias), _ in parts if bias is not None)
        yield sum(biases[1:], biases[0]).astype(dtype)


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
    """An array times a weight, in its own dtype."""
    found: NDArray[Any] = array if weight == 1.0 else (array.astype(np.float32) * weight).astype(array.dtype)
    return found

"""The adapters of a batched export, stacked: each has an id, by which rows of a batch choose it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gralora_fx.errors import ServingError, listed, shown
from gralora_fx.runtime.adapter_arrays import Arrays, as_ort_value, cast
from gralora_fx.runtime.adapter_file import read_tensors
from gralora_fx.runtime.adapter_inputs import AdapterInputs, AdapterSite
from gralora_fx.runtime.adapter_record import check_name, check_rank, read_record

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


class AdapterStack:
    """The adapters that a batched export can choose among.

    An id stays that of its adapter until the adapter is unloaded. The tensors are stacked anew when a run needs an
    adapter that the last stack lacks, padded with zeros to the largest rank at each layer. Runs in other threads go on
    with the stack that they have, and wait for none that is being made for adapters of others.
    """

    def __init__(self, inputs: AdapterInputs, fingerprint: str | None, max_rank: int | None = None) -> None:
        """Begin without adapters.

        Args:
            inputs: The adapter tensors of the export.
            fingerprint: Fingerprint of its base.
            max_rank: The largest rank that an adapter may have; None for no limit.
        """
        self._inputs, self._fingerprint, self._max_rank = inputs, fingerprint, max_rank
        self._adapters: dict[str, tuple[int, Arrays]] = {}
        self._stack: Stack | None = None
        self._lock, self._stacking = threading.Lock(), threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters, in the order of their ids."""
        return tuple(sorted(self._adapters, key=lambda name: self._adapters[name][0]))

    def load_adapter(self, name: str, path: str | Path, *, exist_ok: bool = False) -> int:
        """Add an adapter.

        Args:
            name: What to call it.
            path: Its `.onnx_adapter` file.
            exist_ok: Whether there may be one of the name, which then stays.

        Returns:
            Its id.

        Raises:
            ServingError: The name is taken or is not one, or the file is damaged or does not fit.
        """
        check_name(name, ServingError)
        file = Path(path)
        record = read_record(file, ServingError)
        check_rank(file, record, self._max_rank, ServingError)
        tensors = read_tensors(file, record, self._inputs, self._fingerprint, ServingError)
        return self.add(name, tensors, exist_ok=exist_ok)

    def add(self, name: str, tensors: Arrays, *, exist_ok: bool = False) -> int:
        """Add an adapter of tensors that fit the export; its id.

        Args:
            name: What to call it.
            tensors: Its tensors.
            exist_ok: Whether there may be one of the name, which then stays.

        Raises:
            ServingError: The name is taken.
        """
        with self._lock:
            if name in self._adapters and exist_ok:
                return self._adapters[name][0]
            if name in self._adapters:
                raise ServingError(f"there is an adapter {name!r} already; unload it first, or take another name")
            taken = {number for number, _ in self._adapters.values()}
            number = next(number for number in range(1, len(taken) + 2) if number not in taken)
            self._adapters = {**self._adapters, name: (number, tensors)}
        return number

    def unload_adapter(self, name: str) -> None:
        """Remove an adapter, and free its memory once no run has its stack; the ids of others stay.

        Raises:
            ServingError: There is none of the name.
        """
        with self._lock:
            self._check_known(name)
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

    def id_of(self, name: str | None) -> int:
        """The id of an adapter; that of the base for None.

        Raises:
            ServingError: There is none of the name.
        """
        if name is None:
            return BASE
        self._check_known(name)
        return self._adapters[name][0]

    def _check_known(self, name: object) -> None:
        if not isinstance(name, str) or name not in self._adapters:
            raise _not_loaded(name, self.names)

    def _stacked(self, adapters: Mapping[str, tuple[int, Arrays]]) -> dict[str, Any]:
        by_id = dict(adapters.values())
        count = 1 + max(by_id, default=0)
        return {
            name: as_ort_value(array)
            for site in self._inputs.sites
            for name, array in _stacked_site(site, by_id, count, self._inputs)
        }


def row_ids(stack: Stack, adapter: object, batch: int) -> NDArray[np.int64]:
    """The ids of a batch's rows.

    Args:
        stack: The adapters.
        adapter: The name of one for all rows, one for each row, or None for the base; likewise for each row.
        batch: How many rows there are.

    Raises:
        ServingError: An adapter is not loaded, or there are not as many names as rows.
    """
    names: Sequence[Any] = adapter if isinstance(adapter, (list, tuple)) else [adapter] * batch
    if len(names) != batch:
        raise ServingError(f"adapter has {len(names)} names for {batch} rows; give one for each row, or one for all")
    ids = stack.ids
    unknown = [name for name in names if name is not None and not (isinstance(name, str) and name in ids)]
    if unknown:
        raise _not_loaded(unknown[0], ids)
    return np.array([BASE if name is None else ids[name] for name in names], dtype=np.int64)


def _not_loaded(name: object, names: Iterable[str]) -> ServingError:
    loaded = listed(map(repr, names)) or "none"
    return ServingError(f"no adapter {shown(name)} is loaded; there are {loaded}: load it with load_adapter()")


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

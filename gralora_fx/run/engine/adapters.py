"""The adapters of a served model by name, in memory once, in the form that each of its graphs takes."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakSet

import numpy as np

from gralora_fx.base.sources import ACTING
from gralora_fx.base.sources.model_files import usable_path
from gralora_fx.errors import ConfigError, ServingError, command, listed, marked, remedy, shown
from gralora_fx.format.adapter_inputs import ADAPTER_IDS, BASE, AdapterInputs
from gralora_fx.format.adapter_paths import SUFFIX, check_name, check_takes_adapters, is_name, own_adapters
from gralora_fx.format.manifest import Manifest
from gralora_fx.run.sessions.session_views import adapter_values, empty_adapter

if TYPE_CHECKING:  # loaded where rows share what they read, and where there are adapters
    from gralora_fx.run.engine.prefix_cache import PrefixCache
    from gralora_fx.run.sessions.adapter_arrays import Arrays
    from gralora_fx.run.sessions.adapter_file import AdapterRecord, AdapterSource

AdapterNames: TypeAlias = str | Sequence[str | None] | None  # the adapter of all rows, or of each; None for the base
_STACKED = 16  # a stack holds all loaded adapters up to this number


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """An adapter in memory, compared by identity.

    Attributes:
        name: Its name.
        record: The record of its file, or for a sum of adapters a record as its file would have.
        tensors: Its tensors, by name.
    """

    name: str
    record: AdapterRecord
    tensors: Arrays

    @cached_property
    def values(self) -> dict[str, Any]:
        """Its tensors as a session's inputs."""
        from gralora_fx.run.sessions.adapter_arrays import as_ort_value

        return {name: as_ort_value(array) for name, array in self.tensors.items()}

    @cached_property
    def size(self) -> int:
        """Bytes of its tensors."""
        return sum(array.nbytes for array in self.tensors.values())

    @cached_property
    def acts_from(self) -> tuple[int, ...]:
        """The tokens whose last occurrence in a prompt activates it; empty if it is always active."""
        if self.record.config.get(ACTING) is None:
            return ()
        from gralora_fx.core.config.checks import acts_from

        try:
            return acts_from(self.record.config)
        except ConfigError as error:
            raise ServingError(f"the record of adapter {self.name!r}: {marked(error)}; make it again") from error

    @cached_property
    def number(self) -> int:
        """A number that is unique among the adapters of the process."""
        return next(_numbers)

    def start_in(self, tokens: Sequence[int]) -> int | None:
        """Return how many tokens of a prompt come before the adapter is active; None if it is always active.

        Raises:
            NotInvokedError: The prompt lacks the tokens that activate it.
        """
        if not self.acts_from:
            return None
        from gralora_fx.base.features import parts

        starts = [part.start_in_prompt(tokens, self.acts_from) for part in parts("acting tokens")]
        if not starts or starts[0] is None:
            raise NotInvokedError(self)
        start: int = starts[0]
        return start

    def check_acts_everywhere(self, purpose: str) -> None:
        """Check that it acts on all tokens, for a purpose that would let it."""
        if self.acts_from:
            from gralora_fx.core.config.checks import check_acts_everywhere

            check_acts_everywhere(self.acts_from, f"adapter {self.name!r}", purpose, ServingError)


class NotInvokedError(ServingError):
    """A prompt lacks the tokens that activate its adapter.

    Attributes:
        adapter: The adapter.
        text: The text of the missing tokens, if known.
    """

    def __init__(self, adapter: LoadedAdapter, text: str | None = None, name: str | None = None) -> None:
        """Name the missing tokens, as text if possible, and the adapter, as `name` if a request calls it so."""
        tokens = shown(list(adapter.acts_from)) + ("" if text is None else f", {shown(text)}")
        super().__init__(
            f"adapter {(name or adapter.name)!r} acts from its tokens {tokens} on, and the prompt lacks them; put them "
            "where its answer begins, or name no adapter"
        )
        self.adapter, self.text = adapter, text


_numbers = itertools.count(1)


@dataclass(frozen=True)
class Stack:
    """Adapters stacked for `model_rows.onnx`, each with an id by which rows of a batch choose it.

    Attributes:
        ids: The id of each adapter, and of None, the base.
        values: The export's adapter tensors as `OrtValue`s, by name.
        only: The same without the base, for steps of its one adapter that read at most `only_tokens`; None if there are
            several adapters.
        only_tokens: Beyond so many tokens the last bits would depend on whether the base is in the stack.
    """

    ids: Mapping[LoadedAdapter | None, int]
    values: Mapping[str, Any]
    only: Mapping[str, Any] | None = None
    only_tokens: int = 0

    @classmethod
    def of(cls, adapters: Iterable[LoadedAdapter], inputs: AdapterInputs) -> Stack:
        """Stack adapters, each once."""
        from gralora_fx.run.sessions.adapter_arrays import stacked

        ids: dict[LoadedAdapter | None, int] = {None: BASE}
        for adapter in adapters:
            ids.setdefault(adapter, len(ids))
        return cls(ids, stacked([adapter.tensors for adapter in ids if adapter is not None], inputs))


def names_of_rows(adapter: object, batch: int) -> list[Any]:
    """Return the adapter name given for each row."""
    names = list(adapter) if isinstance(adapter, (list, tuple)) else [adapter] * batch
    if len(names) != batch:
        raise ServingError(f"adapter has {len(names)} names for {batch} rows; give one for each row, or one for all")
    return names


class Adapters(Mapping[str, LoadedAdapter]):
    """The adapters that a call can name; any thread may load and unload some while others run.

    Adapters in the export's own directory are loaded on first use.
    """

    def __init__(self, directory: Path, manifest: Manifest, max_rank: int | None = None) -> None:
        """Start with none loaded."""
        self._directory, self._manifest, self._max_rank = directory, manifest, max_rank
        self._loaded: dict[str, LoadedAdapter] = {}
        self._stack: Stack | None = None
        self._lock, self._stacking = threading.Lock(), threading.Lock()
        self._prefixes: WeakSet[PrefixCache] = WeakSet()

    def __getitem__(self, name: str) -> LoadedAdapter:
        """Return an adapter that is loaded, or load it from the export's own directory."""
        if isinstance(name, str) and (found := self._loaded.get(name)) is not None:
            return found
        self.inputs()
        if not isinstance(name, str):
            raise ServingError(f"{shown(name)} is not the name of an adapter; give a string, or None for the base")
        path = own_adapters(self._directory, ServingError).get(name)
        if path is None:
            names = listed(self.available()) or "none"
            raise ServingError(
                f"no adapter {shown(name)}; there is {names}: load it with "
                f"{remedy('load_adapter()', '--adapter NAME=PATH')}"
            )
        return self.load(name, path, exist_ok=True)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names that a call can use (see `available`)."""
        return iter(self.available())

    def __len__(self) -> int:
        """Return the number of adapters that a call can name."""
        return len(self.available())

    def __contains__(self, name: object) -> bool:
        """Return whether a call can name an adapter, without loading it."""
        return name in self.available()

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the adapters that are in memory."""
        return tuple(sorted(self._loaded))

    def available(self) -> list[str]:
        """List the adapters that are loaded or in the export's own directory."""
        return sorted({*self._loaded, *filter(is_name, own_adapters(self._directory, ServingError))})

    def to_bind(self, name: str | None) -> dict[str, Any]:
        """Return a tensor for every adapter input: an adapter's, of rank 0 where it has none, or the base's."""
        inputs = self.inputs()
        return empty_adapter(inputs) | ({} if name is None else self[name].values)

    def tensors_for(self, adapter: str | LoadedAdapter | None, session: Any) -> dict[str, Any]:
        """Return the adapter inputs of a session over a graph with one adapter a run, for an adapter or the base."""
        inputs = self._manifest.adapter_inputs
        own = adapter if adapter is None or isinstance(adapter, LoadedAdapter) else self[adapter]
        values = {} if own is None else own.values
        return values if inputs is None else adapter_values(values, inputs, session)

    def tell(self, cache: PrefixCache) -> None:
        """Register a prefix cache, which drops the entries of an adapter that is unloaded."""
        with self._lock:
            self._prefixes.add(cache)

    def stack_of(self, used: Sequence[LoadedAdapter]) -> Stack:
        """Return a stack with some adapters, including ones unloaded or replaced since.

        It holds all loaded adapters if they are few, and is rebuilt when a run needs one that the last stack lacks.
        Runs in other threads keep their stack, and do not wait for a stack that is built for other adapters.
        """
        if (found := self._stack_with(used)) is not None:
            return found
        inputs, loaded = self.inputs(), self._loaded
        if len(loaded) > _STACKED or any(loaded.get(adapter.name) is not adapter for adapter in used):
            return Stack.of(used, inputs)  # freed with the rows
        with self._stacking:
            if (found := self._stack_with(used)) is None:
                found = Stack.of(loaded.values(), inputs)
                if all(self._loaded.get(name) is adapter for name, adapter in loaded.items()):
                    self._stack = found  # a later unload frees it
            return found

    def _stack_with(self, used: Sequence[LoadedAdapter]) -> Stack | None:
        """Return the last stack if it has some adapters, or None."""
        stack = self._stack
        return stack if stack is not None and all(adapter in stack.ids for adapter in used) else None

    def rows(self, adapter: object, count: int) -> dict[str, Any]:
        """Return the adapter inputs of a graph with an adapter per row: the stack, and each row's id."""
        chosen = [None if name is None else self[name] for name in names_of_rows(adapter, count)]
        for each in filter(None, chosen):
            each.check_acts_everywhere("a call (generate finds where it acts)")
        stack = self.stack_of([each for each in chosen if each is not None])
        return {**stack.values, ADAPTER_IDS: np.array([stack.ids[each] for each in chosen], dtype=np.int64)}

    def load(self, name: str, path: AdapterSource, *, exist_ok: bool = False) -> LoadedAdapter:
        """Load an adapter file, checked against its record and the export."""
        inputs = self.inputs()
        check_name(name, ServingError)
        from gralora_fx.format.adapter_format import AdapterContent
        from gralora_fx.run.sessions.adapter_file import AdapterInMemory, check_rank, read_record, read_tensors

        if isinstance(path, AdapterInMemory):
            check_rank("the adapter", path.record, self._max_rank)
            return self._add(LoadedAdapter(name, path.record, path.tensors), exist_ok=exist_ok)
        content = path if isinstance(path, AdapterContent) else None
        file = path.path if isinstance(path, AdapterContent) else _file(path)
        record = read_record(file, ServingError, content)
        check_rank(file, record, self._max_rank)
        tensors = read_tensors(file, record, inputs, self._manifest.base_fingerprint, ServingError, content)
        return self._add(LoadedAdapter(name, record, tensors), exist_ok=exist_ok)

    def mix(self, name: str, weights: Mapping[str, float]) -> LoadedAdapter:
        """Load the weighted sum of adapters under a new name; unloading one of them does not change the sum."""
        inputs = self.inputs()
        check_name(name, ServingError)
        if not isinstance(weights, Mapping) or not weights:
            raise ServingError(f"weights must be a dict from adapters to numbers, but got {shown(weights)}")
        wrong = [part for part, weight in weights.items() if not _is_number(weight)]
        if wrong:
            raise ServingError(f"the weight of {shown(wrong[0])} is {shown(weights[wrong[0]])}, not a finite number")
        for part in weights:
            self[part].check_acts_everywhere("a sum")
        parts = [(self[part].tensors, float(weight)) for part, weight in weights.items()]
        configs = {part: {"weight": float(weights[part]), "config": self[part].record.config} for part in weights}
        from gralora_fx.run.sessions.adapter_arrays import mixed
        from gralora_fx.run.sessions.adapter_file import check_rank, record_in_memory

        tensors = mixed(parts, inputs)
        large = [tensor for tensor, array in tensors.items() if not np.isfinite(array.astype(np.float32)).all()]
        if large:
            raise ServingError(f"{large[0]} of {name!r} holds values that are not finite; give smaller weights")
        record = record_in_memory(name, tensors, {"sum_of": configs}, inputs, self._manifest.base_fingerprint)
        check_rank(name, record, self._max_rank)
        return self._add(LoadedAdapter(name, record, tensors))

    def unload(self, name: str) -> None:
        """Unload an adapter; calls that already run with it are not affected."""
        self.inputs()
        with self._lock:
            if not isinstance(name, str) or name not in self._loaded:
                raise ServingError(f"no adapter {shown(name)} is loaded; loaded is {listed(self) or 'none'}")
            gone = self._loaded[name]
            self._loaded = {other: adapter for other, adapter in self._loaded.items() if other != name}
            for cache in self._prefixes:
                cache.drop(gone)
            with self._stacking:  # frees the memory of the stack that has it, once no run does
                if self._stack is not None:
                    self._stack = Stack.of(self._loaded.values(), self.inputs()) if self._loaded else None

    def _add(self, adapter: LoadedAdapter, *, exist_ok: bool = False) -> LoadedAdapter:
        adapter.acts_from  # noqa: B018  # which its record may say wrongly
        name = adapter.name
        with self._lock:
            if name in self._loaded and exist_ok:
                return self._loaded[name]
            if name in self._loaded:
                raise ServingError(f"an adapter {name!r} is loaded already; unload it first, or take another name")
            self._loaded = {**self._loaded, name: adapter}
        return adapter

    def inputs(self) -> AdapterInputs:
        """Return the export's inputs for adapters."""
        return check_takes_adapters(self._manifest, self._directory, ServingError)


def _is_number(value: object) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # of a whole number
        return False


def _file(path: str | Path) -> Path:
    """Return the absolute path of an adapter file; its reader checks that it exists."""
    file = usable_path(path, ServingError, remedy="give the path of an .onnx_adapter file").absolute()
    if not file.exists():
        raise ServingError(f"there is no {file}; give the path of an {SUFFIX} file")
    if file.is_dir() or file.suffix != SUFFIX:
        raise ServingError(f"{file} is not an {SUFFIX} file; {command('export_adapter')} makes one of a PEFT adapter")
    return file

"""The adapters that a served model has: loaded once, checked, chosen by name in every call."""

from __future__ import annotations

import itertools
import math
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gralora_fx.errors import ServingError, listed, shown
from gralora_fx.runtime.adapter_arrays import as_arrays
from gralora_fx.runtime.adapter_file import read_tensors, record_of, write_tensors
from gralora_fx.runtime.adapter_inputs import BATCHED, INPUTS
from gralora_fx.runtime.adapter_mix import mixed
from gralora_fx.runtime.adapter_record import SUFFIX, AdapterRecord, check_name, check_rank, read_record, record_path
from gralora_fx.runtime.adapter_session import adapter_values, empty_adapter, with_adapter
from gralora_fx.runtime.manifest import Manifest
from gralora_fx.serving.adapter_folder import adapter_path, own_adapters


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter in memory.

    Attributes:
        path: The file that it was read from.
        record: What the file's record says.
        values: Its tensors as a session takes them, by name.
        session: The model's session, run with them.
    """

    path: Path
    record: AdapterRecord
    values: Mapping[str, Any]
    session: Any


class Adapters(Mapping[str, LoadedAdapter]):
    """The adapters of a served model, by name; any thread may load and unload some while others run.

    Those in the export's own directory are loaded when they are first asked for.
    """

    def __init__(self, directory: Path, manifest: Manifest, session: Any, max_rank: int | None = None) -> None:
        """Start with none loaded.

        Args:
            directory: The export directory.
            manifest: Its manifest.
            session: The session over its model.
            max_rank: The largest rank that an adapter may have; None for no limit.
        """
        self._directory, self._manifest = directory, manifest
        self._session, self._max_rank = session, max_rank
        self._loaded: dict[str, LoadedAdapter] = {}
        self._lock = threading.Lock()
        self._count = itertools.count()  # of sums
        inputs = manifest.adapter_inputs
        self.base_session = session if inputs is None else with_adapter(session, adapter_values({}, inputs))

    def __getitem__(self, name: str) -> LoadedAdapter:
        """An adapter that is loaded, or that the export's own directory holds.

        Raises:
            ServingError: There is none of the name, the export takes no adapters, or the file may not be used.
        """
        self._check_takes_adapters()
        if not isinstance(name, str):
            raise ServingError(f"adapter must be one name or None, but got {shown(name)}: one adapter runs in a call")
        found = self._loaded.get(name)
        if found is not None:
            return found
        path = own_adapters(self._directory).get(name)
        if path is None:
            names = listed(self.available()) or "none"
            raise ServingError(f"no adapter {name!r}; there is {names}: load it with load_adapter")
        return self.load(name, path, exist_ok=True)

    def __iter__(self) -> Iterator[str]:
        """Names of the adapters that are loaded."""
        return iter(sorted(self._loaded))

    def __len__(self) -> int:
        """How many are loaded."""
        return len(self._loaded)

    def available(self) -> list[str]:
        """Names of the adapters that are loaded, and of those that the export's own directory holds."""
        return sorted({*self._loaded, *own_adapters(self._directory)})

    def to_bind(self, name: str | None) -> dict[str, Any]:
        """A tensor for every adapter input: those of an adapter, of rank 0 where it has none, or for the base.

        Raises:
            ServingError: There is no such adapter.
        """
        inputs = self._check_takes_adapters()
        return empty_adapter(inputs) | ({} if name is None else dict(self[name].values))

    def required(self, name: str | None) -> dict[str, Any]:
        """The tensors that every run must be given, as arrays: none where they are initializers with a default.

        Raises:
            ServingError: There is no such adapter.
        """
        inputs = self._manifest.adapter_inputs
        if inputs is None or inputs.mode != INPUTS:
            return {}
        return {tensor: value.numpy() for tensor, value in self.to_bind(name).items()}

    def session(self, name: str | None) -> Any:
        """The session that runs with an adapter, or without one.

        Raises:
            ServingError: There is no such adapter.
        """
        return self.base_session if name is None else self[name].session

    def load(self, name: str, path: str | Path, *, exist_ok: bool = False) -> LoadedAdapter:
        """Load an adapter file, checked against its record and the export.

        Args:
            name: The name to give it here.
            path: The `.onnx_adapter` file.
            exist_ok: Whether an adapter of the name may be loaded already, which is then returned.

        Raises:
            ServingError: The name is taken or invalid, or the file may not be used; the message says why.
        """
        inputs = self._check_takes_adapters()
        check_name(name, ServingError)
        file = adapter_path(path)
        record = read_record(file, ServingError)
        check_rank(file, record, self._max_rank, ServingError)
        tensors = read_tensors(file, record, inputs, self._manifest.base_fingerprint, ServingError)
        values = adapter_values(tensors, inputs)
        adapter = LoadedAdapter(file, record, values, with_adapter(self._session, values))
        with self._lock:
            if name in self._loaded and exist_ok:
                return self._loaded[name]
            if name in self._loaded:
                raise ServingError(f"an adapter {name!r} is loaded already; unload it first, or take another name")
            self._loaded = {**self._loaded, name: adapter}
        return adapter

    def mix(self, name: str, weights: Mapping[str, float]) -> LoadedAdapter:
        """Load the weighted sum of adapters under a name of its own; unloading one of them leaves the sum as it is.

        Args:
            name: The name of the sum.
            weights: A weight for each adapter, by name.

        Raises:
            ServingError: The name is taken or invalid, there is no such adapter, a weight is not a finite number, or
                the sum's rank is above the limit or its values are too large for their dtype.
        """
        inputs = self._check_takes_adapters()
        check_name(name, ServingError)
        if not isinstance(weights, Mapping) or not weights:
            raise ServingError(f"weights must be a dict from adapters to numbers, but got {shown(weights)}")
        wrong = [part for part, weight in weights.items() if not _is_number(weight)]
        if wrong:
            raise ServingError(f"the weight of {shown(wrong[0])} is {shown(weights[wrong[0]])}, not a finite number")
        parts = [(as_arrays(self[part].values), float(weight)) for part, weight in weights.items()]
        configs = {part: {"weight": float(weights[part]), "config": self[part].record.config} for part in weights}
        file = Path(self._folder.name) / f"{next(self._count)}{SUFFIX}"
        tensors = mixed(parts, inputs)
        write_tensors(file, tensors)
        record = record_of(file, name, tensors, {"sum_of": configs}, inputs, self._manifest.base_fingerprint)
        record_path(file).write_text(record.to_json(), encoding="utf-8")
        return self.load(name, file)

    @cached_property
    def _folder(self) -> tempfile.TemporaryDirectory[str]:
        """Where sums are written, since onnxruntime-genai reads a file; made for the first."""
        return tempfile.TemporaryDirectory(prefix="gralora-fx-")

    def unload(self, name: str) -> LoadedAdapter:
        """Forget an adapter, which is returned; calls that run with it end undisturbed.

        Raises:
            ServingError: It is not loaded.
        """
        self._check_takes_adapters()
        with self._lock:
            if name not in self._loaded:
                raise ServingError(f"no adapter {shown(name)} is loaded; loaded is {listed(self) or 'none'}")
            found = self._loaded[name]
            self._loaded = {other: adapter for other, adapter in self._loaded.items() if other != name}
        return found

    def _check_takes_adapters(self) -> Any:
        inputs = self._manifest.adapter_inputs
        if inputs is None:
            raise ServingError(
                f"{self._directory} takes no adapters: it was exported with adapters='merged'; export the model with "
                "adapters='swappable'"
            )
        if inputs.mode == BATCHED:
            raise ServingError(
                f"the rows of {self._directory} have an adapter each; give them in a call, adapter=[...], or export "
                "the model with adapters='swappable'"
            )
        return inputs


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

"""The adapter store: load, use, evict and try adapters; those given at start come first."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.core.loading.tokenizers import prompt_ids
from gralora_fx.errors import GraloraError, ServingError, first_line, listed, marked, shown, warn_caller
from gralora_fx.format.adapter_paths import adapter_path, check_name, check_takes_adapters
from gralora_fx.format.manifest import read_manifest
from gralora_fx.run.engine.cache_memory import Source
from gralora_fx.run.generate.request_errors import (
    AdapterLoadError,
    AdapterNameError,
    UnknownAdapterError,
    UnknownModelError,
)
from gralora_fx.run.model import OrtModel
from gralora_fx.run.open_export import adapter_as_data
from gralora_fx.service.adapter_store.adapter_versions import (
    AdapterLimits,
    AdapterVersion,
    GivenFile,
    RootFile,
    RootFiles,
)
from gralora_fx.service.adapter_store.memory import AdapterMemory
from gralora_fx.service.adapter_store.pending_loads import PendingLoads


@dataclass(frozen=True)
class AdapterTrial:
    """Runs the model once with an adapter; a file that passed is not tried again.

    Attributes:
        run: Runs the model with the adapter of a key (None for the base) and returns its outputs.
        model: Holds the adapters.
        by_requests: Whether an adapter loaded for a request is tried by that request: its outputs are checked
            (see `AdapterStore.check_outputs`).
    """

    run: Callable[[str | None], Sequence[NDArray[Any]]]
    model: OrtModel
    by_requests: bool = False
    _passed: set[str] = field(default_factory=set, init=False)

    @cached_property
    def _base(self) -> list[NDArray[Any]]:
        """Masks of where the base's outputs are finite."""
        return [np.isfinite(output) for output in self.run(None)]

    def __call__(self, key: str) -> None:
        """Try a loaded adapter."""
        digest = self.model.adapters[key].record.file_sha256
        if digest in self._passed:
            return
        try:
            outputs = self.run(key)
        except Exception as error:  # whatever it is, the adapter cannot be served
            raise ServingError(f"the model does not run with the adapter ({first_line(error)})") from error
        if any((is_finite & ~np.isfinite(output)).any() for is_finite, output in zip(self._base, outputs, strict=True)):
            raise ServingError("the model's outputs with the adapter are not finite; train it again, or give another")
        if digest:
            self._passed.add(digest)


def try_decoder(model: OrtModel) -> AdapterTrial:
    """Return a trial for a decoder, which runs in one row of its own."""
    token, source = example_prompt(model)
    decoder = model.decoder(rows=1, capacity=1, chunk=1)

    def run(key: str | None) -> list[NDArray[Any]]:
        row = decoder.open(key, source, start=0)  # start where the adapter acts, or the base would run
        try:
            return [decoder.step({row: [token]})[row]]
        finally:
            decoder.close(row)

    return AdapterTrial(run, model, by_requests=True)


def example_prompt(model: OrtModel) -> tuple[int, Source | None]:
    """Return a token that a decoder may read first, and an example encoder input of an encoder-decoder."""
    ids = prompt_ids("a", model.required_tokenizer, ServingError)
    inputs = model.encoder_inputs
    if inputs is None:
        return ids[-1], None  # the padding token may have an embedding of zeros
    return inputs.rules.start, inputs.example(ids).arrays


class AdapterStore(AdapterMemory):
    """The models that requests may name: the base, adapters in memory, and those of a root, loaded on first use.

    Changed files are a new version, which requests wait for; an adapter whose files are gone is gone. While new files
    cannot be loaded, the version in memory keeps serving.

    Attributes:
        base: The name of the model without an adapter.
        trial: Tries a loaded adapter.
        files: The adapters of the root; None without a root: the set of adapters is then fixed.
        pending: Loads that requests wait for.
    """

    trial: AdapterTrial  # set once the engine that uses this store exists

    def __init__(self, base: str, host: OrtModel, limits: AdapterLimits | None = None) -> None:
        """Take over the adapters that the host already has; they are never unloaded (see `AdapterMemory`)."""
        super().__init__(host, limits)
        self.base = base
        self.files: RootFiles | None = None
        self.pending = PendingLoads(self, self.load_found)

    @property
    def available(self) -> tuple[str, ...]:
        """Names of the adapters that requests may use."""
        return tuple(sorted({*self._serving, *([] if self.files is None else self.files.names())} - {self.base}))

    def knows(self, model: str) -> bool:
        """Return whether requests may name this model."""
        return model == self.base or model in self._serving or self._find(model) is not None

    def check(self, model: str) -> None:
        """Raise an `UnknownModelError` for a model that requests may not name."""
        if not self.knows(model):
            raise self._unknown(model)

    def check_adapter(self, name: str) -> None:
        """Raise an `UnknownAdapterError` if there is no adapter of this name."""
        if name == self.base or not self.knows(name):
            raise UnknownAdapterError(
                f"no adapter {shown(name)} is loaded; loaded is {listed(self.adapters) or 'none'}"
            )

    async def load(self, name: str, path: str, *, may_replace: bool, pin: bool) -> None:
        """Load the adapter at a path of the root under a name; raise as `stage` does.

        `may_replace`: another adapter may lose the name. `pin`: it stays in memory until it is evicted by name.
        """
        files = self.files
        assert files is not None

        def work() -> None:
            self.serve(self.stage(name, files.at(path, looks=not pin), may_replace=may_replace, pin=pin))

        await self.changed(work)

    @asynccontextmanager
    async def use(self, model: str, seconds: float | None = None) -> AsyncIterator[str | None]:
        """Hold the version of a model while the block runs and yield its key; None for the base.

        A queue takes its own hold for submitted requests, so the block only has to last until they are queued.

        Raises:
            UnknownModelError: There is no such model.
            ServingError: It cannot be loaded, or not within `seconds`.
        """
        key = None if model == self.base else (await self._held(model, seconds)).key
        try:
            yield key
        finally:
            self.release(key)

    async def evict(self, name: str) -> None:
        """Hide an adapter's name until a request loads it again; running requests finish undisturbed."""
        await self.changed(lambda: self.drop(name))

    async def changed(self, work: Callable[[], None]) -> None:
        """Run a change of adapters; it completes even if the client disconnects."""
        await asyncio.shield(asyncio.wrap_future(self.change(work)))
        self.pending.forget_limits()

    def stage(self, name: str, file: GivenFile | RootFile, *, may_replace: bool, pin: bool = True) -> AdapterVersion:
        """Load and try a version without serving it yet; return it held; call within a change."""
        return self._load(name, file, may_replace=may_replace, pin=pin, is_tried=True)

    def serve(self, version: AdapterVersion) -> None:
        """Serve a staged version under its name; call within a change."""
        if self.files is not None:
            self.files.give_name(version.name, None if version.file is None else version.file.path)
        self.give_name(version)
        self.release(version.key)

    def drop(self, name: str) -> None:
        """Evict an adapter, or raise an `UnknownAdapterError`; call within a change."""
        self.check_adapter(name)
        version = self._serving.get(name)
        if version is not None:
            self.take_name(version)
        if self.files is not None:
            self.files.take_name(name)

    def check_outputs(self, key: str | None, outputs: NDArray[Any]) -> None:
        """Try a version by its first request's outputs; if it fails, hide its name and do not read its files again."""
        version = None if key is None else self._versions.get(key)
        if version is None or version.is_tried:
            return
        if not np.isfinite(outputs).all():
            try:
                self.trial(version.key)
            except ServingError as error:
                assert version.file is not None  # pinned versions are tried when they are loaded
                text = self.pending.refuse(version.name, version.file, error)
                self.take_name(version)
                raise AdapterLoadError(text) from error
        version.is_tried = True

    async def _held(self, name: str, seconds: float | None) -> AdapterVersion:
        end = None if seconds is None else time.monotonic() + seconds
        while True:
            file, version = self._find(name), self.hold_named(name)
            if version is not None:
                if version.file in (None, file):
                    return version
                self.release(version.key)  # it would take the room of the next one
            if file is None:
                if version is not None:
                    self.take_name(version)
                raise self._unknown(name)
            try:
                loaded = await self.pending.wait(name, file, end)
            except AdapterLoadError:
                older = self.hold_named(name)
                if older is None:
                    raise
                return older  # the new files are damaged, the old version still works
            if loaded.file == file:
                return loaded
            self.release(loaded.key)  # loaded from the files before this request

    def _find(self, name: str) -> RootFile | None:
        return None if self.files is None else self.files.find(name)

    def _unknown(self, model: str) -> UnknownModelError:
        others = "" if self.files is None else ", and those of the adapter root, which /v1/models lists"
        names = [self.base, *(name for name in self.adapters if name != model)]  # its files may be gone
        return UnknownModelError(f"no model {shown(model)}; there is {listed(names)}{others}")

    def load_found(self, name: str, file: RootFile) -> AdapterVersion:
        """Load an adapter that requests wait for; if trials are `by_requests`, the first request is the trial."""
        version = self._load(name, file, may_replace=True, pin=False, is_tried=not self.trial.by_requests)
        self.give_name(version)
        return version

    def _load(
        self, name: str, file: GivenFile | RootFile, *, may_replace: bool, pin: bool, is_tried: bool
    ) -> AdapterVersion:
        check_takes_adapters(self._host.manifest, self.base, ServingError)
        if name == self.base:
            raise AdapterNameError(f"{shown(name)} is the name of the base; take another")
        check_name(name, AdapterNameError)
        if name in self._serving and not may_replace:
            raise AdapterNameError(
                f"an adapter {name!r} is loaded already; give load_inplace to replace it, or unload it"
            )
        source = file.read(name, self._host.manifest)
        kept = None if pin or isinstance(file, GivenFile) else file
        return self.add(name, source, self.trial if is_tried else None, kept)


def load_given(store: AdapterStore, settings: ServiceSettings) -> None:
    """Load the adapters given at start; they take precedence over the export's own."""
    for name, path in settings.adapters.items():
        if name in store.adapters:
            warn_caller(f"{path} is served as {name!r}, and the export's own adapter of that name is not")
        with _named(name):
            store.serve(store.stage(name, GivenFile(path, settings.directory), may_replace=True))


@contextmanager
def converted(settings: ServiceSettings) -> Iterator[ServiceSettings]:
    """Convert the adapters of the settings to `.onnx_adapter` files, shared by several processes."""
    with tempfile.TemporaryDirectory(prefix="gralora-fx-") as folder:
        adapters: dict[str, Path] = {}
        manifest = read_manifest(settings.directory, ServingError)
        for name, path in settings.adapters.items():
            with _named(name):
                check_name(name, ServingError)
                check_takes_adapters(manifest, settings.base_name, ServingError)
                adapters[name] = adapter_as_data(adapter_path(path), settings.directory, Path(folder), name)
        yield replace(settings, adapters=adapters)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Prefix error messages with the adapter's name."""
    try:
        yield
    except GraloraError as error:
        start = f"adapter {shown(name)}"
        if str(error).startswith(start):
            raise
        raise error.reworded(f"{start}: {marked(error)}") from error

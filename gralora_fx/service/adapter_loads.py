"""One way for an adapter into a service, at its start and by requests: converted, checked, tried, and then named."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.errors import GraloraError, ServingError, shown, warn_caller
from gralora_fx.format.adapter_paths import adapter_path, check_name, check_takes_adapters
from gralora_fx.format.manifest import read_manifest
from gralora_fx.run.open_export import adapter_as_data, in_memory
from gralora_fx.run.sessions.adapter_file import AdapterSource
from gralora_fx.service.engines import Engine
from gralora_fx.service.scheduling.adapter_versions import AdapterVersion


def load_adapter(
    engine: Engine,
    name: str,
    source: Callable[[], AdapterSource],
    *,
    may_replace: bool,
    state: Hashable = None,
    pin: bool = True,
    defer_trial: bool = False,
) -> AdapterVersion:
    """Load an adapter that a name is to stand for, which `ServedModels.commit` lets it."""
    models = engine.models
    check_takes_adapters(engine.manifest, models.base, ServingError)
    models.check_new(name, replace=may_replace)
    is_deferred = defer_trial and engine.checks_outputs
    return models.prepare(
        name, source(), engine.trial, replace=may_replace, state=state, pin=pin, defer_trial=is_deferred
    )


def load_given(engine: Engine, settings: ServiceSettings) -> None:
    """Load the adapters that a service is started with; they take precedence over those of the export itself."""
    for name, path in settings.adapters.items():
        if name in engine.models.adapters:
            warn_caller(f"{path} is served as {name!r}, and the export's own adapter of that name is not")
        with _named(name):
            given = partial(_given, engine, name, path, settings.directory)
            engine.models.commit(load_adapter(engine, name, given, may_replace=True))


def _given(engine: Engine, name: str, path: Path, onnx_dir: Path) -> AdapterSource:
    """An adapter that is given: its file, or what a directory that PEFT saved holds."""
    file = adapter_path(path)
    return in_memory(file, onnx_dir, name, engine.manifest) if file.is_dir() else file


@contextmanager
def converted(settings: ServiceSettings) -> Iterator[ServiceSettings]:
    """Settings whose adapters are all `.onnx_adapter` files, for several processes that serve the same."""
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
    """Begin the message of an error with the adapter that it is about."""
    try:
        yield
    except GraloraError as error:
        start = f"adapter {shown(name)}"
        if str(error).startswith(start):
            raise
        raise type(error)(f"{start}: {error}") from error

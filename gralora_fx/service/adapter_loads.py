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
    """Load an adapter that a name is to stand for, which `ServedModels.commit` lets it.

    Args:
        engine: What runs it; no other change of its adapters may run meanwhile.
        name: The adapter's name.
        source: Gives the `.onnx_adapter` file, or the adapter itself.
        may_replace: Whether the name may be taken from another adapter.
        state: What its files are like, where they are looked at again; else None.
        pin: Whether it stays in memory until it is unloaded.
        defer_trial: Whether the first request with it tries it, where the engine does that.

    Returns:
        Its version, which is held until it is committed or released.

    Raises:
        GraloraError: The name is taken or is not one, the export takes no adapters, the file may not be used, or the
            model does not run with it; nothing changes then.
    """
    models = engine.models
    check_takes_adapters(engine.manifest, models.base, ServingError)
    models.check_new(name, replace=may_replace)
    is_deferred = defer_trial and engine.checks_outputs
    return models.prepare(
        name, source(), engine.trial, replace=may_replace, state=state, pin=pin, defer_trial=is_deferred
    )


def load_given(engine: Engine, settings: ServiceSettings) -> None:
    """Load the adapters that a service is started with; they take precedence over those of the export itself.

    Raises:
        GraloraError: One cannot be loaded (see `load_adapter`); the message begins with its name.
    """
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
    """Settings whose adapters are all `.onnx_adapter` files, for several processes that serve the same.

    Raises:
        GraloraError: One cannot be converted; the message begins with its name.
    """
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

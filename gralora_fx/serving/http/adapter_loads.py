"""One way for an adapter into a service, at its start and by requests: converted, checked, tried, and then named."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from gralora_fx.config.service_settings import ServiceSettings
from gralora_fx.errors import GraloraError, ServingError, shown, warn_caller
from gralora_fx.runtime.adapter_file import AdapterSource
from gralora_fx.runtime.adapter_paths import adapter_path, check_name, check_takes_adapters
from gralora_fx.runtime.manifest import read_manifest
from gralora_fx.serving.http.engines import Engine
from gralora_fx.serving.open_export import adapter_as_data
from gralora_fx.serving.scheduling.adapter_versions import AdapterVersion


def load_adapter(
    engine: Engine,
    name: str,
    file_in: Callable[[Path], AdapterSource],
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
        file_in: Gives the `.onnx_adapter` file, which may be in the empty folder that it is called with, or the
            adapter itself. The folder lasts as long as the adapter.
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
    folder = tempfile.TemporaryDirectory(prefix="gralora-fx-")
    try:
        path = file_in(Path(folder.name))
        return models.prepare(
            name,
            path,
            engine.trial,
            replace=may_replace,
            dispose=folder.cleanup,
            state=state,
            pin=pin,
            defer_trial=defer_trial and engine.checks_outputs,
        )
    except BaseException as error:
        folder.cleanup()
        if not isinstance(error, GraloraError):
            raise
        raise type(error)(str(error).replace(f"{folder.name}/", "")) from error  # the copy's place means nothing


def load_given(engine: Engine, settings: ServiceSettings) -> None:
    """Load the adapters that a service is started with; they take precedence over those of the export itself.

    Raises:
        GraloraError: One cannot be loaded (see `load_adapter`); the message begins with its name.
    """
    for name, path in settings.adapters.items():
        if name in engine.models.adapters:
            warn_caller(f"{path} is served as {name!r}, and the export's own adapter of that name is not")
        with _named(name):
            file_in = partial(_file, name, path, settings)
            engine.models.commit(load_adapter(engine, name, file_in, may_replace=True))


@contextmanager
def converted(settings: ServiceSettings) -> Iterator[ServiceSettings]:
    """Settings whose adapters are all `.onnx_adapter` files, for several processes that serve the same.

    Raises:
        GraloraError: One cannot be converted; the message begins with its name.
    """
    with tempfile.TemporaryDirectory(prefix="gralora-fx-") as folder:
        adapters: dict[str, Path] = {}
        for name, path in settings.adapters.items():
            with _named(name):
                check_name(name, ServingError)
                check_takes_adapters(read_manifest(settings.directory, ServingError), settings.base_name, ServingError)
                adapters[name] = _file(name, path, settings, Path(folder))
        yield replace(settings, adapters=adapters)


def _file(name: str, path: Path, settings: ServiceSettings, folder: Path) -> Path:
    """An adapter as data of the export: as it is, or converted from what PEFT saved, in a folder.

    Raises:
        ServingError: There is nothing at the path, or neither of the two.
        GraloraError: It cannot be converted (see `export_adapter`).
    """
    return adapter_as_data(adapter_path(path), settings.directory, folder, name)


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

"""The adapters that a service is started with, of any place that its operator names."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.errors import GraloraError, ServingError, marked, shown, warn_caller
from gralora_fx.format.adapter_paths import adapter_path, check_name, check_takes_adapters
from gralora_fx.format.manifest import read_manifest
from gralora_fx.run.open_export import adapter_as_data
from gralora_fx.service.adapter_store.named_files import GivenFile
from gralora_fx.service.adapter_store.store import AdapterStore


def load_given(store: AdapterStore, settings: ServiceSettings) -> None:
    """Load the adapters that a service is started with; they take precedence over those of the export itself."""
    for name, path in settings.adapters.items():
        if name in store.adapters:
            warn_caller(f"{path} is served as {name!r}, and the export's own adapter of that name is not")
        with _named(name):
            store.serve(store.stage(name, GivenFile(path, settings.directory), may_replace=True))


@contextmanager
def converted(settings: ServiceSettings) -> Iterator[ServiceSettings]:
    """Convert the adapters of settings to `.onnx_adapter` files, for several processes that serve the same."""
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
        raise type(error)(f"{start}: {marked(error)}") from error

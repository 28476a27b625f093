"""Adapter files read without a model: the configuration, the tensors and their digest."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from gralora_fx.base.sources.atomic_save import Writer, read_together
from gralora_fx.base.sources.model_directories import resolve_directory
from gralora_fx.base.sources.safetensors_files import Layout, header_bytes, read_layout
from gralora_fx.base.sources.same_base import is_embedding
from gralora_fx.core.adapters.agreement import check_target_names
from gralora_fx.core.adapters.saved_form import SIZES, file_metadata, sorted_arrays, sorted_metadata, tensors_digest
from gralora_fx.core.config import CONFIG_NAME, AdapterConfig
from gralora_fx.core.config.checks import KEY_PREFIX
from gralora_fx.core.config.reading import read_fields
from gralora_fx.core.methods import config_from_fields, method_of
from gralora_fx.core.methods.arrays import Array, to_numpy
from gralora_fx.errors import CheckpointError, shown

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

WEIGHTS_NAME = "adapter_model.safetensors"
SAVED_COPY = re.compile(r"\.modules_to_save\.[^.]+\.")
_PICKLE_NAME = "adapter_model.bin"
_READ_AT_ONCE = 2**20  # bytes


def read_adapter(directory: str | Path, *, revision: str | None = None) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Read a saved adapter's configuration and tensors."""
    path, config, tensors = read_files(directory, Layout.mapped, revision=revision)
    tensors = {current_key(key): tensor for key, tensor in tensors.items()}
    check_target_names(config, sites_of(tensors, config), path, trained=modules_of(tensors))
    return config, tensors


def current_key(key: str) -> str:
    """Return the key under which current PEFT saves a tensor; it also reads an older key of DoRA's magnitudes."""
    return key.removesuffix(".weight") if key.endswith(".lora_magnitude_vector.weight") else key


def read_files(
    directory: str | Path, read: Callable[[Layout], T], *, revision: str | None = None
) -> tuple[Path, AdapterConfig, T]:
    """Return a saved adapter's directory, its configuration, and the result of `read`, all from one save."""

    def read_both(config: Path, weights: Path) -> tuple[dict[str, Any], dict[str, Any], bool, T]:
        fields = read_fields(config)
        _check_weights_file(weights)
        layout = read_layout(weights)
        return fields, _recorded_sizes(layout), any(map(is_embedding, layout.tensors)), read(layout)

    path = resolve_directory(directory, CheckpointError, revision=revision, patterns=[CONFIG_NAME, WEIGHTS_NAME])
    fields, sizes, has_embeddings, found = read_together(path, [CONFIG_NAME, WEIGHTS_NAME], read_both)
    config = config_from_fields(fields, str(path / CONFIG_NAME))
    if has_embeddings:
        config = config.changed(saves_embeddings=True)
    _check_sizes(config, sizes, path)
    return path, config, found


def modules_of(keys: Iterable[str]) -> set[str]:
    """Return the paths of the modules that own these keys, taking every key for a copy of a base parameter."""
    return {key.removeprefix(KEY_PREFIX).rpartition(".")[0] for key in keys}


def sites_of(keys: Iterable[str], config: AdapterConfig) -> set[str]:
    """Return the paths of the layers that PEFT's keys belong to; copies of parameters belong to none."""
    ends = tuple(f".{key}" for key in method_of(config).keys.values())
    names = [key.removeprefix(KEY_PREFIX) for key in keys if key.startswith(KEY_PREFIX)]
    return {name.removesuffix(end) for name in names for end in ends if name.endswith(end)}


def _recorded_sizes(layout: Layout) -> dict[str, Any]:
    """Return the sizes recorded in the file's metadata; empty if unknown."""
    record = layout.metadata.get(SIZES)
    try:
        sizes = {} if record is None else json.loads(record)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{layout.file} has a damaged header ({error}); copy or save it again") from error
    return sizes if isinstance(sizes, dict) else {}


def recorded_parameters(layout: Layout, config: AdapterConfig) -> list[str] | None:
    """Return an adapter's `target_parameters` in the order of their modules; None if another program wrote the file."""
    return config.target_parameters if SIZES in layout.metadata else None


def _check_sizes(config: AdapterConfig, sizes: Mapping[str, Any], directory: Path) -> None:
    """Check that the recorded sizes and scale are those of the configuration."""
    differing = [
        f"{name} is {shown(value)} in {CONFIG_NAME}, but the tensors were saved with {shown(sizes[name])}"
        for name, value in config.sizes.items()
        if name in sizes and sizes[name] != value
    ]
    if differing:
        raise CheckpointError(
            f"{directory} holds the configuration of one adapter and the tensors of another: {'; '.join(differing)}; "
            f"copy or save both files again, or put the value back if {CONFIG_NAME} was edited"
        )


def _check_weights_file(path: Path) -> None:
    if not path.is_file():
        if (path.parent / _PICKLE_NAME).is_file():
            from gralora_fx.base.sources.other_formats import of_adapter_pickle  # only for an error

            raise CheckpointError(of_adapter_pickle(path.parent))
        raise CheckpointError(f"no {path.name} in {path.parent}; give the directory of a saved adapter")


def adapter_writers(config: AdapterConfig, tensors: Callable[[], Mapping[str, Array]]) -> dict[str, Writer]:
    """Return the functions that write an adapter's two files, by file name."""

    def write_tensors(path: Path) -> None:
        try:
            save_file(sorted_arrays(tensors()), path, metadata=file_metadata(config))
        except SafetensorError as error:  # such as a full disk
            raise OSError(str(error)) from error
        with path.open("r+b") as file:
            length = int.from_bytes(file.read(8), "little")
            header = sorted_metadata(file.read(length))
            file.seek(8)
            file.write(header)

    return {CONFIG_NAME: config.write_json, WEIGHTS_NAME: write_tensors}


def adapter_digest(path: Path, tensors: Mapping[str, Array], config: AdapterConfig) -> str:
    """Return `tensors_digest` of tensors read from a file, without copying them where the file allows it."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        entries = {key: entry for key, entry in header.items() if key != "__metadata__"}
        if entries.keys() == tensors.keys() and {entry["dtype"] for entry in entries.values()} == {"F32"}:
            fields = {"__metadata__": dict(sorted(file_metadata(config).items())), **entries}
            digest = hashlib.sha256(header_bytes(fields))
            while part := file.read(_READ_AT_ONCE):
                digest.update(part)
            return digest.hexdigest()
    arrays = {key: to_numpy(tensor) for key, tensor in tensors.items()}
    return tensors_digest({key: a.astype(np.float32) if a.itemsize < 4 else a for key, a in arrays.items()}, config)

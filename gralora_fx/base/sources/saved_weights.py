"""The weights of a model's directory: its safetensors files together, those in few bits as floats."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from gralora_fx.base.features import parts
from gralora_fx.base.sources.base_quantization import BaseQuantization, packed_quantization
from gralora_fx.base.sources.model_files import MODEL_FILE, read_json_object
from gralora_fx.base.sources.other_formats import of_pickle, pickle_file
from gralora_fx.base.sources.packed_tensors import packed_tensors
from gralora_fx.base.sources.safetensors_files import Layout, StoredTensor, read_layout
from gralora_fx.errors import CheckpointError

SINGLE_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class SavedWeights:
    """The weights of a model's directory.

    Attributes:
        directory: The directory.
        shards: Its safetensors files.
        has_index: Whether an index says which file holds which tensor.
        others: Tensors that are read in place of those of their keys.
    """

    directory: Path
    shards: tuple[Layout, ...]
    has_index: bool
    others: Mapping[str, StoredTensor] = field(default_factory=dict)

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """The tensors of all files by key, those in few bits as floats (see `PackedTensor`)."""
        stored = {key: tensor for shard in self.shards for key, tensor in shard.tensors.items()}
        return {**unpacked_in(self.directory, stored), **self.others}

    @cached_property
    def quantization(self) -> BaseQuantization | None:
        """How the weights are quantized; None of floats."""
        first = next(packed_tensors(self.tensors), None)
        return None if first is None or _packed(self.directory) is None else first.quantization

    @contextmanager
    def opened(self) -> Iterator[SavedWeights]:
        """The same with files that are kept open."""
        with ExitStack() as stack:
            yield replace(self, shards=tuple(stack.enter_context(shard.opened()) for shard in self.shards))


def unpacked_in(directory: Path, stored: Mapping[str, StoredTensor]) -> Mapping[str, StoredTensor]:
    """Tensors of a model's files, those in few bits as floats of the dtype that its configuration says.

    Without a configuration, the last parts of the tensors' names are the signs of a form of stored weights.
    """
    told = _packed(directory)
    for unpacked in parts(
        "stored weights", {key.rpartition(".")[2] for key in stored} if told is None else {told.sign}
    ):
        stored = unpacked(stored, directory, told)
    return stored


def _packed(directory: Path) -> BaseQuantization | None:
    """What a model's configuration says of its weights; nothing where there is none."""
    if not (directory / MODEL_FILE).is_file():
        return None
    return packed_quantization(read_json_object(directory / MODEL_FILE, CheckpointError), directory, CheckpointError)


def read_weights(directory: Path) -> SavedWeights:
    """The layouts of a model's safetensors files, a single one or several with an index, each checked to be whole."""
    single, index = directory / SINGLE_NAME, directory / INDEX_NAME
    if single.is_file():  # which transformers prefers too
        return SavedWeights(directory, (read_layout(single),), has_index=False)
    if not index.is_file():
        if (file := pickle_file(directory)) is not None:
            config = directory / MODEL_FILE
            fields = read_json_object(config, CheckpointError) if config.is_file() else {}
            raise CheckpointError(of_pickle(directory, file, fields))
        raise CheckpointError(
            f"{directory} holds neither {SINGLE_NAME} nor {INDEX_NAME}; "
            "save the model with transformers, as safetensors"
        )
    names = _names_by_key(index)
    files = sorted(set(names.values()))
    if missing := [name for name in files if not (directory / name).is_file()]:
        raise CheckpointError(f"{directory} lacks {', '.join(missing)}, which {INDEX_NAME} names; copy the model again")
    shards = tuple(read_layout(directory / name) for name in files)
    holder: dict[str, str] = {}
    for shard in shards:
        for key in shard.tensors:
            if key in holder:
                raise CheckpointError(
                    f"{directory}: {key} is in {holder[key]} and in {shard.file.name}; save the model again"
                )
            holder[key] = shard.file.name
    if astray := [key for key, name in names.items() if holder.get(key) != name]:
        raise CheckpointError(
            f"{directory}: {', '.join(astray[:3])} is not in the file that {INDEX_NAME} says; copy the model again"
        )
    return SavedWeights(directory, shards, has_index=True)


def _names_by_key(index: Path) -> dict[str, str]:
    """The name of each tensor's file, as an index says."""
    try:
        names: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        outside = sorted({str(name) for name in names.values() if Path(name).name != name})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} cannot be read ({error}); copy or save the model again") from error
    if outside:
        raise CheckpointError(
            f"{index} names {', '.join(outside)}, outside its directory; do not trust it, or save it again"
        )
    return names

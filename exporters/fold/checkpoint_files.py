"""The other files of a merged model: copied, with a configuration and an index that say what has changed."""

from __future__ import annotations

import inspect
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gralora_fx.base.sources.model_files import MODEL_FILE, read_json_object
from gralora_fx.base.sources.safetensors_files import NewShard
from gralora_fx.base.sources.saved_weights import INDEX_NAME, SavedWeights
from gralora_fx.errors import CheckpointError
from gralora_fx.exporters.fold.checkpoint_changes import TensorChanges
from gralora_fx.exporters.fold.checkpoint_names import Names
from gralora_fx.exporters.fold.edits import ValuesEdit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TIE = "tie_word_embeddings"
_FORMATS = (
    *(".bin", ".safetensors", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".npz", ".tflite"),
    *(".gguf", ".ggml", ".onnx", ".onnx_data", ".mlmodel", ".bin.index.json", ".safetensors.index.json"),
)
_ANYWHERE = (".gguf", ".ggml", ".onnx", ".onnx_data", ".mlmodel", ".h5", ".msgpack", ".tflite")
_NO_WEIGHTS = ("training_args.bin",)
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_FOLDERS = (".git", ".cache")  # of version control and of downloads
_EXPORTS = ("onnx", "openvino")  # folders of the same weights in another format


def edited_config(
    base: SavedWeights, names: Names, changes: TensorChanges, num_labels: int | None
) -> tuple[dict[str, Any], list[str]]:
    """The fields of `config.json` for the merged model, and a sentence for each that differs."""
    fields = read_json_object(base.directory / MODEL_FILE, CheckpointError)
    notes: list[str] = []
    if base.quantization is not None:
        fields.pop("quantization_config")
        fields.pop("torch_dtype", None)
        fields["dtype"] = base.quantization.compute_dtype
        notes.append(f"quantization_config is left out, and dtype is {fields['dtype']}: all weights are floats")
    if changes.untied:
        _untie(fields)
        notes.append(f"{_TIE} is false, since {_pairs(changes.untied)} are no longer one weight")
        if names.model is not None:
            _check_untied(fields, names.model, changes)
    if names.model is None or not (changes.added or changes.changed):
        return fields, notes
    config: Any = names.model.config
    if num_labels is not None and num_labels != len(fields.get("id2label") or (0, 1)):
        fields |= {"id2label": {str(n): label for n, label in config.id2label.items()}, "label2id": config.label2id}
        notes.append(f"id2label has {num_labels} classes, those of the adapter's head")
    own = type(names.model).__name__
    is_new = any(isinstance(tensor.edit, ValuesEdit) for tensor, _ in changes.added.values())
    if is_new and fields.get("architectures") != [own]:
        fields["architectures"] = [own]
        notes.append(f"architectures is {own}, whose head the adapter brings")
    return fields, notes


def _untie(fields: dict[str, Any]) -> None:
    fields[_TIE] = False
    for value in fields.values():
        if isinstance(value, dict) and value.get(_TIE):
            value[_TIE] = False


def _check_untied(fields: dict[str, Any], model: PreTrainedModel, changes: TensorChanges) -> None:
    """Check that a model of the new configuration has separate weights, and computes the same otherwise."""
    from gralora_fx.base.sources.streamed_models import empty_model  # it imports torch and transformers

    config = type(model.config).from_dict(fields)
    untied = empty_model(lambda: type(model)(config))
    parameters = dict(untied.named_parameters(remove_duplicate=False))
    forward = inspect.unwrap(type(model).forward)
    still = [pair for pair in changes.untied if parameters[pair[0]] is parameters[pair[1]]]
    if still or _TIE in forward.__code__.co_names:
        pair = _pairs((still or changes.untied)[-1:])
        why = f"ties {pair} in every model" if still else f"computes something else where {_TIE} is false"
        raise CheckpointError(
            f"{type(model).__name__} {why}, so that its files cannot hold {pair} with different values; serve the "
            "adapter unmerged, or train it without that layer"
        )


def _pairs(pairs: Iterable[tuple[str, str]]) -> str:
    return ", ".join(f"{one} and {other}" for one, other in pairs)


def files_to_copy(base: SavedWeights) -> tuple[list[str], list[str]]:
    """The other files of a model's directory by their paths in it: those to copy, and those to leave out.

    Left out are the same weights in other formats, which the merge does not change, and an adapter, which transformers
    would add to what is merged.
    """
    shards = {shard.file.name for shard in base.shards}
    written = {*shards, MODEL_FILE, INDEX_NAME} if base.has_index else {*shards, MODEL_FILE}
    kept: list[str] = []
    left_out: list[str] = []
    for path in _files(base.directory):
        if path not in written:
            (left_out if _is_left_out(Path(path)) else kept).append(path)
    return kept, left_out


def _files(directory: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(directory):
        folders[:] = sorted(name for name in folders if name not in _FOLDERS)
        for name in sorted(files):
            yield (Path(folder) / name).relative_to(directory).as_posix()


def _is_left_out(path: Path) -> bool:
    name = path.name.lower()
    if len(path.parts) > 1:  # a module in a folder of its own has its own weights
        return name.endswith(_ANYWHERE) or path.parts[0] in _EXPORTS
    return name in _ADAPTER or (name.endswith(_FORMATS) and name not in _NO_WEIGHTS)


def write_other_files(
    base: SavedWeights, changes: TensorChanges, shards: list[NewShard], config: dict[str, Any] | None, stage: Path
) -> list[str]:
    """Write everything but the weights."""
    copied, left_out = files_to_copy(base)
    for path in copied:
        (stage / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base.directory / path, stage / path)
    if config is None:
        shutil.copyfile(base.directory / MODEL_FILE, stage / MODEL_FILE)
    else:
        _write_json(stage / MODEL_FILE, config)
    if base.has_index:
        _write_index(base, changes, shards, stage)
    return left_out


def _write_index(base: SavedWeights, changes: TensorChanges, shards: list[NewShard], stage: Path) -> None:
    """Write which file holds which tensor, with the new totals."""
    if all(len(shard.tensors) == len(shard.old.tensors) and not shard.more_bytes for shard in shards):
        shutil.copyfile(base.directory / INDEX_NAME, stage / INDEX_NAME)
        return
    index = read_json_object(base.directory / INDEX_NAME, CheckpointError)
    kept = {key for shard in shards for key in shard.tensors}
    index["weight_map"] = {key: name for key, name in index["weight_map"].items() if key in kept}
    index["weight_map"] |= {key: base.tensors[near].file.name for key, (_, near) in changes.added.items()}
    totals = index.get("metadata") or {}
    if "total_size" in totals:
        totals["total_size"] += sum(shard.more_bytes for shard in shards)
    if "total_parameters" in totals:
        totals["total_parameters"] += sum(shard.more_values for shard in shards)
    _write_json(stage / INDEX_NAME, index)


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

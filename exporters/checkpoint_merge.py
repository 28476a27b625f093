"""`merge_checkpoint`: fold an adapter into its base's safetensors files, without a model in memory."""

from __future__ import annotations

import functools
import inspect
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gralora_fx.base.progress.console import with_progress
from gralora_fx.base.progress.report import Invocation, Report, Summary, written, written_lines
from gralora_fx.base.progress.stages import timed
from gralora_fx.base.sources.base_quantization import DTYPES, BaseQuantization, check_not_packed
from gralora_fx.base.sources.model_directories import check_model_files, resolve_directory
from gralora_fx.base.sources.model_files import MODEL_FILE, read_json_object
from gralora_fx.base.sources.packed_tensors import packed_tensors
from gralora_fx.base.sources.rewriting import write_files
from gralora_fx.base.sources.safetensors_files import NewShard
from gralora_fx.base.sources.same_base import BaseComparison, BaseSource, compare_bases
from gralora_fx.base.sources.saved_weights import INDEX_NAME, SavedWeights, read_weights
from gralora_fx.core.adapters.stored_adapter import open_adapter
from gralora_fx.core.config.checks import check_acts_everywhere
from gralora_fx.core.loading.adapter_facts import head_classes
from gralora_fx.errors import CheckpointError, MergeError, listed
from gralora_fx.exporters.artifact.staging import check_converted, file_sizes, require_space, staged
from gralora_fx.exporters.fold.checkpoint_changes import TensorChanges, find_changes
from gralora_fx.exporters.fold.checkpoint_names import Names, in_layers, names_in_files, names_of
from gralora_fx.exporters.fold.edits import ValuesEdit
from gralora_fx.format.export_directory import class_of
from gralora_fx.format.tasks import task_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WORKERS = 4  # threads, also on fewer cores, since they wait for the disk too
_DOWNLOADED = (
    *("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.md", "*.tiktoken", "*.spm", "*.vocab"),
    *("*.bpe", "LICENSE*", "NOTICE*"),
)  # of a hub repository: no weights in other formats


@dataclass(frozen=True)
class MergeReport(Report):
    """The result of `merge_checkpoint`.

    Attributes:
        output_dir: The directory written.
        files: Its files with their sizes in bytes.
        merged: Keys of the weights that an update was folded into.
        replaced: Keys of the tensors that the adapter trained whole (`modules_to_save`, biases).
        added: Keys that the base does not have.
        config_changes: Changes to `config.json`, a sentence each.
        left_out: Files of the base that were not copied: its weights in other formats, and adapters.
        base: How the adapter's base compares with the model.
    """

    output_dir: Path
    files: dict[str, int]
    merged: tuple[str, ...]
    replaced: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    config_changes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    base: BaseComparison | None = None

    @property
    def summary(self) -> Summary:
        """Lines on the merged weights, the files written, how the result is used, and other changes."""
        replaced = f", replaced {len(self.replaced)} tensors" if self.replaced else ""
        result = f"merged {len(self.merged)} weight{'s' * (len(self.merged) > 1)}{replaced}; every value is finite"
        place = str(self.output_dir)
        name = class_of(self.output_dir)
        python = f"from transformers import {name}; {name}.from_pretrained({place!r})"
        usage = Invocation(python, "gralora-fx export", {"model": place, "output": f"{place}-onnx"})
        notes = [f"{MODEL_FILE}: {change}" for change in self.config_changes]
        notes += [f"added {listed(self.added, 2)}"] if self.added else []
        notes += [f"{len(self.left_out)} files of the base not copied"] if self.left_out else []
        return Summary(result, written(self.output_dir, self.files), usage, notes)

    @property
    def details(self) -> str:
        """Lines on the files, the changes in them, and the files left out."""
        lines = written_lines(self.output_dir, self.files)
        lines.append(f"{len(self.merged)} weights merged, {len(self.replaced)} tensors replaced")
        lines += [f"added {key}" for key in self.added]
        lines += [f"{MODEL_FILE}: {change}" for change in self.config_changes]
        if self.left_out:
            lines.append(f"not copied, since the merge does not change them: {', '.join(self.left_out)}")
        return "\n".join(lines)


@with_progress
def merge_checkpoint(
    model_dir: str | Path,
    adapter_dir: str | Path,
    output_dir: str | Path,
    *,
    overwrite: bool = False,
    strict_base: bool = False,
    base_quantization: BaseQuantization | Any = None,
) -> MergeReport:
    """Fold a saved adapter into the weights of a saved model, file by file, without loading the model.

    Weights are accumulated in float32 or better, some rows at a time, and rounded once to their own dtype. The files
    keep their names, the order of their tensors and their metadata; all else is copied. If the adapter changes one of
    two tied weights, such as the head tied to the embedding, it gets its own tensor, and `config.json` is changed
    accordingly. A quantized base is dequantized to the values that bitsandbytes multiplies by, so that the result has
    float weights.

    Args:
        model_dir: The base: a local directory or a hub id, of safetensors files.
        adapter_dir: PEFT-format GraLoRA, LoRA, rsLoRA or DoRA adapter: a local directory or a hub id.
        output_dir: Where to write: a new or empty directory.
        overwrite: Whether an earlier model in `output_dir` is replaced.
        strict_base: Whether to refuse an adapter that is not known to be of this base, instead of a warning.
        base_quantization: How to round the layers of a float base first, as a QLoRA adapter was trained on them:
            `"nf4"`, `"nf4-double"`, `"int8"`, or whatever `BaseQuantization.of` takes; None for no rounding.

    Returns:
        The files written, and the tensors changed.

    Raises:
        ConfigError: The adapter's configuration cannot be read, `base_quantization` is given though the base is
            quantized already, or bitsandbytes, which it needs, is not installed.
        CheckpointError: Files are missing or damaged, the base is quantized, or the adapter does not fit it or its
            own configuration, or is of another base; every problem is named.
        MergeError: Merged values are not finite.
        ExportError: The output may not be written, or writing fails.
    """
    with open_adapter(adapter_dir) as adapter:
        check_acts_everywhere(adapter.config.acts_from, adapter.directory, "merging", MergeError)
        is_named = adapter.config.base_model_name_or_path == str(model_dir)
        revision = adapter.config.revision if is_named else None  # if the adapter names the same base
        directory = _base_directory(model_dir, revision)
        asked = None if base_quantization is None else BaseQuantization.of(base_quantization)
        if asked is not None:
            check_not_packed(
                read_json_object(directory / MODEL_FILE, CheckpointError), model_dir, asked, CheckpointError
            )
        used = BaseSource(str(model_dir), revision, record=asked)
        compared = compare_bases(adapter.config.made_for, used)
        compared.settle(adapter_dir, strict=strict_base, error=CheckpointError)
        check = functools.partial(
            check_converted, sources=[directory, adapter.directory], marker=MODEL_FILE, overwrite=overwrite
        )
        check(output_dir)
        weights = read_weights(directory)
        num_labels = head_classes({name: extent.shape for name, extent in adapter.copies.items()})
        at_parameters = set(adapter.parameters)
        needed = [*(p if p in at_parameters else f"{p}.weight" for p in adapter.sites), *adapter.copies]
        task = task_of(adapter.config, None, str(adapter_dir))
        with weights.opened() as base, timed("merging"):
            is_packed = base.quantization is not None
            known = None if is_packed or asked else names_in_files(base, adapter)
            names = known or names_of(base, needed, task, num_labels)
            adapter = adapter.named(list(names.parameters))
            if is_packed or asked:
                base = in_layers(base, names, asked)
            if (layers := names.layers) is not None:
                adapter.check_layers(layers)
            changes = find_changes(base, names, adapter)
            config, notes = edited_config(base, names, changes, num_labels)
            shards = changes.shards(base)
            require_space(output_dir, sum(shard.file.nbytes for shard in shards))
            with staged(output_dir, check) as stage:
                write_files([shard.file for shard in shards], stage, workers=_WORKERS)
                left_out = write_other_files(base, shards, config if notes else None, stage)
    return MergeReport(
        output_dir=Path(output_dir),
        files=file_sizes(output_dir),
        merged=tuple(changes.merged),
        replaced=tuple(changes.replaced),
        added=tuple(sorted(changes.added)),
        config_changes=tuple(notes),
        left_out=tuple(left_out),
        base=compared,
    )


def _base_directory(model_dir: str | Path, revision: str | None) -> Path:
    """Return the directory of the base, checked; download it first if a hub id is given."""
    local = check_model_files(model_dir, CheckpointError)
    if local is not None:
        return local
    directory = resolve_directory(model_dir, CheckpointError, revision=revision, patterns=_DOWNLOADED)
    check_model_files(directory, CheckpointError)
    return directory


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
    """Return the fields of `config.json` for the merged model, and a sentence for each change."""
    fields = read_json_object(base.directory / MODEL_FILE, CheckpointError)
    notes: list[str] = []
    if base.quantization is not None:
        fields.pop("quantization_config")
        fields.pop("torch_dtype", None)
        stored = next(packed_tensors(base.tensors)).dtype  # as they are written
        fields["dtype"] = next(dtype for dtype, name in DTYPES.items() if name == stored)
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
    """Check that a model of the new configuration has untied weights, and otherwise the same computation."""
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
    """Return the relative paths of a model's other files: those to copy, and those to leave out.

    Left out are the unmerged weights in other formats, and an adapter, which transformers would add to the merged
    weights.
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
    if len(path.parts) > 1:  # a module in a subfolder has its own weights
        return name.endswith(_ANYWHERE) or path.parts[0] in _EXPORTS
    return name in _ADAPTER or (name.endswith(_FORMATS) and name not in _NO_WEIGHTS)


def write_other_files(
    base: SavedWeights, shards: list[NewShard], config: dict[str, Any] | None, stage: Path
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
        _write_index(base, shards, stage)
    return left_out


def _write_index(base: SavedWeights, shards: list[NewShard], stage: Path) -> None:
    if all(len(shard.tensors) == len(shard.old.tensors) and not shard.more_bytes for shard in shards):
        shutil.copyfile(base.directory / INDEX_NAME, stage / INDEX_NAME)
        return
    index = read_json_object(base.directory / INDEX_NAME, CheckpointError)
    kept = {key for shard in shards for key in shard.tensors}
    index["weight_map"] = {key: name for key, name in index["weight_map"].items() if key in kept}
    index["weight_map"] |= {key: shard.old.file.name for shard in shards for key in shard.tensors}
    totals = index.get("metadata") or {}
    if "total_size" in totals:
        totals["total_size"] += sum(shard.more_bytes for shard in shards)
    if "total_parameters" in totals:
        totals["total_parameters"] += sum(shard.more_values for shard in shards)
    _write_json(stage / INDEX_NAME, index)


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

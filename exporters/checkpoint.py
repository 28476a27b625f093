"""`merge_checkpoint`: an adapter folded into the safetensors files of its base, with no model in memory."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from gralora_fx.adapters.stored import StoredAdapter, open_adapter
from gralora_fx.config.adapter_tasks import task_of
from gralora_fx.errors import CheckpointError
from gralora_fx.exporters.artifact.staging import check_converted, file_sizes, require_space, staged
from gralora_fx.exporters.merged_files.base_files import FILES, BaseFiles, names_of, open_shards, read_base
from gralora_fx.exporters.merged_files.changes import Changes, find_changes
from gralora_fx.exporters.merged_files.companions import (
    CONFIG_FILE,
    edited_config,
    files_to_copy,
    write_companions,
)
from gralora_fx.exporters.merged_files.names_in_files import names_in_files
from gralora_fx.exporters.merged_files.write_shards import new_shards, write_shards
from gralora_fx.loading.adapter_facts import head_classes
from gralora_fx.progress.stages import timed
from gralora_fx.sources.hub import resolve_directory
from gralora_fx.sources.model_files import check_model_files
from gralora_fx.sources.same_base import BaseComparison, BaseSource, compare_bases


@dataclass(frozen=True)
class MergeReport:
    """The result of `merge_checkpoint`.

    Attributes:
        output_dir: The directory written.
        files: Its files with their sizes in bytes.
        merged: Keys of the weights that an update was folded into.
        replaced: Keys of the tensors that the adapter trained whole (`modules_to_save`, biases).
        added: Keys that the base does not have.
        config_changes: What differs in `config.json`, a sentence each.
        left_out: Files of the base that were not copied: its weights in other formats, and adapters.
        base: What was compared of the adapter's base and the model.
    """

    output_dir: Path
    files: dict[str, int]
    merged: tuple[str, ...]
    replaced: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    config_changes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    base: BaseComparison | None = None

    def __str__(self) -> str:
        """The files, what changed in them, and what was left out."""
        lines = [f"wrote {self.output_dir}"]
        lines += [f"  {name:<40}{size:>16,} bytes" for name, size in self.files.items()]
        lines.append(f"{len(self.merged)} weights merged, {len(self.replaced)} tensors replaced")
        lines += [f"added {key}" for key in self.added]
        lines += [f"{CONFIG_FILE}: {change}" for change in self.config_changes]
        if self.left_out:
            lines.append(f"not copied, since the merge does not change them: {', '.join(self.left_out)}")
        return "\n".join(lines)


def merge_checkpoint(
    model_dir: str | Path,
    adapter_dir: str | Path,
    output_dir: str | Path,
    *,
    overwrite: bool = False,
    strict_base: bool = False,
) -> MergeReport:
    """Fold a saved adapter into the weights of a saved model, file by file, without loading the model.

    Weights are accumulated in float32 or better, some rows at a time, and rounded once to their own dtype. The files
    keep their names, the order of their tensors and their metadata; all else is copied. A weight that is tied, as a
    head to the embedding, gets a tensor of its own, and `config.json` says so.

    Args:
        model_dir: The base: a local directory or a hub id, of safetensors files.
        adapter_dir: PEFT-format GraLoRA, LoRA or rsLoRA adapter: a local directory or a hub id.
        output_dir: Where to write: a new or empty directory.
        overwrite: Whether an earlier model in `output_dir` is replaced.
        strict_base: Whether to refuse an adapter that is not known to be of this base, instead of a warning.

    Returns:
        What was written and changed.

    Raises:
        ConfigError: The adapter's configuration cannot be read.
        CheckpointError: Files are missing or damaged, the base is quantized, or the adapter does not fit it or its
            own configuration, or is of another base; every problem is named.
        MergeError: Merged values are not finite.
        ExportError: The output may not be written, or writing fails.
    """
    with open_adapter(adapter_dir) as adapter:
        directory = _base_directory(model_dir, adapter)
        used = BaseSource(str(model_dir), adapter.config.revision if _is_named(adapter, model_dir) else None)
        compared = compare_bases(BaseSource(adapter.config.base_model_name_or_path, adapter.config.revision), used)
        compared.settle(adapter_dir, strict=strict_base, error=CheckpointError)
        check = functools.partial(
            check_converted, sources=[directory, adapter.directory], marker=CONFIG_FILE, overwrite=overwrite
        )
        check(output_dir)
        base = read_base(directory)
        num_labels = head_classes({name: extent.shape for name, extent in adapter.copies.items()})
        needed = [*(f"{path}.weight" for path in adapter.sites), *adapter.copies]
        task = task_of(adapter.config, None, str(adapter_dir))
        with open_shards(base) as handles, timed("merge"):
            names = names_in_files(base, adapter, handles) or names_of(base, needed, task, num_labels)
            if (layers := names.layers) is not None:
                adapter.check_layers(layers)
            changes = find_changes(base, names, adapter, handles)
            config, notes = edited_config(base, names, changes, num_labels)
            shards = new_shards(base, changes)
            require_space(output_dir, sum(shard.nbytes for shard in shards))
            with staged(output_dir, check) as stage:
                write_shards(shards, changes, adapter, handles, base, stage)
                write_companions(base, changes, shards, config if notes else None, stage)
    return _report(Path(output_dir), base, changes, notes, compared)


def _base_directory(model_dir: str | Path, adapter: StoredAdapter) -> Path:
    check_model_files(model_dir, CheckpointError)
    revision = adapter.config.revision if _is_named(adapter, model_dir) else None
    directory = resolve_directory(model_dir, CheckpointError, revision=revision, patterns=FILES)
    check_model_files(directory, CheckpointError)
    return directory


def _is_named(adapter: StoredAdapter, model_dir: str | Path) -> bool:
    """Whether the adapter names the base in the same words; then it is read at the adapter's revision."""
    return adapter.config.base_model_name_or_path == str(model_dir)


def _report(output: Path, base: BaseFiles, changes: Changes, notes: list[str], compared: BaseComparison) -> MergeReport:
    everything = {**changes.changed, **{key: change for key, (change, _) in changes.added.items()}}
    return MergeReport(
        output_dir=output,
        files=file_sizes(output),
        merged=tuple(sorted(key for key, change in everything.items() if change.site is not None)),
        replaced=tuple(sorted(key for key, change in changes.changed.items() if change.values is not None)),
        added=tuple(sorted(changes.added)),
        config_changes=tuple(notes),
        left_out=tuple(files_to_copy(base)[1]),
        base=compared,
    )

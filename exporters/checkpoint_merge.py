"""`merge_checkpoint`: an adapter folded into the safetensors files of its base, with no model in memory."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gralora_fx.base.progress.console import with_progress
from gralora_fx.base.progress.report import Invocation, Report, Summary, written, written_lines
from gralora_fx.base.progress.stages import timed
from gralora_fx.base.sources.base_quantization import BaseQuantization, check_not_packed
from gralora_fx.base.sources.model_files import MODEL_FILE, check_model_files, read_json_object, resolve_directory
from gralora_fx.base.sources.rewriting import write_files
from gralora_fx.base.sources.same_base import BaseComparison, BaseSource, compare_bases
from gralora_fx.base.sources.saved_weights import read_weights
from gralora_fx.core.adapters.stored_adapter import open_adapter
from gralora_fx.core.loading.adapter_facts import head_classes
from gralora_fx.errors import CheckpointError, listed
from gralora_fx.exporters.artifact.staging import check_converted, file_sizes, require_space, staged
from gralora_fx.exporters.fold.checkpoint_changes import find_changes
from gralora_fx.exporters.fold.checkpoint_files import edited_config, write_other_files
from gralora_fx.exporters.fold.checkpoint_names import in_layers, names_in_files, names_of
from gralora_fx.format.tasks import task_of

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

    @property
    def summary(self) -> Summary:
        """What was merged, what was written, how it is used, and what else changed."""
        replaced = f", replaced {len(self.replaced)} tensors" if self.replaced else ""
        result = f"merged {len(self.merged)} weight{'s' * (len(self.merged) > 1)}{replaced}; every value is finite"
        place = str(self.output_dir)
        python = f"from transformers import AutoModel; AutoModel.from_pretrained({place!r})"
        usage = Invocation(python, "gralora-fx export", {"model": place, "output": f"{place}-onnx"})
        notes = [f"{MODEL_FILE}: {change}" for change in self.config_changes]
        notes += [f"added {listed(self.added, 2)}"] if self.added else []
        notes += [f"{len(self.left_out)} files of the base not copied"] if self.left_out else []
        return Summary(result, written(self.output_dir, self.files), usage, notes)

    @property
    def details(self) -> str:
        """The files, what changed in them, and what was left out."""
        lines = written_lines(self.output_dir, self.files, (40, 16))
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
    keep their names, the order of their tensors and their metadata; all else is copied. A weight that is tied, as a
    head to the embedding, gets a tensor of its own, and `config.json` says so. Of a base in four bits the values are
    merged into that bitsandbytes multiplies by, and the result is one of floats.

    Args:
        model_dir: The base: a local directory or a hub id, of safetensors files.
        adapter_dir: PEFT-format GraLoRA, LoRA, rsLoRA or DoRA adapter: a local directory or a hub id.
        output_dir: Where to write: a new or empty directory.
        overwrite: Whether an earlier model in `output_dir` is replaced.
        strict_base: Whether to refuse an adapter that is not known to be of this base, instead of a warning.
        base_quantization: How the layers of a float base are rounded first, as a QLoRA adapter was trained on them:
            `"nf4"`, `"nf4-double"`, or whatever `BaseQuantization.of` takes; None for not at all.

    Returns:
        What was written and changed.

    Raises:
        ConfigError: The adapter's configuration cannot be read, the base is quantized already, and is to be rounded,
            or bitsandbytes is not installed for that.
        CheckpointError: Files are missing or damaged, the base is quantized, or the adapter does not fit it or its
            own configuration, or is of another base; every problem is named.
        MergeError: Merged values are not finite.
        ExportError: The output may not be written, or writing fails.
    """
    with open_adapter(adapter_dir) as adapter:
        is_named = adapter.config.base_model_name_or_path == str(model_dir)
        revision = adapter.config.revision if is_named else None  # of the base that the adapter names in these words
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
                left_out = write_other_files(base, changes, shards, config if notes else None, stage)
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
    """The directory of the base, checked; downloaded first if a hub id is given."""
    local = check_model_files(model_dir, CheckpointError)
    if local is not None:
        return local
    directory = resolve_directory(model_dir, CheckpointError, revision=revision, patterns=_DOWNLOADED)
    check_model_files(directory, CheckpointError)
    return directory

"""`export_adapter`: add a PEFT adapter to an export as data, without the base model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gralora_fx.base.progress.report import Invocation, Report, Summary, size_of
from gralora_fx.base.sources.same_base import BaseComparison, compare_bases, read_config_fields
from gralora_fx.core.adapters.stored_adapter import StoredAdapter, open_adapter
from gralora_fx.errors import CheckpointError, ExportError, an, command, listed, option, warn_caller
from gralora_fx.exporters.artifact.exported_adapters import Changes, adapter_tensors, write_adapter
from gralora_fx.format.adapter_paths import SUFFIX, check_can_act, check_name, check_takes_adapters
from gralora_fx.format.export_directory import ADAPTERS, DECODER_KIND
from gralora_fx.format.export_usage import comparison_of, usage_of
from gralora_fx.format.manifest import Manifest, read_manifest
from gralora_fx.run.sessions.adapter_file import (
    AdapterInMemory,
    AdapterRecord,
    norms_text,
    read_record,
    record_in_memory,
)
from gralora_fx.run.sessions.exported_base import base_of_export, layers_of_export


@dataclass(frozen=True)
class AdapterReport(Report):
    """The adapter that was added to an export."""

    path: Path  # the file of the adapter
    record: AdapterRecord  # the adapter's record
    usage: Invocation  # how the export is called with it, in Python and as a command

    @property
    def summary(self) -> Summary:
        """Lines on the adapter and its file, and how the export is used with it."""
        record, directory = self.record, self.path.parent.parent
        method = str(record.config.get("peft_type"))
        norms = "" if record.norms_of is None else f"; {norms_text(record.norms_of)}"
        return Summary(
            f"added {record.name!r} ({method}) at {len(record.sites)} layers{norms}",
            f"wrote {self.path}: {size_of(record.size)}, beside it {self.path.with_suffix('.json').name}",
            self.usage,
            comparison=comparison_of(directory),
        )

    @property
    def details(self) -> str:
        """The tensors of the adapter with their shapes."""
        return "\n".join(f"{name} {list(shape)}" for name, shape in self.record.shapes.items())


def report_of(path: Path, onnx_dir: str | Path) -> AdapterReport:
    """Report an adapter that was added to an export."""
    manifest, record = read_manifest(onnx_dir), read_record(path)
    usage = usage_of(onnx_dir, manifest.task, os.listdir(onnx_dir), adapter=record.name)
    return AdapterReport(path, record, usage)


def export_adapter(
    adapter_dir: str | Path,
    onnx_dir: str | Path,
    name: str = "default",
    *,
    overwrite: bool = False,
    revision: str | None = None,
    strict_base: bool = False,
) -> Path:
    """Add a PEFT adapter to an export that takes adapters as data.

    Supported are GraLoRA, LoRA and rsLoRA, rank and alpha patterns included; LoRA is an adapter whose blocks have rank
    0. The scale becomes part of the `B` tensors. Layers and biases that the adapter trains as a whole
    (`modules_to_save`, `bias`) become their differences from the export's. DoRA is supported by an export that was made
    with a DoRA adapter of these layers; its norms are those of the export's weights, rounded or not, computed here.

    Args:
        adapter_dir: A directory with `adapter_config.json` and `adapter_model.safetensors`, or its hub id.
        onnx_dir: A directory that `export_onnx` wrote with `adapters="data"` or `"inputs"`.
        name: The adapter's name in the export.
        overwrite: Whether an adapter of the name may be replaced.
        revision: Revision of the adapter's hub repository.
        strict_base: Whether to refuse an adapter that is not known to be of the export's base, instead of a warning.

    Returns:
        The path of `adapters/<name>.onnx_adapter` in the export; `<name>.json` beside it describes it.

    Raises:
        ExportError: The directory is not such an export, has an adapter of the name, or lacks layers of the adapter or
            its blocks; or the export does not take the parameters that the adapter trains, such as a head of another
            size. Every problem is named.
        ConfigError: The adapter's configuration is missing or invalid, or of a method or form that is not supported.
        CheckpointError: Its tensors are missing, damaged, not finite, or do not fit its configuration; or its base is
            another one.
    """
    check_name(name)
    manifest = read_manifest(onnx_dir)
    remedy = f"export the model with {option(adapters='data')}, or fold the adapter into it with {command('fold_onnx')}"
    check_takes_adapters(manifest, onnx_dir, ExportError, remedy=remedy)
    path = Path(onnx_dir) / ADAPTERS / f"{name}{SUFFIX}"
    if path.exists() and not overwrite:
        raise ExportError(f"{path} exists; give {option(overwrite=True)} to replace it, or another name")
    return convert_adapter(adapter_dir, onnx_dir, onnx_dir, name, revision=revision, strict_base=strict_base)


def convert_adapter(
    adapter_dir: str | Path,
    onnx_dir: str | Path,
    output_dir: str | Path,
    name: str,
    *,
    revision: str | None = None,
    strict_base: bool = False,
) -> Path:
    """Write a PEFT adapter as data of an export into `adapters/` of any directory."""
    manifest = read_manifest(onnx_dir)
    changes, fields, base = _changes(adapter_dir, onnx_dir, name, manifest, revision=revision, strict_base=strict_base)
    return write_adapter(Path(output_dir), name, changes, fields, manifest, base)


def adapter_in_memory(adapter_dir: str | Path, onnx_dir: str | Path, name: str, manifest: Manifest) -> AdapterInMemory:
    """Convert a PEFT adapter to data of an export, in memory; errors are as by `convert_adapter`."""
    changes, fields, base = _changes(adapter_dir, onnx_dir, name, manifest)
    inputs = check_takes_adapters(manifest, onnx_dir, ExportError)
    tensors = adapter_tensors(name, changes, inputs)
    record = record_in_memory(name, tensors, fields, inputs, manifest.base_fingerprint, with_digest=False)
    return AdapterInMemory(replace(record, base=base.to_dict(), norms_of=changes.norms_of), tensors)


def _changes(
    adapter_dir: str | Path,
    onnx_dir: str | Path,
    name: str,
    manifest: Manifest,
    *,
    revision: str | None = None,
    strict_base: bool = False,
) -> tuple[Changes, Mapping[str, Any], BaseComparison]:
    """Return an adapter's changes to an export, its configuration, and how its base compares."""
    with open_adapter(adapter_dir, revision=revision) as stored:
        _check_takes(stored, onnx_dir, manifest)
        stored.check_no_parameters("an adapter as data of an export", ExportError)
        parameters: BaseParameters | None = None
        if stored.repeats or stored.copies or stored.method.scales_rows:
            from gralora_fx.exporters.artifact.base_parameters import BaseParameters  # it imports onnx_ir

            parameters = BaseParameters(Path(onnx_dir), manifest)
            stored = parameters.with_own_embeddings(stored)
        acts_from, has_copies = stored.config.acts_from, bool(stored.copies)
        check_can_act(acts_from, stored.directory, manifest.flavour, has_copies=has_copies)
        _check_known(acts_from, stored.directory, onnx_dir)
        stored.check_layers(layers_of_export(onnx_dir, manifest))
        base = compare_bases(stored.config.made_for, base_of_export(onnx_dir, manifest))
        base.settle(adapter_dir, strict=strict_base, error=CheckpointError)
        updates = {path: stored.update(path) for path in stored.sites}
        _warn_of_parts_left_out(adapter_dir, updates, manifest)
        copies = {parameter: tensor.array() for parameter, tensor in stored.copies.items()}
        changes = Changes(updates)
        if parameters is not None:
            changes = parameters.changes(updates, copies, name)
        fields: Mapping[str, Any] = json.loads(stored.config.to_json())
    return changes, fields, base


def _check_known(tokens: Iterable[int], adapter: object, onnx_dir: str | Path) -> None:
    """Check that an export's model has the tokens from which on an adapter acts."""
    fields = read_config_fields(Path(onnx_dir)) or {}
    vocabulary = (fields.get("text_config") or fields).get("vocab_size")
    if isinstance(vocabulary, int) and (outside := [token for token in tokens if token >= vocabulary]):
        raise ExportError(
            f"{adapter} acts from tokens on of which {listed(outside)} is outside the export's vocabulary of "
            f"{vocabulary} tokens; give the ids that the model's tokenizer has for the invocation's text"
        )


def _check_takes(stored: StoredAdapter, onnx_dir: str | Path, manifest: Manifest) -> None:
    """Check that an export takes adapters of a method."""
    stored.method.check_can_be_data(stored.directory, "an adapter as data of an export")
    inputs = manifest.adapter_inputs
    if stored.method.scales_rows and inputs is not None and not inputs.scaled:
        raise ExportError(
            f"{stored.directory} is {an(stored.method.config.TITLE)} adapter, which scales the outputs of layers, and "
            f"{onnx_dir} was exported with adapters that do not, so it takes none; export the model with "
            f"{option(adapters='data')} and {option(dora=True)}, or with this adapter merged "
            f"({option(adapters='merged')})"
        )


def _warn_of_parts_left_out(adapter_dir: str | Path, paths: Iterable[str], manifest: Manifest) -> None:
    """Warn of changed layers that the decoder does not run, such as a companion's: the export lacks them."""
    uncalled = () if manifest.adapter_inputs is None else manifest.adapter_inputs.uncalled
    left = [path for path in paths if path in uncalled]
    if left and manifest.flavour == DECODER_KIND:
        warn_caller(
            f"{adapter_dir} changes {listed(left, 3)} too, which the decoder of the export does not run; it has "
            "nothing of the adapter there"
        )

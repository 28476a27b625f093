"""`fold_onnx`: fold an adapter into the weights of an exported ONNX model, without the PyTorch model."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import onnx_ir as ir

from gralora_fx.base.progress.console import with_progress
from gralora_fx.base.progress.stages import timed
from gralora_fx.base.sources.rewriting import NewFile, write_files
from gralora_fx.base.sources.same_base import BaseComparison, compare_bases
from gralora_fx.core.adapters.stored_adapter import StoredAdapter, open_adapter
from gralora_fx.core.config.checks import check_acts_everywhere
from gralora_fx.core.loading.adapter_facts import needed_quantization
from gralora_fx.errors import CheckpointError, ExportError, MergeError, command, option
from gralora_fx.exporters.artifact.staging import (
    check_output,
    check_replaced,
    file_sizes,
    require_space,
    staged,
    warn_of_lost_adapters,
)
from gralora_fx.exporters.fold.fold_report import FoldedSite, FoldReport
from gralora_fx.exporters.fold.matching_weights import BaseWeights
from gralora_fx.exporters.fold.onnx_rewriting import OnnxRewriting, plan_rewriting
from gralora_fx.exporters.fold.replaced_parameters import Replacements, find_replacements
from gralora_fx.exporters.fold.requantize import Survival, check_survival, overall_share, survival_by_layer
from gralora_fx.exporters.fold.source_export import (
    SourceExport,
    check_earlier_adapters,
    digest_of,
    open_export,
    with_adapter,
)
from gralora_fx.exporters.fold.stack_locations import find_stacks, named_by_export
from gralora_fx.exporters.fold.weight_locations import BY_NAME, Export, WeightLocation, find_locations
from gralora_fx.format.export_checks import check_files
from gralora_fx.format.export_directory import MANIFEST_NAME
from gralora_fx.format.export_usage import usage_of
from gralora_fx.format.manifest import FileEntry, Manifest, WeightEntry, describe_files
from gralora_fx.run.sessions.exported_base import base_of_export


@with_progress
def fold_onnx(
    onnx_dir: str | Path,
    adapter_dir: str | Path,
    output_dir: str | Path,
    *,
    base: str | Path | None = None,
    requantize: bool = False,
    force: bool = False,
    overwrite: bool = False,
    adapter_name: str = "default",
    strict_base: bool = False,
) -> FoldReport:
    """Fold a saved adapter into an exported model, by changing only the weights in its files.

    The result equals an export of the merged model, within rounding. Weights are read, changed in float32 or
    better and written a few megabytes at a time; nothing is traced. The weight of each layer is found where the
    export's manifest says, else by the initializers' names, else by the values of the base. A weight that is shared
    with an embedding is copied first. The directory is written atomically, and `onnx_dir` is not changed.

    Args:
        onnx_dir: An export of the base model, by `export_onnx` with `adapters="merged"` or by another exporter, or its
            ONNX file. Adapters that were folded into it before stay, and this one is added. If another exporter's file
            is given, only that file is written, with its data and with configuration and tokenizer that lie beside it.
        adapter_dir: A PEFT-format GraLoRA, LoRA or DoRA adapter: local directory or hub id.
        output_dir: The directory to write: new, empty, or an earlier export of the same base and task.
        base: The base model's directory or hub id, with safetensors files: to find weights whose names are ambiguous,
            to check the others, and to quantize from. None if none of this is needed.
        requantize: Whether a quantized weight may be quantized again, with ONNX Runtime's own arithmetic as in an
            export: from `base` if it is given, else from its dequantized values.
        force: Whether to write a re-quantized export even if rounding removes half of a layer's update or more (see
            `FoldedSite.survival`), and to fold an adapter beside an earlier one that is the same, that names another
            base, or that changes parameters which one of them replaces.
        overwrite: Whether an earlier export of another base or task at `output_dir` may be replaced.
        adapter_name: The adapter's name in the manifest; a number is appended if another one has it.
        strict_base: Whether to refuse an adapter that is not known to be of the export's base, instead of a warning.

    Returns:
        Where each weight was found, and the files written.

    Raises:
        ConfigError: The adapter's configuration is missing or invalid.
        CheckpointError: The adapter's or the base's tensors are missing, damaged or do not fit their configuration,
            the adapter is of another base, or a file of weights changes while it is read.
        ExportError: `onnx_dir` holds no ONNX model or damaged files, or the output may not be written.
        MergeError: The adapter does not fit the export, a weight is shared or quantized, or a result is not finite.
    """
    seconds: dict[str, float] = {}
    with ExitStack() as stack:
        with timed("find", seconds, "finding weights"):
            check_output(output_dir)  # before anything is loaded
            source = open_export(onnx_dir)
            _check_apart(source, onnx_dir, output_dir)
            manifest = source.manifest
            adapter = stack.enter_context(open_adapter(adapter_dir))
            check_acts_everywhere(adapter.config.acts_from, adapter.directory, "folding", MergeError)
            graphs = {file: model.graph for file, model in source.models.items()}
            adapter = named_by_export(graphs, adapter)
            compared, sha256 = _compare(adapter, source, base), digest_of(adapter)
            if manifest is not None:
                if not force:
                    check_earlier_adapters(manifest, adapter, sha256)
                if not overwrite:
                    check_replaced(output_dir, task=manifest.task, fingerprint=manifest.base_fingerprint)
            warn_of_lost_adapters(output_dir, ())
            compared.settle(adapter_dir, strict=strict_base, error=CheckpointError)
            unread = () if manifest is None else tuple(site.path for site in manifest.sites if not site.is_read)
            left_out = tuple(path for path in unread if path in adapter.sites)
            adapter = adapter.without(unread)
            export = Export(graphs, manifest, None if base is None else _base_weights(base, manifest))
            locations = find_locations(export, adapter)
            stacks = find_stacks(graphs, adapter)
            replacements = find_replacements(export, adapter, locations)
            _check_quantized(export, locations, replacements, requantize=requantize)
        with timed("fold", seconds, "folding"), staged(output_dir) as stage:
            rewriting, quantized = plan_rewriting(source.models, export, adapter, locations, replacements, stacks)
            files = rewriting.files(source.data)
            require_space(output_dir, sum(file.nbytes for file in files))
            written = _write(stage, source, rewriting.changed, files)
            survival = survival_by_layer(quantized)
            if not force:
                check_survival(survival)
            name = None
            if manifest is not None:
                changed, name = with_adapter(manifest, adapter_name, adapter, sha256, compared)
                changed = dataclasses.replace(changed, files=written, weights=_renamed(manifest, rewriting))
                (stage / MANIFEST_NAME).write_text(changed.to_json(), encoding="utf-8")
    return FoldReport(
        Path(output_dir),
        name,
        (
            *(_site(location, rewriting, survival) for location in locations),
            *(FoldedSite(at.path, at.file, str(at.value.name), 0, at.shape[0], BY_NAME) for at in stacks),
        ),
        tuple(adapter.copies),
        rewriting.bytes_changed,
        overall_share(survival),
        file_sizes(output_dir),
        seconds,
        adapters=() if manifest is None or name is None else (*manifest.adapters, name),
        base=compared,
        unread=left_out,
        usage=usage_of(output_dir, None if manifest is None else manifest.task, file_sizes(output_dir)),
    )


def _check_apart(source: SourceExport, onnx_dir: str | Path, output_dir: str | Path) -> None:
    """Check that the output is neither the source nor around or within it."""
    output = Path(os.path.realpath(output_dir))  # resolves loops of links too
    directory = Path(os.path.realpath(source.directory))
    is_within = directory in output.parents and not source.is_lone_file  # beside a file there may be anything
    if output == directory or is_within or output in directory.parents:
        raise ExportError(
            f"the output {output_dir} is the export {onnx_dir} itself, or one lies within the other; give another "
            "output directory"
        )


def _compare(adapter: StoredAdapter, source: SourceExport, base: str | Path | None) -> BaseComparison:
    """Compare an adapter's base with the export's, and check that the adapter fits its layers."""
    if (known := source.layers) is not None:
        adapter.check_layers(known)
    return compare_bases(adapter.config.made_for, base_of_export(source.directory, source.manifest, base))


def _base_weights(base: str | Path, manifest: Manifest | None) -> BaseWeights:
    """Return the base's weights, rounded as the exported ones were."""
    record = None if manifest is None or manifest.base is None else manifest.base.quantization
    return BaseWeights(base, needed_quantization(record, str(base)))


def _check_quantized(
    export: Export, locations: list[WeightLocation], replacements: Replacements, *, requantize: bool
) -> None:
    """Check that weights are floats, or may be quantized again."""
    every = [*locations, *(location for location, _ in replacements.layers)]
    quantized = list(dict.fromkeys(location.path for location in every if location.weight.storage != "float"))
    if quantized and not requantize:
        raise MergeError(
            f"the weights of {quantized[0]}{f' and {len(quantized) - 1} other layers' if len(quantized) > 1 else ''} "
            "are quantized, so that a small update may be rounded away: fold before quantizing "
            f"({command('export_onnx')} with the adapter), or quantize again with {option(requantize=True)}, best "
            f"with {option(base=...)}"
        )
    if requantize and not quantized:
        raise MergeError(f"{option(requantize=True)} has no effect: no weight that changes is quantized; leave it out")
    if quantized and export.base is not None and export.manifest is not None and export.manifest.adapters:
        raise MergeError(
            f"the export has {', '.join(export.manifest.adapters)} folded in, so that the base's weights are not its "
            f"own; leave {option(base=...)} out"
        )


def _write(
    stage: Path, source: SourceExport, changed: Set[str], data: Sequence[NewFile]
) -> dict[str, FileEntry] | None:
    """Write every file; return the manifest's entries for them, if there is a manifest."""
    manifest = source.manifest
    with ThreadPoolExecutor(1) as reader:  # computes digests of the files while they are read
        unchanged = None
        if manifest is not None and manifest.files is not None:
            unchanged = reader.submit(check_files, source.directory, manifest, digests=True)
        digests = write_files(data, stage, workers=1, digests=manifest is not None)
        for file, model in source.models.items():
            if file in changed:
                ir.save(model, stage / file)
            else:
                shutil.copyfile(source.directory / file, stage / file)
        for name in source.companions:
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.directory / name, stage / name)
        if unchanged is not None:
            unchanged.result()
    if manifest is None:
        return None
    entries = {file.name: FileEntry(file.nbytes, digests[file.name]) for file in data}
    return dict(sorted({**entries, **describe_files(stage, [*source.models, *source.companions])}.items()))


def _renamed(manifest: Manifest, rewriting: OnnxRewriting) -> Mapping[str, tuple[WeightEntry, ...]] | None:
    """Return the recorded locations of weights, with the new initializers that some layers have."""
    if manifest.weights is None:
        return None
    return {
        path: tuple(
            dataclasses.replace(e, initializer=rewriting.renamed.get((e.file, path, e.initializer), e.initializer))
            for e in entries
        )
        for path, entries in manifest.weights.items()
    }


def _site(location: WeightLocation, rewriting: OnnxRewriting, survival: Mapping[str, Survival]) -> FoldedSite:
    old = location.weight.name
    name = rewriting.renamed.get((location.file, location.path, old), old)
    share = survival[location.path].share if location.path in survival else None
    return FoldedSite(location.path, location.file, name, location.start, location.stop, location.how, share)

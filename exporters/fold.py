"""`fold_onnx`: an adapter folded into the weights of an exported ONNX model, without the model itself."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from gralora_fx.errors import CheckpointError, ExportError, MergeError
from gralora_fx.exporters.artifact.staging import (
    check_output,
    check_replaced,
    file_sizes,
    require_space,
    staged,
    warn_of_lost_adapters,
)
from gralora_fx.exporters.folding.adapter import SavedAdapter, read_saved_adapter
from gralora_fx.exporters.folding.base_weights import BaseWeights
from gralora_fx.exporters.folding.data_files import copy_changed
from gralora_fx.exporters.folding.earlier import check_earlier_adapters
from gralora_fx.exporters.folding.edits import LayerEdit, MatrixEdit
from gralora_fx.exporters.folding.opening import Opened, is_lone_file, open_export, source_directory
from gralora_fx.exporters.folding.parameters import Replacements, find_replacements
from gralora_fx.exporters.folding.places import Export, Place, find_places
from gralora_fx.exporters.folding.products import ProductWeight, product_weights
from gralora_fx.exporters.folding.report import FoldedSite, FoldReport
from gralora_fx.exporters.folding.requantize import QuantizedEdit, Survival, check_survival
from gralora_fx.exporters.folding.rewriting import Rewriting
from gralora_fx.progress.stages import timed
from gralora_fx.runtime.export_base import base_of_export, layers_of_export
from gralora_fx.runtime.export_directory import MANIFEST_NAME
from gralora_fx.runtime.export_files import check_files, describe_files
from gralora_fx.runtime.manifest import AdapterEntry, FileEntry, Manifest
from gralora_fx.sources.same_base import BaseComparison, BaseSource, compare_bases


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
    """Fold a saved adapter into an exported model, by changing the weights in its files alone.

    The result is what an export of the merged model would be, within rounding. Weights are read, changed in float32 or
    better and written a few megabytes at a time; nothing is traced. The weight of each layer is found where the
    export's manifest says, else by the initializers' names, else by the values of the base. A weight that is shared
    with an embedding is copied first. The directory is written whole or not at all, and `onnx_dir` stays as it is.

    Args:
        onnx_dir: An export of the base model, of `export_onnx` with `adapters="merged"` or of another exporter, or its
            ONNX file. An adapter that was folded into it before stays, and this one is added. Of another exporter's
            file, that file alone is written, with its data and with configuration and tokenizer that lie beside it.
        adapter_dir: A PEFT-format GraLoRA or LoRA adapter: local directory or hub id.
        output_dir: The directory to write: new, empty, or an earlier export of the same base and task.
        base: The base model's directory or hub id, with safetensors files: to find weights whose names do not tell, to
            check the others, and to quantize from. None where none is needed.
        requantize: Whether a quantized weight may be quantized again, with ONNX Runtime's own arithmetic as in an
            export: from `base` where it is given, else from its dequantized values.
        force: Whether to write a re-quantized export though at some layer half of the update or more is rounded away
            (see `FoldedSite.survival`), and to fold an adapter beside an earlier one that is the same, that names
            another base, or that changes parameters which one of them replaces.
        overwrite: Whether an earlier export of another base or task at `output_dir` may be replaced.
        adapter_name: The adapter's name in the manifest; a number is appended if another one has it.
        strict_base: Whether to refuse an adapter that is not known to be of the export's base, instead of a warning.

    Returns:
        What was found how, and what was written.

    Raises:
        ConfigError: The adapter's configuration is missing or invalid.
        CheckpointError: The adapter's or the base's tensors are missing, damaged or do not fit their configuration,
            or the adapter is of another base.
        ExportError: `onnx_dir` holds no ONNX model or damaged files, or the output may not be written.
        MergeError: The adapter does not fit the export, a weight is shared or quantized, or a result is not finite.
    """
    seconds: dict[str, float] = {}
    with timed("find", seconds):
        _check_apart(onnx_dir, output_dir)
        opened = open_export(onnx_dir)
        manifest = opened.manifest
        adapter, compared = _read_adapter(adapter_dir, opened, base)
        if manifest is not None:
            if not force:
                check_earlier_adapters(manifest, adapter)
            if not overwrite:
                check_replaced(output_dir, task=manifest.task, fingerprint=manifest.base_fingerprint)
        warn_of_lost_adapters(output_dir, ())
        compared.settle(adapter_dir, strict=strict_base, error=CheckpointError)
        export, places, replacements = _find(opened, adapter, base)
        _check_quantized(export, places, replacements, requantize=requantize)
    with timed("fold", seconds), staged(output_dir) as stage:
        rewriting, edits = _planned(opened, adapter, places, replacements, export)
        require_space(output_dir, sum(path.stat().st_size for path in opened.data))
        with ThreadPoolExecutor(1) as reader:  # digests of what is read, while it is
            unchanged = reader.submit(_check_digests, opened)
            digests = _write(stage, opened, rewriting)
            unchanged.result()
        if not force:
            check_survival(edits)
        name = None
        if manifest is not None:
            name = _free_name(adapter_name, manifest)
            found = _updated(manifest, adapter, name, compared, rewriting, stage, digests)
            (stage / MANIFEST_NAME).write_text(found.to_json(), encoding="utf-8")
    path, sizes = Path(output_dir), file_sizes(output_dir)
    survival = {path: share for edit in edits for path, share in edit.survival.items()}
    sites = tuple(_site(place, rewriting, survival) for place in places)
    replaced = tuple(adapter.replaced)
    return FoldReport(
        path,
        name,
        sites,
        replaced,
        rewriting.bytes_changed,
        _overall(survival),
        sizes,
        seconds,
        adapters=() if manifest is None or name is None else (*manifest.adapters, name),
        base=compared,
    )


def _check_apart(onnx_dir: str | Path, output_dir: str | Path) -> None:
    """Check that the output is neither the source nor around or within it.

    Raises:
        ExportError: It is, or may not be written.
    """
    output = Path(os.path.realpath(check_output(output_dir)))  # of loops, too
    source = Path(os.path.realpath(source_directory(onnx_dir)))
    is_within = source in output.parents and not is_lone_file(onnx_dir)  # beside a file there may be anything
    if output == source or is_within or output in source.parents:
        raise ExportError(
            f"the output {output_dir} is the export {onnx_dir} itself, or one lies within the other; give another "
            "output directory"
        )


def _read_adapter(
    adapter_dir: str | Path, opened: Opened, base: str | Path | None
) -> tuple[SavedAdapter, BaseComparison]:
    """The adapter, and how its base compares with the export's.

    Raises:
        ConfigError: Its configuration is missing or invalid.
        CheckpointError: Its tensors are missing, damaged or do not fit their configuration.
    """
    manifest = opened.manifest
    known = None if manifest is None else layers_of_export(opened.directory, manifest)
    adapter = read_saved_adapter(adapter_dir, known)
    made = BaseSource(adapter.config.base_model_name_or_path, adapter.config.revision)
    return adapter, compare_bases(made, base_of_export(opened.directory, manifest, base))


def _find(opened: Opened, adapter: SavedAdapter, base: str | Path | None) -> tuple[Export, list[Place], Replacements]:
    """The export's weights, where the adapter's layers are among them, and what it replaces.

    Raises:
        CheckpointError: The base's tensors are missing, damaged or do not fit.
        MergeError: A layer or a parameter of the adapter is not found.
    """
    graphs = {file: model.graph for file, model in opened.models.items()}
    weights = {file: product_weights(graph) for file, graph in graphs.items()}
    export = Export(weights, opened.manifest, None if base is None else BaseWeights(base))
    places = find_places(export, adapter)
    return export, places, find_replacements(export, graphs, adapter, places)


def _check_quantized(export: Export, places: list[Place], replacements: Replacements, *, requantize: bool) -> None:
    """Check that weights are floats, or may be quantized again.

    Raises:
        MergeError: They are not, or the base cannot be used for that.
    """
    every = [*places, *(place for place, _ in replacements.layers)]
    quantized = list(dict.fromkeys(place.path for place in every if place.weight.storage != "float"))
    if quantized and not requantize:
        raise MergeError(
            f"the weights of {quantized[0]}{f' and {len(quantized) - 1} other layers' if len(quantized) > 1 else ''} "
            "are quantized, so that a small update may be rounded away: fold before quantizing (export_onnx with the "
            "adapter), or quantize again with requantize=True, best with base=..."
        )
    if requantize and not quantized:
        raise MergeError("requantize=True has no effect: no weight that changes is quantized; leave it out")
    if quantized and export.base is not None and export.manifest is not None and export.manifest.adapters:
        raise MergeError(
            f"the export has {', '.join(export.manifest.adapters)} folded in, so that the base's weights are not its "
            "own; leave base=... out"
        )


def _planned(
    opened: Opened, adapter: SavedAdapter, places: list[Place], replacements: Replacements, export: Export
) -> tuple[Rewriting, list[QuantizedEdit]]:
    """What is to be rewritten, and the edits of quantized weights."""
    layers: dict[tuple[str, int], list[LayerEdit]] = {}
    weights: dict[tuple[str, int], ProductWeight] = {}
    found = [(p, LayerEdit(p.path, p.start, p.stop, (adapter.updates[p.path],))) for p in places]
    for place, edit in (*found, *replacements.layers):
        key = place.file, id(place.weight)
        weights[key] = place.weight
        layers.setdefault(key, []).append(edit)
    rewriting = Rewriting(opened.models)
    quantized: list[QuantizedEdit] = []

    def base_weight(path: str) -> NDArray[Any]:
        return export.base_values(path, adapter.features(path))[0]

    for key, edits in layers.items():
        weight = weights[key]
        if weight.storage == "float":
            rewriting.fold_matrix(key[0], MatrixEdit(weight, tuple(edits)))
        else:
            quantized.append(QuantizedEdit(weight, tuple(edits), None if export.base is None else base_weight))
            rewriting.fold_quantized(key[0], quantized[-1])
    for value_place, values in replacements.values:
        rewriting.replace(value_place, values)
    rewriting.check_apart()
    return rewriting, quantized


def _check_digests(opened: Opened) -> None:
    """Check that the source's files are what was exported: the result's digests would hide that they are not.

    Raises:
        ExportError: One is not.
    """
    if opened.manifest is not None and opened.manifest.files is not None:
        check_files(opened.directory, opened.manifest, digests=True)


def _write(stage: Path, opened: Opened, rewriting: Rewriting) -> dict[str, FileEntry]:
    """Write every file; the result describes those whose digest is known by then."""
    entries: dict[str, FileEntry] = {}
    for path in opened.data:
        digest = copy_changed(path, stage / path.name, rewriting.changes.get(path, ()))
        entries[path.name] = FileEntry((stage / path.name).stat().st_size, digest)
    for file, model in opened.models.items():
        if file in rewriting.changed:
            ir.save(model, stage / file)
        else:
            shutil.copyfile(opened.directory / file, stage / file)
    for name in opened.companions:
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(opened.directory / name, stage / name)
    others = [*opened.models, *opened.companions]
    return entries | describe_files(stage, others)


def _free_name(name: str, manifest: Manifest) -> str:
    """An adapter's name, with a number if another one has it."""
    count, found = 1, name
    while found in manifest.adapters:
        count += 1
        found = f"{name}_{count}"
    return found


def _updated(
    manifest: Manifest,
    adapter: SavedAdapter,
    name: str,
    compared: BaseComparison,
    rewriting: Rewriting,
    stage: Path,
    files: Mapping[str, FileEntry],
) -> Manifest:
    """The manifest of the result: the adapter, the files as they are now, and nothing that was measured before.

    A base with replaced parameters has a fingerprint of its own that is not known here, so it is left out.
    """
    config = json.loads(adapter.config.changed(inference_mode=True).to_json())
    weights = manifest.weights
    if weights is not None:
        weights = {
            path: tuple(
                dataclasses.replace(e, initializer=rewriting.renamed.get((e.file, path, e.initializer), e.initializer))
                for e in entries
            )
            for path, entries in weights.items()
        }
    return dataclasses.replace(
        manifest,
        adapters={**manifest.adapters, name: AdapterEntry(config, adapter.sha256, compared.to_dict())},
        base_fingerprint=None if adapter.replaced else manifest.base_fingerprint,
        files=dict(sorted(files.items())),
        verification=None,
        quality=None,
        weights=weights,
    )


def _site(place: Place, rewriting: Rewriting, survival: Mapping[str, Survival]) -> FoldedSite:
    old = place.weight.name
    name = rewriting.renamed.get((place.file, place.path, old), old)
    share = survival[place.path].share if place.path in survival else None
    return FoldedSite(place.path, place.file, name, place.start, place.stop, place.how, share)


def _overall(survival: Mapping[str, Survival]) -> float | None:
    if not survival:
        return None
    return Survival(sum(s.kept for s in survival.values()), sum(s.whole for s in survival.values())).share

"""`export_triton`: write an export as a model of a Triton repository, for its ONNX Runtime backend."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from gralora_fx.base.progress.report import Invocation, Report, Summary, written, written_lines
from gralora_fx.base.progress.stages import timed
from gralora_fx.base.sources.model_files import usable_directory, usable_path
from gralora_fx.errors import ExportError, Message, command, joined, listed, marked, option, shown
from gralora_fx.exporters.artifact.manifest import save_models
from gralora_fx.exporters.artifact.staging import check_converted, file_sizes, require_space, staged
from gralora_fx.exporters.artifact.triton_config import TritonConfig, tensors_of
from gralora_fx.exporters.rules.adapters.adapter_groups import ConstantAdapters
from gralora_fx.exporters.rules.products.stored_rows import external_tensors
from gralora_fx.format.adapter_inputs import ADAPTER_IDS, BASE, AdapterInputs, is_adapter_tensor
from gralora_fx.format.adapter_paths import SUFFIX, check_name, own_adapters
from gralora_fx.format.export_checks import check_files, weight_files
from gralora_fx.format.export_directory import MODEL_NAME, ROWS_NAME
from gralora_fx.format.manifest import Manifest, read_manifest
from gralora_fx.format.tasks import find_task
from gralora_fx.run.sessions.adapter_arrays import as_arrays, stacked
from gralora_fx.run.sessions.adapter_file import read_record, read_tensors
from gralora_fx.run.sessions.session import check_external_data, open_session

_CONFIG, _VERSION, _LABELS, _IDS = "config.pbtxt", "1", "labels.txt", "adapters.json"


@dataclass(frozen=True)
class TritonReport(Report):
    """The result of `export_triton`.

    Attributes:
        output_dir: The model's directory in the repository.
        files: Its files with their sizes in bytes.
        config: The contents of its `config.pbtxt`.
        adapters: The id of each adapter that is part of the model, by name; 0 is the base.
        notes: Features that Triton does not support with this model, a sentence each.
    """

    output_dir: Path
    files: dict[str, int]
    config: TritonConfig
    adapters: Mapping[str, int]
    notes: tuple[str, ...]

    @property
    def summary(self) -> Summary:
        """Lines on batching, the files written, how the model is used, and Triton's limits."""
        most = self.config.max_batch
        rows = f"in batches of up to {most} rows" if most else "one request at a time"
        repository = str(self.output_dir.parent)
        python = f"start tritonserver with the model repository {repository!r}"
        usage = Invocation(python, "tritonserver", {"model_repository": repository})
        notes = [f"{len(self.notes)} limits of Triton, which the details list"]
        return Summary(f"Triton runs it {rows}", written(self.output_dir, self.files), usage, notes)

    @property
    def details(self) -> str:
        """Lines on the files, the inputs of a request, and Triton's limits."""
        lines = written_lines(self.output_dir, self.files, (40, 16))
        given = [tensor.name for tensor in self.config.inputs if not is_adapter_tensor(tensor.name)]
        more = len(self.config.inputs) - len(given)
        lines.append(f"inputs: {listed(given)}" + (f", and {more} tensors of the adapter" if more else ""))
        if ADAPTER_IDS in given:
            ids = listed(["0 the base", *(f"{number} {name}" for name, number in self.adapters.items())])
            lines.append(f"{ADAPTER_IDS}: {ids}")
        return joined([*lines, *(Message(f"note: {marked(note)}") for note in self.notes)])


def export_triton(
    onnx_dir: str | Path,
    repository: str | Path,
    *,
    name: str | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    max_batch: int = 8,
    threads: int | None = None,
    overwrite: bool = False,
) -> TritonReport:
    """Write an export into a Triton model repository.

    Triton batches a merged export. It also batches one with adapters as data: the adapters become part of the model,
    and every row of a batch chooses one by its id. An export that takes adapters as inputs, or whose rows cannot be
    told apart, runs one request at a time, since a request brings the tensors of its adapter.

    Args:
        onnx_dir: An export of `export_onnx` that needs no cache.
        repository: The model repository, whose other models stay.
        name: The model's name in it; None for that of the export's directory.
        adapters: `.onnx_adapter` files by name, beside those of the export.
        max_batch: The most rows that Triton runs together.
        threads: Threads of an operator; None for ONNX Runtime's choice.
        overwrite: Whether an earlier model of the name is replaced.

    Returns:
        The files written, and Triton's limits with this model.

    Raises:
        ExportError: There is no such export, it is of a model with a cache, an adapter does not fit, the name is
            invalid, or the output may not be written.
    """
    source = usable_path(onnx_dir, ExportError, remedy="give the directory of an export")
    manifest = _checked_manifest(source, adapters)
    name = check_name(source.absolute().name if name is None else name, of="a model")
    for keyword, value in (("max_batch", max_batch), ("threads", threads)):
        if value is not None and (type(value) is not int or value < 1):
            raise ExportError(f"{option(keyword)} must be a whole number of at least 1, but got {shown(value)}")
    output = usable_directory(repository, ExportError, remedy="give a model repository") / name
    check = functools.partial(check_converted, sources=[source], marker=_CONFIG, overwrite=overwrite)
    check(output)
    with timed("writing"), staged(output, check) as stage:
        folder = stage / _VERSION
        folder.mkdir()
        ids = _write_model(source, manifest, adapters or {}, folder, output)
        config, notes = _config(folder, name, manifest, ids, max_batch, threads, _write_labels(source, manifest, stage))
        (stage / _CONFIG).write_text(config.to_text(), encoding="utf-8")
        if ids:
            (stage / _IDS).write_text(json.dumps(ids, indent=2) + "\n", encoding="utf-8")
    return TritonReport(output, file_sizes(output), config, ids, tuple(notes))


def _checked_manifest(source: Path, adapters: Mapping[str, str | Path] | None) -> Manifest:
    manifest = read_manifest(source)
    check_files(source, manifest, digests=False)
    if (manifest.task or "").endswith("-with-past") or not (source / MODEL_NAME).is_file():
        raise ExportError(
            f"{source} was exported for {manifest.task}, and Triton's ONNX Runtime backend keeps no cache between "
            "steps; serve it with gralora-fx serve, or export the model without a cache"
        )
    if adapters and not _has_rows(manifest):
        if manifest.rows is not None:
            raise ExportError(f"no adapter can become a part of {source}: it has {manifest.rows}; fold one into it")
        raise ExportError(
            f"{source} was exported with {option(adapters=manifest.adapters_mode)}, so no adapter can become a part "
            f"of the model; export it with {option(adapters='data')}"
        )
    return manifest


def _has_rows(manifest: Manifest) -> bool:
    """Return whether there is a graph whose rows choose among adapters."""
    return manifest.has_rows and manifest.adapter_inputs is not None


def _write_model(
    source: Path, manifest: Manifest, adapters: Mapping[str, str | Path], folder: Path, output: Path
) -> dict[str, int]:
    """Write the model and its weights; return the ids of the adapters that became part of it."""
    has_rows = _has_rows(manifest)
    path = source / (ROWS_NAME if has_rows else MODEL_NAME)
    check_external_data(path, weights=weight_files(manifest))
    model = ir.load(path)
    if not has_rows or manifest.adapter_inputs is None:
        data = {Path(tensor.path) for _, tensor in external_tensors(model)}
        require_space(output, sum(path.stat().st_size for path in data))
        for path in (source / MODEL_NAME, *sorted(data)):
            shutil.copyfile(path, folder / path.name)
        return {}
    inputs, files = manifest.adapter_inputs, _files_of_adapters(source, adapters)
    tensors = [_tensors(name, path, inputs, manifest.base_fingerprint) for name, path in files.items()]
    ConstantAdapters(as_arrays(stacked(tensors, inputs)))(model)
    save_models({Path(MODEL_NAME).stem: model}, folder, output)
    return {name: number for number, name in enumerate(files, BASE + 1)}


def _files_of_adapters(source: Path, given: Mapping[str, str | Path]) -> dict[str, Path]:
    """Return the export's own adapters and the given ones, by name."""
    own = own_adapters(source, ExportError)
    if twice := sorted(set(own) & set(given)):
        raise ExportError(f"{source} has an adapter {twice[0]!r} of its own; give yours another name")
    return {**own, **{name: Path(path) for name, path in given.items()}}


def _tensors(name: str, path: Path, inputs: AdapterInputs, fingerprint: str | None) -> Mapping[str, Any]:
    check_name(name)
    if path.suffix != SUFFIX:
        raise ExportError(f"{path} is not an {SUFFIX} file; {command('export_adapter')} makes one of a PEFT adapter")
    return read_tensors(path, read_record(path), inputs, fingerprint, ExportError)


def _write_labels(source: Path, manifest: Manifest, stage: Path) -> dict[str, str]:
    """Write the class names of a classifier, if the configuration has them; return their file by output."""
    task = find_task(manifest.task)
    if task is None or "SEQ_CLS" not in task.adapters:  # one class for the whole input
        return {}
    names = json.loads((source / "config.json").read_text(encoding="utf-8")).get("id2label") or {}
    if not names:
        return {}
    lines = [" ".join(str(names[key]).split()) for key in sorted(names, key=int)]
    (stage / _LABELS).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"logits": _LABELS}


def _config(
    folder: Path,
    name: str,
    manifest: Manifest,
    ids: dict[str, int],
    max_batch: int,
    threads: int | None,
    labels: Mapping[str, str],
) -> tuple[TritonConfig, list[str]]:
    """Return the configuration of a written model for Triton, and Triton's limits with it."""
    session = open_session(folder)
    inputs, outputs = session.get_inputs(), session.get_outputs()
    optional = [value for value in session.get_overridable_initializers() if is_adapter_tensor(value.name)]
    takes_adapters = bool(optional) or any(is_adapter_tensor(value.name) for value in inputs)
    first = {(list(value.shape) or [None])[0] for value in (*inputs, *outputs)}
    batched = not takes_adapters and len(first) == 1 and isinstance(next(iter(first)), str)
    parameters = {} if threads is None else {"intra_op_thread_count": str(threads)}
    if ids:
        parameters["adapters"] = json.dumps(ids)
    config = TritonConfig(
        name,
        max_batch if batched else 0,
        (*tensors_of(inputs, batched=batched), *tensors_of(optional, batched=batched, optional=True)),
        tensors_of(outputs, batched=batched, label_files=labels),
        parameters,
    )
    return config, [*_notes(manifest, takes_adapters=takes_adapters, batched=batched)]


def _notes(manifest: Manifest, *, takes_adapters: bool, batched: bool) -> Iterator[str]:
    yield "a request gives every input as tensors: Triton has no tokenizer, and fills in no default"
    if batched:
        yield "requests run together only if their shapes are equal; pad them to the same length"
    elif takes_adapters:
        remedy = f"export with {option(adapters='data')} for that" if manifest.rows is None else str(manifest.rows)
        yield Message(
            "no requests run together, and each gives its adapter's tensors, since the backend has no inputs that the "
            f"rows of a batch share; {remedy}"
        )
    else:
        yield "no requests run together, since not every input and output has a batch of any size as its first axis"
    if _has_rows(manifest):
        yield "an adapter is added by writing the model again; an id that is not one fails all that runs with it"
    if manifest.requires:
        needed = listed(f"{package} {version}" for package, version in manifest.requires.items())
        yield f"Triton's own ONNX Runtime must be as new as the export needs: {needed}"

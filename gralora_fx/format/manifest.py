"""`gralora_export.json`, the manifest of an export: the contents and origin of the directory, typed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any

from gralora_fx.base.sources.model_files import usable_path
from gralora_fx.errors import ExportError, GraloraError, option
from gralora_fx.format.adapter_inputs import AS_DATA, BIAS, BLOCKS, EARLIER_MODES, WHOLE, AdapterInputs
from gralora_fx.format.export_directory import (
    ADAPTERS,
    DECODER,
    DECODER_KIND,
    ENCODER_DECODER_KIND,
    MANIFEST_NAME,
    PLAIN_KIND,
    ROWS_NAME,
    not_an_export,
)
from gralora_fx.format.json_records import MISSING, FieldError, read_object, wrong_fields
from gralora_fx.format.quantized_weights import Quality, QuantizedWeights
from gralora_fx.format.size_limits import SizeLimit

if TYPE_CHECKING:
    from gralora_fx.format.input_names import InputFacts

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class AdapterEntry:
    """An adapter that was folded into an export."""

    config: Mapping[str, Any]  # its `adapter_config.json`
    sha256: str | None  # digest of its `adapter_model.safetensors`, or None where that is not known
    # how the base that it was made for compared (see `BaseComparison`); None if not compared, as for an adapter
    # trained on the model itself
    base: Mapping[str, Any] | None = None
    # whether it was folded into weights that were rounded before, which rounded them once more
    rounded_again: bool = False


@dataclass(frozen=True)
class BaseEntry:
    """The base model that was exported, by the name it was given."""

    name: str  # its directory or hub id
    revision: str | None = None  # the commit of its hub repository, where that is known
    # how the exported weights were quantized before (see `BaseQuantization`); None for floats
    quantization: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class FileEntry:
    """A file of an export: its size in bytes and its SHA-256."""

    size: int
    sha256: str


@dataclass(frozen=True)
class SiteEntry:
    """A linear layer of the model that was exported (see `LinearSite`), and whether any output depends on it."""

    path: str
    kind: str
    in_features: int
    out_features: int
    is_read: bool = True
    is_layer: bool = True  # whether PEFT finds a layer at its path; a functional call is none


@dataclass(frozen=True)
class WeightEntry:
    """The place of a linear layer's weight in an export, for a layer that multiplies by a weight in a file."""

    file: str  # the ONNX file, such as `model.onnx`
    initializer: str  # name of the initializer that the products read; for a quantized one, of its integers
    start: int  # first of the layer's output features among the initializer's: it may hold several layers' weights
    stop: int  # end of them
    transposed: bool  # whether the initializer is stored `[in, out]`, not `[out, in]` as in PyTorch


@dataclass(frozen=True)
class RowsEntry:
    """The graph for rows that differ: a decoder's in length, or the reason why there is none.

    It takes adapters that are data as stacks with an id for each row (see `AdapterInputs.by_row`).
    """

    file: str | None  # the ONNX file; None where there is none
    reason: str | None = None  # why there is none; None where there is one

    def __str__(self) -> str:
        """Return the file, or the reason."""
        if self.file is None:
            return f"no {ROWS_NAME}: {self.reason}"
        return f"{self.file} is for batches whose rows differ in length or adapter"


@dataclass(frozen=True)
class CompanionEntry:
    """A part of a model that runs beside its graph, as a graph of its own."""

    inputs: Mapping[str, Any]  # shapes by name
    outputs: Mapping[str, Any]
    quantization: QuantizedWeights | None = None  # how its matrices are quantized, or None


@dataclass(frozen=True)
class Manifest:
    """The contents of `gralora_export.json`; fields with a default are not in every export."""

    schema_version: int  # version of the file's form
    task: str | None  # the task the model was exported for, or None
    # precision of the weights that are not quantized, and of the cache
    precision: Annotated[str, ("fp32", "fp16", "bf16")]
    quantization: QuantizedWeights | None = None  # how matrices are quantized, or None
    adapters_mode: str = "merged"  # how adapters are stored: `"merged"`, `"data"` or `"inputs"`
    logits: str = "all"  # which positions' logits the graph returns: `"last"` or `"all"`
    position_offset: int = 0  # number of rows of the position table that no position uses
    # folded adapters by name, in the order of folding
    adapters: Mapping[str, AdapterEntry] = field(default_factory=dict)
    base_fingerprint: str | None = None  # a digest of the base's weights
    sites: tuple[SiteEntry, ...] = ()  # the linear layers of the model
    # shapes of the graph's inputs by name; for several graphs, by the names of their files
    inputs: Mapping[str, Any] = field(default_factory=dict)
    outputs: Mapping[str, Any] = field(default_factory=dict)  # as `inputs`
    packages: Mapping[str, Any] = field(default_factory=dict)  # versions of the packages that made it
    attention: Mapping[str, Any] | None = None  # which layers' attention is fused; None for a model without any
    passes: tuple[Mapping[str, Any], ...] = ()  # reports of the passes, in order
    verification: Mapping[str, Any] | None = None  # measurements of the verification, or None
    quality: Quality | None = None  # how a quantized export differs from the float32 model, where that was measured
    # the adapter tensors that the graph takes; None where adapters are folded
    adapter_inputs: AdapterInputs | None = None
    # the oldest version of each package that runs the graph, where the usual ones do not all
    requires: Mapping[str, str] | None = None
    # every other file of the directory by its path; None where they were not recorded
    files: Mapping[str, FileEntry] | None = None
    # Where the weight of each linear layer lies, by its path; None where that was not recorded. A layer that no file
    # multiplies by is not in it.
    weights: Mapping[str, tuple[WeightEntry, ...]] | None = None
    base: BaseEntry | None = None  # the base model by name; None for one made in memory
    rows: RowsEntry | None = None  # the graph for rows that differ; None if not recorded
    flavour: str = PLAIN_KIND  # kind of export: `"plain"`, `"decoder"` or `"encoder-decoder"`
    # features' records of the graph's inputs, by their names in the file
    facts: Mapping[str, Any] = field(default_factory=dict)
    # parts of the model that run beside the graph, by the names of their files without a suffix
    companions: Mapping[str, CompanionEntry] = field(default_factory=dict)
    # `inputs` and `outputs` of graphs over the weights of `model.onnx` that other programs run in its place
    programs: Mapping[str, Any] = field(default_factory=dict)
    limits: tuple[SizeLimit, ...] = ()  # conditions on sizes of the graph's inputs

    @property
    def has_rows(self) -> bool:
        """True if there is a graph for rows that differ."""
        return self.rows is not None and self.rows.file is not None

    @property
    def trace_options(self) -> dict[str, Any]:
        """Options of `trace` that reproduce the exported trace."""
        return {name: value for facts in self.facts.values() for name, value in facts.trace_options.items()}

    def to_json(self) -> str:
        """Return the text of the file, keys sorted except adapters, which are in the order in which they were folded.

        Optional fields without a value are omitted, and so is what few exports have.
        """
        entries = dataclasses.asdict(self)
        optional = ("adapter_inputs", "attention", "base", "files", "quality", "requires", "rows", "weights")
        facts = entries.pop("facts")
        for site in (entries["adapter_inputs"] or {}).get("sites", ()):
            if not site["has_scale"]:  # most exports have none
                del site["has_scale"]
        for companion in entries["companions"].values():
            if companion["quantization"] is None:
                del companion["quantization"]
        for name in ("companions", "programs", "limits"):
            if not entries[name]:
                del entries[name]
        fields = {name: value for name, value in entries.items() if name not in optional or value is not None} | facts
        folded = fields.pop("adapters")
        ordered: dict[str, Any] = json.loads(json.dumps(fields | {"adapters": None}, sort_keys=True))
        ordered["adapters"] = {name: json.loads(json.dumps(entry, sort_keys=True)) for name, entry in folded.items()}
        return json.dumps(ordered, indent=2) + "\n"


def read_manifest(directory: str | Path, error: type[GraloraError] = ExportError) -> Manifest:
    """Read the manifest of an export directory."""
    path = usable_path(directory, error, remedy="give the directory of an export") / MANIFEST_NAME
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as failure:
        raise error(not_an_export(path.parent)) from failure
    except PermissionError as failure:
        raise error(f"{path} cannot be read ({failure.strerror}); check its permissions") from failure
    except (OSError, ValueError, RecursionError) as failure:
        raise error(f"{path} cannot be read ({failure}); export the model again") from failure
    version = content.get("schema_version") if isinstance(content, dict) else None
    if type(version) is not int:
        raise error(f"{path} has no schema_version, so it is not the manifest of an export; export the model again")
    if version > SCHEMA_VERSION:
        raise error(f"{path} has schema {version}, newer than {SCHEMA_VERSION}; update gralora-fx")
    if version < SCHEMA_VERSION:
        remedy = f"export again with {_command(content, path.parent)}"
        raise error(f"{path} has schema {version}, older than {SCHEMA_VERSION}; {remedy}")
    if "batched" in (content.get("adapters_mode"), _object(content, "adapter_inputs").get("mode")):
        raise error(
            f"{path} comes from an export with {option(adapters='batched')}, which {option(adapters='data')} replaces; "
            f"export again with {_command(content, path.parent)}"
        )
    fields = _in_todays_form(content)
    if (name := _undescribed_file(fields)) is not MISSING:
        raise error(f"{path} does not describe its files as an export does ({name!r:.80}); export the model again")
    try:
        manifest = dataclasses.replace(read_object(Manifest, {**fields, "facts": {}}), facts=_facts(fields))
        _check_values(manifest, fields)
    except FieldError as failure:
        raise error(f"{path}: {failure}; export the model again") from failure
    return manifest


def _object(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return an object in a manifest; empty if there is none."""
    value = fields.get(name)
    return value if isinstance(value, dict) else {}


def _in_todays_form(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return an older manifest's fields in today's form, which has other names and more fields."""
    fields = dict(content)
    if fields.get("adapters_mode") == "swappable":
        fields["adapters_mode"] = EARLIER_MODES["swappable"]
    if (inputs := _object(fields, "adapter_inputs")).get("mode") == "swappable":
        fields["adapter_inputs"] = {**inputs, "mode": EARLIER_MODES["swappable"]}
    if quantization := _object(fields, "quantization"):
        zero_points = None if quantization.get("block_size") is None else False  # blocks had none
        fields["quantization"] = {"zero_points": zero_points, **quantization}
    if fields.get("flavour") is None:
        names = _object(fields, "inputs")
        is_cached = any(str(name).startswith("past_key_values.") for name in names)
        fields["flavour"] = ENCODER_DECODER_KIND if DECODER in names else DECODER_KIND if is_cached else PLAIN_KIND
    return fields


def _facts(fields: Mapping[str, Any]) -> dict[str, InputFacts]:
    """Return features' records of the inputs, by their names in the manifest."""
    names = fields.keys() - {own.name for own in dataclasses.fields(Manifest)}
    if not names:
        return {}
    from gralora_fx.base.features import parts

    kinds = {name: kind for known in parts("input facts", names) for name, kind in known.items() if name in names}
    found: dict[str, InputFacts] = {}
    for name, kind in kinds.items():
        entry = fields[name]
        if not isinstance(entry, dict | None):
            raise FieldError(name, entry)
        if entry is not None:
            found[name] = read_object(kind, entry, name)
            if (wrong := found[name].wrong_field()) is not None:
                raise FieldError(f"{name}.{wrong}", entry[wrong])
    return found


def _check_values(manifest: Manifest, fields: Mapping[str, Any]) -> None:
    """Check values that types do not constrain."""
    rows, inputs = manifest.rows, manifest.adapter_inputs
    if rows is not None and (rows.file not in (None, ROWS_NAME) or (rows.file is None) == (rows.reason is None)):
        raise FieldError("rows", fields["rows"])
    if inputs is not None and (inputs.mode not in AS_DATA or inputs.k < 0):
        raise FieldError("adapter_inputs", fields["adapter_inputs"])
    if wrong := [limit for limit in manifest.limits if not limit.is_valid]:
        raise FieldError("limits", dataclasses.asdict(wrong[0]))
    for site in () if inputs is None else inputs.sites:
        if site.form not in (BLOCKS, WHOLE, BIAS):
            raise FieldError("adapter_inputs.sites", dataclasses.asdict(site))


def _undescribed_file(fields: Mapping[str, Any]) -> Any:
    """Return the first name in `files` that is no path within the directory, or has no valid entry; else `MISSING`."""
    files = fields.get("files", {})
    for name, facts in files.items() if isinstance(files, dict) else [(None, None)]:
        path = PurePosixPath(name if isinstance(name, str) else "")
        is_within = bool(path.parts) and not path.is_absolute() and ".." not in path.parts
        if not (is_within and isinstance(facts, dict)) or any(wrong_fields(FileEntry, facts)):
            return name
    return MISSING


def _command(content: Mapping[str, Any], directory: Path) -> str:
    """Return the command that makes an export again, with the options known from a manifest of another schema."""
    model, mode = _object(content, "base").get("name"), content.get("adapters_mode")
    has_adapter = bool(content.get("adapters")) or mode not in (None, "merged")
    options = {
        "--model": model if isinstance(model, str) else "MODEL",
        "--adapter": "ADAPTER" if has_adapter else None,
        "--task": content.get("task"),
        "--adapters": EARLIER_MODES.get(str(mode), mode) if mode != "merged" else None,
        "--precision": content.get("precision"),
        "--quantize": _object(content, "quantization").get("kind"),
        "--output": str(directory),
    }
    told = [word for option, value in options.items() if isinstance(value, str) for word in (option, value)]
    return shlex.join(["gralora-fx", "export", *told, "--overwrite"])


def describe_files(directory: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    """Return size in bytes and SHA-256 of files of an export."""
    return {name: FileEntry((directory / name).stat().st_size, digest_of(directory / name)) for name in names}


def file_names(folder: Path) -> list[str]:
    """Return every file in a directory and its subdirectories, as POSIX paths.

    The manifest is left out, and so are the adapters, which come and go, each with a record of its own.
    """
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in paths if name != MANIFEST_NAME and not name.startswith(f"{ADAPTERS}/"))


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""`gralora_export.json`, the manifest of an export: what the directory holds and what it was made from, typed."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from gralora_fx.errors import ExportError, GraloraError
from gralora_fx.runtime.adapter_inputs import (
    AS_DATA,
    BIAS,
    BLOCKS,
    EARLIER_MODES,
    WHOLE,
    AdapterInputs,
    AdapterSite,
)
from gralora_fx.runtime.json_fields import TEXT_OR_NONE, JsonFields
from gralora_fx.runtime.names import (
    DECODER,
    DECODER_KIND,
    ENCODER_DECODER_KIND,
    MANIFEST_NAME,
    PLAIN_KIND,
    ROWS_NAME,
)
from gralora_fx.runtime.quality import OutputQuality, Quality, TokenQuality
from gralora_fx.sources.directory_kind import described
from gralora_fx.sources.paths import usable_path
from gralora_fx.tracing.inputs.image_sizes import DYNAMIC, ImageSize, ImageSizes

SCHEMA_VERSION = 1
_PRECISIONS = ("fp32", "fp16", "bf16")


@dataclass(frozen=True)
class QuantizedWeights:
    """How an export's matrices are quantized, and how much of it is.

    Attributes:
        kind: `"int4"`, `"int8"` or `"int8-dynamic"`.
        block_size: Values of a matrix's input axis that share a scale; None where those of a whole column do.
        accuracy_level: How ONNX Runtime multiplies with blocks; None where there are none.
        zero_points: Whether blocks have a zero point each; None where there are none.
        multiplications: Nodes that multiply with quantized values.
        lookups: Nodes that look up rows of blocks.
        values: Values of the matrices that are multiplied with.
    """

    kind: str
    block_size: int | None
    accuracy_level: int | None
    zero_points: bool | None
    multiplications: int
    lookups: int
    values: int


@dataclass(frozen=True)
class AdapterEntry:
    """An adapter that was folded into an export.

    Attributes:
        config: Its `adapter_config.json`.
        sha256: Digest of its `adapter_model.safetensors`, or None where that is not known.
        base: What was compared of the base that it was made for (see `BaseComparison`); None where nothing was, as of
            one that was trained on the model itself.
    """

    config: Mapping[str, Any]
    sha256: str | None
    base: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class BaseEntry:
    """The base model that was exported, as it was named.

    Attributes:
        name: Its directory or hub id.
        revision: The commit of its hub repository, where that is known.
    """

    name: str
    revision: str | None = None


@dataclass(frozen=True)
class FileEntry:
    """A file of an export: its size in bytes and its SHA-256."""

    size: int
    sha256: str


@dataclass(frozen=True)
class SiteEntry:
    """A linear layer of the model that was exported (see `LinearSite`)."""

    path: str
    kind: str
    in_features: int
    out_features: int


@dataclass(frozen=True)
class WeightEntry:
    """Where the weight of a linear layer lies in an export, of a layer whose weight a file of it multiplies by.

    Attributes:
        file: The ONNX file, such as `model.onnx`.
        initializer: Name of the initializer that the products read; of a quantized one that of its integers.
        start: First of the layer's output features among the initializer's: it may hold several layers' weights.
        stop: End of them.
        transposed: Whether the initializer is stored `[in, out]`, not `[out, in]` as in PyTorch.
    """

    file: str
    initializer: str
    start: int
    stop: int
    transposed: bool


@dataclass(frozen=True)
class RowsEntry:
    """The graph whose rows differ: those of a decoder in length, or why an export lacks it.

    It takes adapters that are data as stacks with an id a row (see `AdapterInputs.by_row`).

    Attributes:
        file: The ONNX file; None where there is none.
        reason: Why there is none; None where there is one.
    """

    file: str | None
    reason: str | None = None

    def __str__(self) -> str:
        """The file, or the reason."""
        if self.file is None:
            return f"no {ROWS_NAME}: {self.reason}"
        return f"{self.file} is for batches whose rows differ in length or adapter"


@dataclass(frozen=True)
class Manifest:
    """What `gralora_export.json` says; fields with a default are not in every export.

    Attributes:
        schema_version: Version of the file's form.
        task: The task the model was exported for, or None.
        precision: Precision of the weights that are not quantized, and of the cache.
        quantization: How matrices are quantized, or None.
        adapters_mode: How adapters are held: `"merged"`, `"data"` or `"inputs"`.
        logits: Which positions' logits the graph returns: `"last"` or `"all"`.
        position_offset: How many rows of the table of positions no position has.
        adapters: Adapters that were folded, by name, in the order in which they were.
        base_fingerprint: A digest of the base's weights.
        sites: The linear layers of the model.
        inputs: Shapes of the graph's inputs by name; of several graphs, those of each by the name of its file.
        outputs: As `inputs`.
        packages: Versions of the packages that made it.
        attention: Which layers' attention is fused; None for a model without any.
        passes: What every pass did, in order.
        verification: What verification measured, or None.
        quality: How a quantized export differs from the float32 model, where that was measured.
        image_sizes: Heights and widths of images that the graph takes; None if it takes no images.
        adapter_inputs: The adapter tensors that the graph takes; None where adapters are folded.
        requires: The oldest version of each package that runs the graph, where the usual ones do not all.
        files: Every other file of the directory by its path; None where they were not recorded.
        weights: Where the weight of each linear layer lies, by its path; None where that was not recorded. A layer that
            no file multiplies by is not in it.
        base: The base model by name; None of one that was made in memory.
        rows: The graph whose rows differ; None where nothing is known of one.
        flavour: Kind of export: `"plain"`, `"decoder"` or `"encoder-decoder"`.
    """

    schema_version: int
    task: str | None
    precision: str
    quantization: QuantizedWeights | None
    adapters_mode: str
    logits: str
    position_offset: int
    adapters: Mapping[str, AdapterEntry]
    base_fingerprint: str | None
    sites: tuple[SiteEntry, ...]
    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any]
    packages: Mapping[str, str]
    attention: Mapping[str, Any] | None = None
    passes: tuple[Mapping[str, Any], ...] = ()
    verification: Mapping[str, Any] | None = None
    quality: Quality | None = None
    image_sizes: ImageSizes | None = None
    adapter_inputs: AdapterInputs | None = None
    requires: Mapping[str, str] | None = None
    files: Mapping[str, FileEntry] | None = None
    weights: Mapping[str, tuple[WeightEntry, ...]] | None = None
    base: BaseEntry | None = None
    rows: RowsEntry | None = None
    flavour: str = PLAIN_KIND

    @property
    def has_rows(self) -> bool:
        """Whether there is a graph for rows that differ."""
        return self.rows is not None and self.rows.file is not None

    @property
    def image_size(self) -> ImageSize:
        """The image size that the export was made for, as of `trace`; None if it takes no images."""
        if self.image_sizes is None:
            return None
        return self.image_sizes.fixed or DYNAMIC

    def to_json(self) -> str:
        """The text of the file, keys sorted but for adapters, which are in the order in which they were folded.

        What an export may lack is left out where it does.
        """
        found = dataclasses.asdict(self)
        optional = (
            "adapter_inputs",
            "attention",
            "base",
            "files",
            "image_sizes",
            "quality",
            "requires",
            "rows",
            "weights",
        )
        fields = {name: value for name, value in found.items() if name not in optional or value is not None}
        folded = fields.pop("adapters")
        ordered: dict[str, Any] = json.loads(json.dumps(fields | {"adapters": None}, sort_keys=True))
        ordered["adapters"] = {name: json.loads(json.dumps(entry, sort_keys=True)) for name, entry in folded.items()}
        return json.dumps(ordered, indent=2) + "\n"


def read_manifest(directory: str | Path, error: type[GraloraError] = ExportError) -> Manifest:
    """The manifest of an export directory.

    Args:
        directory: The directory.
        error: The error type to raise.

    Raises:
        GraloraError: Of the given type: there is no manifest, it cannot be read, it is of another schema, or a field
            is missing or of another type.
    """
    path = usable_path(directory, error, remedy="give the directory of an export") / MANIFEST_NAME
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as failure:
        raise error(not_an_export(path.parent)) from failure
    except PermissionError as failure:
        raise error(f"{path} cannot be read ({failure.strerror}); check its permissions") from failure
    except (OSError, ValueError, RecursionError) as failure:
        raise error(f"{path} cannot be read ({failure}); export the model again") from failure
    version = found.get("schema_version") if isinstance(found, dict) else None
    if type(version) is not int:
        raise error(f"{path} has no schema_version, so it is not the manifest of an export; export the model again")
    if version > SCHEMA_VERSION:
        raise error(f"{path} has schema {version}, newer than {SCHEMA_VERSION}; update gralora-fx")
    if version < SCHEMA_VERSION:
        remedy = f"make it anew with {_command(found, path.parent)}"
        raise error(f"{path} has schema {version}, older than {SCHEMA_VERSION}; {remedy}")
    return _Reader(found, path, error).manifest()


def _command(found: Mapping[str, Any], directory: Path) -> str:
    """The command that makes an export anew, with the options that a manifest of another schema still tells."""
    quantization, base, mode = found.get("quantization"), found.get("base"), found.get("adapters_mode")
    model = base.get("name") if isinstance(base, dict) else None
    has_adapter = bool(found.get("adapters")) or mode not in (None, "merged")
    options = {
        "--model": model if isinstance(model, str) else "MODEL",
        "--adapter": "ADAPTER" if has_adapter else None,
        "--task": found.get("task"),
        "--adapters": EARLIER_MODES.get(str(mode), mode) if mode != "merged" else None,
        "--precision": found.get("precision"),
        "--quantize": quantization.get("kind") if isinstance(quantization, dict) else None,
        "--output": str(directory),
    }
    told = [word for option, value in options.items() if isinstance(value, str) for word in (option, value)]
    return shlex.join(["gralora-fx", "export", *told, "--overwrite"])


def not_an_export(directory: Path) -> str:
    """Why a directory is not an export, and what to do."""
    found = described(directory)
    if found == "is a file":
        return f"{directory} {found}; give the directory of the export, {directory.parent}"
    if is_export(directory.parent):
        return f"{directory} is a part of an export; give the directory of the export, {directory.parent}"
    if found == "is a model":
        call = f"export_onnx(trace(AutoModel.from_pretrained({str(directory)!r})), output_dir)"
        return f"{directory} {found}, not an export; export it first: {call}"
    if found == "is an adapter":
        return f"{directory} {found}, not an export; give the directory of an export, and this one as adapter=..."
    return f"no {MANIFEST_NAME} in {directory}, which {found}; give the directory of an export"


def is_export(directory: Path) -> bool:
    """Whether a directory holds a manifest, of whatever schema."""
    try:
        found = json.loads((directory / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and "schema_version" in found


class _Reader(JsonFields):
    """Reads the fields of the manifest, each of the type that an export writes."""

    def manifest(self) -> Manifest:
        return Manifest(
            schema_version=self.take("schema_version", int),
            task=self.take("task", *TEXT_OR_NONE),
            precision=self._precision(),
            quantization=self._quantization(),
            adapters_mode=self._mode(self, "adapters_mode"),
            logits=self.take("logits", str, default="all"),
            position_offset=self.take("position_offset", int, default=0),
            adapters=self._adapters(),
            base_fingerprint=self.take("base_fingerprint", *TEXT_OR_NONE, default=None),
            sites=self.records("sites", SiteEntry),
            inputs=self.take("inputs", dict, default={}),
            outputs=self.take("outputs", dict, default={}),
            packages=self.take("packages", dict, default={}),
            attention=self.take("attention", dict, type(None), default=None),
            passes=tuple(self.objects("passes")),
            verification=self.take("verification", dict, type(None), default=None),
            quality=self._quality(),
            image_sizes=self._image_sizes(),
            adapter_inputs=self._adapter_inputs(),
            requires=self.take("requires", dict, type(None), default=None),
            files=self._files(),
            weights=self._weights(),
            base=None if "base" not in self.fields else self.within("base").record(BaseEntry),
            rows=self._rows(),
            flavour=self._flavour(),
        )

    def _mode(self, entry: _Reader, name: str) -> str:
        """How adapters are held, as a field says it, in today's words."""
        found: str = entry.take(name, str, default="merged")
        if found == "batched":
            raise self.error(
                f"{self.path} is of an export with adapters='batched', which is a part of adapters='data' now; make it "
                f"anew with {_command(self.fields, self.path.parent)}"
            )
        return EARLIER_MODES.get(found, found)

    def _flavour(self) -> str:
        """The kind of export; an older one does not say, and is told by its inputs."""
        told: str | None = self.take("flavour", str, type(None), default=None)
        if told is not None:
            return told
        inputs: dict[str, Any] = self.take("inputs", dict, default={})
        if DECODER in inputs:
            return ENCODER_DECODER_KIND
        return DECODER_KIND if any(name.startswith("past_key_values.") for name in inputs) else PLAIN_KIND

    def _precision(self) -> str:
        found: str = self.take("precision", str)
        if found not in _PRECISIONS:
            self.refuse("precision", found)
        return found

    def _quantization(self) -> QuantizedWeights | None:
        """How weights are quantized; blocks of an older export, which does not say, have no zero points."""
        if self.take("quantization", dict, type(None), default=None) is None:
            return None
        entry = self.within("quantization")
        zero_points = None if entry.fields.get("block_size") is None else False
        fields = {"zero_points": zero_points, **entry.fields}
        return dataclasses.replace(entry, fields=fields).record(QuantizedWeights)

    def _adapters(self) -> dict[str, AdapterEntry]:
        names = self.take("adapters", dict, default={})
        entries = {name: self.within("adapters").within(name) for name in names}
        return {
            name: AdapterEntry(
                entry.take("config", dict),
                entry.take("sha256", *TEXT_OR_NONE),
                entry.take("base", dict, type(None), default=None),
            )
            for name, entry in entries.items()
        }

    def _weights(self) -> dict[str, tuple[WeightEntry, ...]] | None:
        if "weights" not in self.fields:
            return None
        weights = self.within("weights")
        return {path: weights.records(path, WeightEntry) for path in weights.fields}

    def _quality(self) -> Quality | None:
        if self.take("quality", dict, type(None), default=None) is None:
            return None
        entry = self.within("quality")
        outputs, tokens = entry.records("outputs", OutputQuality), entry.records("tokens", TokenQuality)
        return Quality(entry.take("inputs", str), outputs, tokens)

    def _image_sizes(self) -> ImageSizes | None:
        if self.take("image_sizes", dict, type(None), default=None) is None:
            return None
        entry = self.within("image_sizes")
        fixed = entry.take("fixed", list, type(None))
        return ImageSizes(
            None if fixed is None else entry._height_and_width("fixed"),
            entry.take("reason", *TEXT_OR_NONE),
            entry._height_and_width("least"),
            entry.take("multiple_of", int),
        )

    def _adapter_inputs(self) -> AdapterInputs | None:
        if self.take("adapter_inputs", dict, type(None), default=None) is None:
            return None
        entry = self.within("adapter_inputs")
        uncalled: list[Any] = entry.take("uncalled", list)
        mode = self._mode(entry, "mode")
        if mode not in AS_DATA or entry.take("k", int) < 0:
            self.refuse("adapter_inputs", dict(entry.fields))
        sites = entry.records("sites", AdapterSite)
        for site in sites:
            if site.form not in (BLOCKS, WHOLE, BIAS):
                entry.refuse("sites", dataclasses.asdict(site))
        return AdapterInputs(
            mode,
            entry.take("k", int),
            entry.take("dtype", str),
            sites,
            tuple(str(path) for path in uncalled),
        )

    def _rows(self) -> RowsEntry | None:
        if "rows" not in self.fields:
            return None
        found = self.within("rows").record(RowsEntry)
        if found.file not in (None, ROWS_NAME) or (found.file is None) == (found.reason is None):
            self.refuse("rows", self.fields["rows"])
        return found

    def _height_and_width(self, name: str) -> tuple[int, int]:
        found: list[Any] = self.take(name, list)
        if len(found) != 2 or any(type(size) is not int or size < 1 for size in found):
            self.refuse(name, found)
        return found[0], found[1]

    def _files(self) -> dict[str, FileEntry] | None:
        """The files, if every name is a path within the directory and every fact of its type."""
        if "files" not in self.fields:
            return None
        found = self.fields["files"]
        entries: list[tuple[Any, Any]] = list(found.items()) if isinstance(found, dict) else [(None, None)]
        for name, facts in entries:
            parts = PurePosixPath(name).parts if isinstance(name, str) else ()
            is_within = bool(parts) and not name.startswith("/") and ".." not in parts
            is_described = isinstance(facts, dict) and {"size", "sha256"} <= facts.keys()
            if not (is_within and is_described and type(facts["size"]) is int and isinstance(facts["sha256"], str)):
                raise self.error(
                    f"{self.path} does not describe its files as an export does ({name!r:.80}); export the model again"
                )
        return {name: FileEntry(facts["size"], facts["sha256"]) for name, facts in entries}

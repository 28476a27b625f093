"""`<name>.onnx_adapter`, an adapter's tensors, and `<name>.json`, the record that describes them.

ONNX Runtime's format has no checksum: a file with a flipped bit may load and run. So a file is parsed only after its
SHA-256 matches its record, which also says for which export it was made.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from gralora_fx.errors import ExportError, GraloraError, ServingError, command, first_line, listed
from gralora_fx.format.adapter_format import AdapterContent, FormatError, read_parameters
from gralora_fx.format.adapter_inputs import AdapterInputs, AdapterSite
from gralora_fx.format.adapter_paths import record_path
from gralora_fx.format.json_records import Count, FieldError, read_object, wrong_fields
from gralora_fx.run.sessions.adapter_arrays import DTYPES, Arrays, as_ort_value

SCHEMA_VERSION = 1
_OWN_DIGEST = "record_sha256"
_MOST_BYTES = 64 << 20  # maximum size of a record


@dataclass(frozen=True)
class AdapterRecord:
    """Contents of an adapter file, and the export that it is for."""

    schema_version: int  # version of the record's schema
    name: str  # the adapter's name
    config: Mapping[str, Any]  # its `adapter_config.json`
    k: Count  # blocks in each direction, as in the export
    r: Count  # the largest rank of its blocks
    hybrid_r: Count  # the largest rank of its plain LoRA part
    dtype: Annotated[str, DTYPES]  # dtype of its tensors
    sites: tuple[str, ...]  # the layers that it adapts
    shapes: Mapping[str, tuple[Count, ...]]  # shape of each tensor by its name
    # fingerprint of the base of the export that it was made for; no other export loads it. It is not about the base
    # that the adapter was trained on. None if the export has none
    base_fingerprint: str | None
    sha256: str  # SHA-256 of the tensors: of names, dtypes, shapes and values
    file_sha256: str  # SHA-256 of the file
    size: Count  # its size in bytes
    # comparison of the base that the adapter was trained on with the export's (see `BaseComparison`); None if they were
    # not compared
    base: Mapping[str, Any] | None = None
    # the weights whose rows' norms its factors of outputs were computed from: "float32", as PEFT's, or how the export
    # rounded them, such as "int4"; None without such factors
    norms_of: str | None = None

    @property
    def base_name(self) -> str:
        """The base that its configuration names, or `another base`."""
        return str(self.config.get("base_model_name_or_path") or "another base")

    def to_json(self) -> str:
        """Return the record as JSON, keys in order, with its own SHA-256 under `record_sha256`."""
        fields = dataclasses.asdict(self)
        optional = ("base", "norms_of")
        fields = {name: value for name, value in fields.items() if name not in optional or value is not None}
        return json.dumps({**fields, _OWN_DIGEST: _fields_sha256(fields)}, indent=2, sort_keys=True) + "\n"


def norms_text(norms_of: str) -> str:
    """Describe which weights an adapter's norms were computed from, and whether they are PEFT's."""
    if norms_of == "float32":
        return "its norms were computed from the float32 weights, as in PEFT"
    return f"its norms were computed from the weights that the export stores ({norms_of}), not from the base's own"


@dataclass(frozen=True, eq=False)
class AdapterInMemory:
    """An adapter as data of an export, without a file."""

    record: AdapterRecord  # its record, without digests
    tensors: Arrays  # its tensors by name


AdapterSource: TypeAlias = str | Path | AdapterContent | AdapterInMemory  # the source of an adapter


def read_record(
    path: Path, error: type[GraloraError] = ExportError, content: AdapterContent | None = None
) -> AdapterRecord:
    """Read the record of an adapter file."""
    place = record_path(path)
    remedy = f"make the adapter again with {command('export_adapter')}"
    try:
        size = place.stat().st_size if content is None else len(content.record)
        if size > _MOST_BYTES:
            raise error(f"{place} has {size:,} bytes, more than a record of an adapter; {remedy}")
        found: Any = json.loads(place.read_bytes() if content is None else content.record)
    except FileNotFoundError as failure:
        raise error(f"no {place.name} beside {path}, which says what it holds; {remedy}") from failure
    except (OSError, ValueError, RecursionError) as failure:
        raise error(f"{place} cannot be read ({first_line(failure)}); {remedy}") from failure
    if not isinstance(found, dict) or type(found.get("schema_version")) is not int:
        raise error(f"{place} is not the record of an adapter; {remedy}")
    if found["schema_version"] > SCHEMA_VERSION:
        raise error(f"{place} has schema {found['schema_version']}, newer than {SCHEMA_VERSION}; update gralora-fx")
    if found["schema_version"] < SCHEMA_VERSION or _OWN_DIGEST not in found:
        raise error(f"{place} was written by an older gralora-fx; {remedy}")
    own = found.pop(_OWN_DIGEST)
    unknown = sorted(set(found) - {field.name for field in dataclasses.fields(AdapterRecord)})
    record = None
    with suppress(FieldError):
        record = read_object(AdapterRecord, found)
    if record is None or unknown:
        raise error(f"{place} is damaged: {listed([*wrong_fields(AdapterRecord, found), *unknown])}; {remedy}")
    if own != _fields_sha256(found):
        raise error(f"{place} was changed: its fields have another SHA-256 than {_OWN_DIGEST} says; {remedy}")
    return record


def check_rank(place: Path | str, record: AdapterRecord, most: int | None) -> None:
    """Check that an adapter's ranks are within a limit."""
    rank = max(record.r, record.hybrid_r)
    if most is not None and rank > most:
        raise ServingError(f"{place} has rank {rank}, above the limit of {most} (max_rank)")


def _fields_sha256(fields: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a record's fields, independent of JSON formatting."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def tensors_sha256(tensors: Arrays) -> str:
    """Return the SHA-256 over the names, dtypes, shapes and values of tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        digest.update(f"{name}|{array.dtype.name}|{list(array.shape)}|".encode())
        digest.update(array.view(np.uint8).data if array.size else b"")
    return digest.hexdigest()


def write_tensors(path: Path, tensors: Arrays) -> None:
    """Write an `.onnx_adapter` file."""
    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters({name: as_ort_value(array) for name, array in tensors.items()})
    adapter.export_adapter(str(path))


def record_of(
    path: Path,
    name: str,
    tensors: Arrays,
    config: Mapping[str, Any],
    inputs: AdapterInputs,
    fingerprint: str | None,
    base: Mapping[str, Any] | None = None,
) -> AdapterRecord:
    """Return the record of an adapter file just written."""
    content = path.read_bytes()
    record = record_in_memory(name, tensors, config, inputs, fingerprint)
    digest = hashlib.sha256(content).hexdigest()
    return dataclasses.replace(record, file_sha256=digest, size=len(content), base=base)


def record_in_memory(
    name: str,
    tensors: Arrays,
    config: Mapping[str, Any],
    inputs: AdapterInputs,
    fingerprint: str | None,
    *,
    with_digest: bool = True,
) -> AdapterRecord:
    """Return the record of an adapter without a file, with empty digests and size 0; for arguments see `record_of`.

    The tensors' digest is computed only if `with_digest`.
    """
    r, hybrid_r = _largest_ranks(tensors, inputs)
    return AdapterRecord(
        schema_version=SCHEMA_VERSION,
        name=name,
        config=config,
        k=inputs.k,
        r=r,
        hybrid_r=hybrid_r,
        dtype=inputs.dtype,
        sites=tuple(sorted({tensor.rpartition(".")[0] for tensor in tensors})),
        shapes={name: tuple(array.shape) for name, array in tensors.items()},
        base_fingerprint=fingerprint,
        sha256=tensors_sha256(tensors) if with_digest else "",
        file_sha256="",
        size=0,
    )


def _largest_ranks(tensors: Arrays, inputs: AdapterInputs) -> tuple[int, int]:
    """Return the largest ranks of the blocks and of the plain LoRA part; replaced layers do not count."""
    ranks = [(site, *_ranks(site, tensors)) for site in inputs.sites]
    general = [hybrid_r for site, _, hybrid_r in ranks if not site.is_within(hybrid_r)]
    return max((r for _, r, _ in ranks), default=0), max(general, default=0)


def _ranks(site: AdapterSite, tensors: Arrays) -> tuple[int, int]:
    """Return a layer's ranks, of blocks and of plain LoRA; 0 for a part that is missing or has other axes."""
    A, _, A_general, *_ = site.parts(tensors)
    r = 0 if A is None or A.ndim != 3 else A.shape[2]
    return r, 0 if A_general is None or A_general.ndim != 2 else A_general.shape[1]


def read_tensors(
    path: Path,
    record: AdapterRecord,
    inputs: AdapterInputs,
    fingerprint: str | None,
    error: type[GraloraError],
    content: AdapterContent | None = None,
) -> dict[str, NDArray[Any]]:
    """Return an adapter file's tensors; raise unless they fit the export."""
    problems = [*_record_problems(record, inputs, fingerprint)]
    if problems:
        raise error(f"{path} does not fit this export: {listed(problems)}")
    file = check_file(path, record, error, content)
    try:
        tensors = read_parameters(file)  # shares the memory of these checked bytes
    except FormatError as failure:
        raise error(f"{path} is not an ONNX Runtime adapter of a known version ({failure})") from failure
    problems = [*_tensor_problems(tensors, record, inputs)]
    if not problems and (record.r, record.hybrid_r) != _largest_ranks(tensors, inputs):
        problems = ["its tensors have other ranks than its record says"]
    if problems:
        raise error(f"{path} does not fit this export: {listed(problems)}")
    return tensors


def check_file(
    path: Path, record: AdapterRecord, error: type[GraloraError], content: AdapterContent | None = None
) -> NDArray[np.uint8]:
    """Return an adapter file's bytes; raise unless they match its record."""
    try:
        file = np.fromfile(path, np.uint8) if content is None else content.file
    except OSError as failure:
        raise error(f"{path} cannot be read ({first_line(failure)}); give the file of an adapter") from failure
    if len(file) != record.size or hashlib.sha256(file.data).hexdigest() != record.file_sha256:
        raise error(
            f"{path} is not what {record_path(path).name} describes: it was changed or cut short; copy both files "
            f"again, or make the adapter again with {command('export_adapter')}"
        )
    return file


def _record_problems(record: AdapterRecord, inputs: AdapterInputs, fingerprint: str | None) -> Iterable[str]:
    if record.base_fingerprint != fingerprint:
        yield (
            f"it is for {record.base_name}, whose weights have fingerprint {str(record.base_fingerprint)[:12]}, not "
            f"for this export's, {str(fingerprint)[:12]}"
        )
    if record.k != inputs.k:
        yield f"it has {_blocks(record.k)}, and the export takes {_blocks(inputs.k)}; add the adapter to this export"
    if record.dtype != inputs.dtype:
        yield f"it is {record.dtype}, and the export takes {inputs.dtype}"
    known = {site.path for site in inputs.sites}
    yield from (f"the export has no adapter at {path}" for path in record.sites if path not in known)


def _blocks(k: int) -> str:
    return f"gralora_k={k}" if k else "LoRA's form"


def _tensor_problems(tensors: Arrays, record: AdapterRecord, inputs: AdapterInputs) -> Iterable[str]:
    sites = {site.path: site for site in inputs.sites}
    expected = {name for path in record.sites for name in sites[path].names(inputs.k)}
    yield from (f"{name} is missing" for name in sorted(expected - set(tensors)))
    yield from (f"{name} is not a tensor of the export" for name in sorted(set(tensors) - expected))
    for path in record.sites:
        yield from _site_problems(sites[path], tensors, inputs)
    if {name: array.shape for name, array in tensors.items()} != record.shapes:
        yield "its tensors have other shapes than its record says"


def _site_problems(site: AdapterSite, tensors: Arrays, inputs: AdapterInputs) -> Iterable[str]:
    names = site.names(inputs.k)
    present = [tensors[name] for name in names if name in tensors]
    if len(present) < len(names):
        return
    r, hybrid_r = _ranks(site, tensors)
    for (name, shape), array in zip(site.shapes(inputs.k, r, hybrid_r).items(), present, strict=True):
        if array.shape != shape:
            yield f"{name} has shape {list(array.shape)} instead of {list(shape)}"
        elif array.dtype != DTYPES[inputs.dtype]:
            yield f"{name} is {array.dtype.name} instead of {inputs.dtype}"
        elif not np.isfinite(array if array.dtype.kind == "f" else array.astype(np.float32)).all():
            yield f"{name} holds values that are not finite"
    if r and r % inputs.k:
        yield f"the rank {r} at {site.path} is not a multiple of k={inputs.k}"

"""`<name>.onnx_adapter`, ONNX Runtime's file of an adapter's tensors, and the record beside it that says what it holds.

ONNX Runtime's format has no checksum: a file with a flipped bit may load and run. So a file is parsed only once its
SHA-256 is the one in its record, `<name>.json`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto

from gralora_fx.errors import ExportError, GraloraError, first_line, listed, shown
from gralora_fx.runtime.adapter_inputs import FIELDS, AdapterInputs, AdapterSite
from gralora_fx.runtime.ort_values import as_tensor

SUFFIX = ".onnx_adapter"
SCHEMA_VERSION = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_OWN_DIGEST = "record_sha256"
_MOST_BYTES = 64 << 20  # of a record
_DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": _BFLOAT16}

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class AdapterRecord:
    """What an adapter file holds, and for which export.

    Attributes:
        schema_version: Version of the record's form.
        name: The adapter's name.
        config: Its `adapter_config.json`.
        k: Blocks in each direction, as the export has them.
        r: The largest rank of its blocks.
        hybrid_r: The largest rank of its plain LoRA part.
        dtype: Dtype of its tensors.
        sites: The layers that it adapts.
        shapes: Shape of each tensor by its name.
        base_fingerprint: Fingerprint of the base that it was made for; None where the export has none.
        sha256: SHA-256 of the tensors: of names, dtypes, shapes and values.
        file_sha256: SHA-256 of the file.
        size: Its size in bytes.
    """

    schema_version: int
    name: str
    config: Mapping[str, Any]
    k: int
    r: int
    hybrid_r: int
    dtype: str
    sites: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    base_fingerprint: str | None
    sha256: str
    file_sha256: str
    size: int

    @property
    def base_name(self) -> str:
        """The base that its configuration names, or `another base`."""
        return str(self.config.get("base_model_name_or_path") or "another base")

    def to_json(self) -> str:
        """The text of the record, keys in order, and a SHA-256 of its own under `record_sha256`."""
        fields = dataclasses.asdict(self)
        return json.dumps({**fields, _OWN_DIGEST: _fields_sha256(fields)}, indent=2, sort_keys=True) + "\n"


def check_name(name: object, error: type[GraloraError] = ExportError) -> str:
    """An adapter's name, which is also that of a file.

    Raises:
        GraloraError: Of the given type: it is something else than letters, digits, dots, dashes and underscores.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise error(
            f"{shown(name)} is not a name for an adapter: take letters, digits, dots, dashes and underscores, at most "
            "128, beginning with a letter or a digit"
        )
    return name


def tensors_sha256(tensors: Arrays) -> str:
    """SHA-256 over the names, dtypes, shapes and values of tensors."""
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
    path: Path, name: str, tensors: Arrays, config: Mapping[str, Any], inputs: AdapterInputs, fingerprint: str | None
) -> AdapterRecord:
    """The record of an adapter file that was written.

    Args:
        path: The file.
        name: The adapter's name.
        tensors: Its tensors.
        config: Its `adapter_config.json`.
        inputs: The adapter tensors of the export that it is for.
        fingerprint: Fingerprint of the export's base.
    """
    r, hybrid_r = _largest_ranks(tensors)
    content = path.read_bytes()
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
        sha256=tensors_sha256(tensors),
        file_sha256=hashlib.sha256(content).hexdigest(),
        size=len(content),
    )


def _fields_sha256(fields: Mapping[str, Any]) -> str:
    """SHA-256 of a record's fields, whatever the layout of their text."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _largest_ranks(tensors: Arrays) -> tuple[int, int]:
    """The largest rank of the blocks and of the plain LoRA part of any layer."""
    blocks, general = (
        [array.shape[axis] for name, array in tensors.items() if name.endswith(f".{field}")]
        for field, axis in ((FIELDS[0], 2), (FIELDS[2], 1))
    )
    return max(blocks, default=0), max(general, default=0)


def record_path(path: Path) -> Path:
    """Where the record of an adapter file is."""
    return path.with_suffix(".json")


def read_record(path: Path, error: type[GraloraError] = ExportError) -> AdapterRecord:
    """The record of an adapter file.

    Args:
        path: The adapter file.
        error: The error type to raise.

    Raises:
        GraloraError: Of the given type: there is none, or it is damaged.
    """
    place = record_path(path)
    remedy = "make the adapter again with gralora-fx export-adapter"
    try:
        if place.stat().st_size > _MOST_BYTES:
            raise error(f"{place} has {place.stat().st_size:,} bytes, more than a record of an adapter; {remedy}")
        found: Any = json.loads(place.read_text(encoding="utf-8"))
    except FileNotFoundError as failure:
        raise error(f"no {place.name} beside {path}, which says what it holds; {remedy}") from failure
    except (OSError, ValueError, RecursionError) as failure:
        raise error(f"{place} cannot be read ({first_line(failure)}); {remedy}") from failure
    if not isinstance(found, dict) or type(found.get("schema_version")) is not int:
        raise error(f"{place} is not the record of an adapter; {remedy}")
    if found["schema_version"] > SCHEMA_VERSION:
        raise error(f"{place} has schema {found['schema_version']}, newer than {SCHEMA_VERSION}; update gralora-fx")
    own = found.pop(_OWN_DIGEST, None)
    problems = [name for name, is_right in _CHECKS.items() if not is_right(found.get(name))]
    if problems or set(found) != {field.name for field in dataclasses.fields(AdapterRecord)}:
        unknown = sorted(set(found) - {field.name for field in dataclasses.fields(AdapterRecord)})
        raise error(f"{place} is damaged: {listed([*problems, *unknown]) or 'fields are missing'}; {remedy}")
    if own != _fields_sha256(found):
        raise error(f"{place} was changed: its fields have another SHA-256 than {_OWN_DIGEST} says; {remedy}")
    shapes = {name: tuple(shape) for name, shape in found["shapes"].items()}
    return AdapterRecord(**{**found, "sites": tuple(found["sites"]), "shapes": shapes})


def read_tensors(
    path: Path, record: AdapterRecord, inputs: AdapterInputs, fingerprint: str | None, error: type[GraloraError]
) -> dict[str, NDArray[Any]]:
    """The tensors of an adapter file, if they are what an export takes.

    Args:
        path: The file.
        record: What it should hold.
        inputs: The adapter tensors of the export.
        fingerprint: Fingerprint of the export's base.
        error: The error type to raise.

    Raises:
        GraloraError: Of the given type: the file was changed, is for another export or base, or its tensors are
            incomplete, misshapen, of another dtype or not finite. All problems are named.
    """
    problems = [*_record_problems(record, inputs, fingerprint)]
    if problems:
        raise error(f"{path} does not fit this export: {listed(problems)}")
    check_file(path, record, error)
    try:
        parameters = onnxruntime.AdapterFormat.read_adapter(str(path)).get_parameters()
        tensors = as_arrays(parameters)
    except Exception as failure:  # ONNX Runtime raises types of its own
        raise error(f"{path} is not an adapter of ONNX Runtime ({first_line(failure)})") from failure
    problems = [*_tensor_problems(tensors, record, inputs)]
    if not problems and (record.r, record.hybrid_r) != _largest_ranks(tensors):
        problems = ["its tensors have other ranks than its record says"]
    if problems:
        raise error(f"{path} does not fit this export: {listed(problems)}")
    return tensors


def check_rank(path: Path, record: AdapterRecord, most: int | None, error: type[GraloraError]) -> None:
    """Check that an adapter's ranks are within a limit.

    Raises:
        GraloraError: Of the given type: one is above it.
    """
    rank = max(record.r, record.hybrid_r)
    if most is not None and rank > most:
        raise error(f"{path} has rank {rank}, above the limit of {most} (max_rank)")


def check_file(path: Path, record: AdapterRecord, error: type[GraloraError]) -> None:
    """Check that an adapter file is the one that its record describes.

    Raises:
        GraloraError: Of the given type: it cannot be read, or its size or SHA-256 differs.
    """
    try:
        content = path.read_bytes()
    except OSError as failure:
        raise error(f"{path} cannot be read ({first_line(failure)}); give the file of an adapter") from failure
    if len(content) != record.size or hashlib.sha256(content).hexdigest() != record.file_sha256:
        raise error(
            f"{path} is not what {record_path(path).name} describes: it was changed or cut short; copy both files "
            "again, or make the adapter again with gralora-fx export-adapter"
        )


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
    if tensors_sha256(tensors) != record.sha256:
        yield "its tensors have another SHA-256 than its record says"
    elif {name: array.shape for name, array in tensors.items()} != record.shapes:
        yield "its tensors have other shapes than its record says"


def _site_problems(site: AdapterSite, tensors: Arrays, inputs: AdapterInputs) -> Iterable[str]:
    names = site.names(inputs.k)
    present = [tensors[name] for name in names if name in tensors]
    if len(present) < len(names):
        return
    a, general = present[0], present[-2]
    r = a.shape[2] if inputs.k and a.ndim == 3 else 0
    hybrid_r = general.shape[1] if general.ndim == 2 else -1
    for (name, shape), array in zip(site.shapes(inputs.k, r, hybrid_r).items(), present, strict=True):
        if array.shape != shape:
            yield f"{name} has shape {list(array.shape)} instead of {list(shape)}"
        elif array.dtype != _DTYPES[inputs.dtype]:
            yield f"{name} is {array.dtype.name} instead of {inputs.dtype}"
        elif not np.isfinite(array.astype(np.float32)).all():
            yield f"{name} holds values that are not finite"
    if inputs.k and r % inputs.k:
        yield f"the rank {r} at {site.path} is not a multiple of k={inputs.k}"


def as_ort_value(array: NDArray[Any]) -> Any:
    """An array as an `OrtValue`, of bfloat16 too."""
    if array.dtype == _BFLOAT16:
        raw = np.ascontiguousarray(array).view(np.uint16)
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, TensorProto.BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def cast(array: NDArray[Any], dtype: str) -> NDArray[Any]:
    """An array in one of the dtypes of adapter tensors."""
    found: NDArray[Any] = array.astype(_DTYPES[dtype])
    return found


def as_arrays(values: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """`OrtValue`s by name as arrays, of bfloat16 too."""
    return {name: _array(value) for name, value in values.items()}


def _array(value: Any) -> NDArray[Any]:
    if value.element_type() == TensorProto.BFLOAT16:  # which numpy lacks
        raw: NDArray[Any] = as_tensor(value).view(torch.uint16).numpy()
        half: NDArray[Any] = raw.view(_BFLOAT16).copy()
        return half
    found: NDArray[Any] = np.array(value.numpy())
    return found


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


_CHECKS = {
    "name": _is_text,
    "config": lambda value: isinstance(value, dict),
    "k": _is_count,
    "r": _is_count,
    "hybrid_r": _is_count,
    "dtype": lambda value: _is_text(value) and value in _DTYPES,
    "sites": lambda value: isinstance(value, list) and all(map(_is_text, value)),
    "shapes": lambda value: (
        isinstance(value, dict)
        and all(isinstance(shape, list) and all(map(_is_count, shape)) for shape in value.values())
    ),
    "base_fingerprint": lambda value: value is None or _is_text(value),
    "sha256": _is_text,
    "file_sha256": _is_text,
    "size": _is_count,
}

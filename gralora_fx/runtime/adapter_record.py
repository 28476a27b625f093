"""The record of an adapter file: what it holds, and for which export, with digests of both."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from gralora_fx.errors import ExportError, GraloraError, first_line, listed
from gralora_fx.runtime.adapter_arrays import DTYPES
from gralora_fx.runtime.adapter_name import record_path
from gralora_fx.runtime.json_records import Count, read_object, wrong_fields

SCHEMA_VERSION = 1
_OWN_DIGEST = "record_sha256"
_MOST_BYTES = 64 << 20  # of a record


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
        base_fingerprint: Fingerprint of the base of the export that it was made for, by which it is loaded in no
            other; it says nothing of the base that the adapter was trained on. None where the export has none.
        sha256: SHA-256 of the tensors: of names, dtypes, shapes and values.
        file_sha256: SHA-256 of the file.
        size: Its size in bytes.
        base: What was compared of the base that the adapter was trained on and of the export's (see
            `BaseComparison`); None where nothing was.
    """

    schema_version: int
    name: str
    config: Mapping[str, Any]
    k: Count
    r: Count
    hybrid_r: Count
    dtype: Annotated[str, DTYPES]
    sites: tuple[str, ...]
    shapes: Mapping[str, tuple[Count, ...]]
    base_fingerprint: str | None
    sha256: str
    file_sha256: str
    size: Count
    base: Mapping[str, Any] | None = None

    @property
    def base_name(self) -> str:
        """The base that its configuration names, or `another base`."""
        return str(self.config.get("base_model_name_or_path") or "another base")

    def to_json(self) -> str:
        """The text of the record, keys in order, and a SHA-256 of its own under `record_sha256`."""
        fields = dataclasses.asdict(self)
        fields = {name: value for name, value in fields.items() if name != "base" or value is not None}
        return json.dumps({**fields, _OWN_DIGEST: _fields_sha256(fields)}, indent=2, sort_keys=True) + "\n"


def read_record(path: Path, error: type[GraloraError] = ExportError) -> AdapterRecord:
    """The record of an adapter file.

    Args:
        path: The adapter file.
        error: The error type to raise.

    Raises:
        GraloraError: Of the given type: there is none, or it is damaged.
    """
    place = record_path(path)
    remedy = "make the adapter again with export_adapter"
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
    if found["schema_version"] < SCHEMA_VERSION or _OWN_DIGEST not in found:
        raise error(f"{place} was written by an older gralora-fx; {remedy}")
    own = found.pop(_OWN_DIGEST)
    unknown = sorted(set(found) - {field.name for field in dataclasses.fields(AdapterRecord)})
    if problems := [*wrong_fields(AdapterRecord, found), *unknown]:
        raise error(f"{place} is damaged: {listed(problems)}; {remedy}")
    if own != _fields_sha256(found):
        raise error(f"{place} was changed: its fields have another SHA-256 than {_OWN_DIGEST} says; {remedy}")
    return read_object(AdapterRecord, found)


def check_rank(place: Path | str, record: AdapterRecord, most: int | None, error: type[GraloraError]) -> None:
    """Check that an adapter's ranks are within a limit.

    Raises:
        GraloraError: Of the given type: one is above it.
    """
    rank = max(record.r, record.hybrid_r)
    if most is not None and rank > most:
        raise error(f"{place} has rank {rank}, above the limit of {most} (max_rank)")


def _fields_sha256(fields: Mapping[str, Any]) -> str:
    """SHA-256 of a record's fields, whatever the layout of their text."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

"""A record that an earlier version wrote is refused with the command that makes its adapter anew."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from gralora_fx.errors import ExportError
from gralora_fx.format.adapter_paths import record_path
from gralora_fx.run.sessions.adapter_file import SCHEMA_VERSION, AdapterRecord, read_record

RECORD = AdapterRecord(
    schema_version=SCHEMA_VERSION,
    name="one",
    config={"peft_type": "GRALORA"},
    k=2,
    r=4,
    hybrid_r=0,
    dtype="float32",
    sites=("0",),
    shapes={"0.gralora_A": (2, 4, 4)},
    base_fingerprint=None,
    sha256="00",
    file_sha256="00",
    size=10,
)


@pytest.mark.quick
def test_a_record_of_this_version_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "one.onnx_adapter"
    record_path(file).write_text(RECORD.to_json())
    assert read_record(file) == RECORD


@pytest.mark.parametrize(
    "changes",
    [{"record_sha256": None}, {"schema_version": SCHEMA_VERSION - 1}, {"schema_version": 0, "record_sha256": None}],
)
def test_a_record_of_an_earlier_version_names_the_command(tmp_path: Path, changes: Mapping[str, object]) -> None:
    file = tmp_path / "one.onnx_adapter"
    fields = {**json.loads(RECORD.to_json()), **changes}
    if fields["record_sha256"] is None:
        del fields["record_sha256"]
    record_path(file).write_text(json.dumps(fields))
    with pytest.raises(ExportError, match=r"written by an older gralora-fx.*again with export_adapter"):
        read_record(file)

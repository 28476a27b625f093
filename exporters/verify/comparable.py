"""The export that ONNX Runtime runs to be compared: as it is, or a float32 copy of it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from gralora_fx.exporters.verify.tolerances import arithmetic_of
from gralora_fx.format.export_directory import ROWS_NAME
from gralora_fx.format.manifest import Manifest
from gralora_fx.run.sessions.session import CPU, Runtime, open_session, yielding_options

_RUN_ROWS = {CPU, "CUDAExecutionProvider"}  # providers whose attention takes the lengths of rows


class Comparable(NamedTuple):
    """An export, or its float32 copy, opened to be compared.

    Attributes:
        session: A session over it.
        rows: A session over its graph whose rows have lengths of their own; None where there is none, or the providers
            are not known to run it.
        arithmetic: Precision that it is run in.
    """

    session: Any
    rows: Any
    arithmetic: str


def open_comparable(directory: Path, manifest: Manifest, runtime: Runtime | None = None) -> Comparable:
    """Sessions over an export, or over its float32 copy where that is needed."""
    precision, is_on_cpu = manifest.precision, runtime is None or runtime.providers[0][0] == CPU
    if manifest.quantization is None and (precision != "bf16" or not is_on_cpu):
        return _opened(directory, manifest, runtime, precision)
    from gralora_fx.exporters.verify.float32_copy import write_float32_copy

    with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.absolute().parent) as copy:
        write_float32_copy(directory, Path(copy))
        return _opened(Path(copy), manifest, runtime, "fp16" if precision == "fp16" else "fp32")


def _opened(directory: Path, manifest: Manifest, runtime: Runtime | None, precision: str) -> Comparable:
    is_known = runtime is None or (not runtime.devices and {name for name, _ in runtime.providers} <= _RUN_ROWS)
    opened = runtime or Runtime(session_options=yielding_options())
    rows = open_session(directory, opened, name=ROWS_NAME) if is_known and manifest.has_rows else None
    session = open_session(directory, opened, as_stored=True)  # what others open; rows as they are served
    if runtime is not None:
        precision = arithmetic_of(runtime, precision, is_quantized=manifest.quantization is not None)
    return Comparable(session, rows, precision)

"""What the reading half of a kind of export consists of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gralora_fx.engine.adapters import Adapters
from gralora_fx.runtime.manifest import Manifest
from gralora_fx.serving.generation import Generation


@dataclass(frozen=True)
class OpenExport:
    """An export that is open.

    Attributes:
        directory: The export directory.
        manifest: Its manifest.
        config: Fields of the model's `config.json`.
        adapters: Its adapters.
        session: The session of the file that was opened first.
        has_rows: Whether that is `model_rows.onnx`.
    """

    directory: Path
    manifest: Manifest
    config: Mapping[str, Any]
    adapters: Adapters
    session: Any
    has_rows: bool


@dataclass(frozen=True)
class Reading:
    """How a kind of export is read.

    Attributes:
        name: The kind, as the manifest has it.
        opens_rows: Whether `model_rows.onnx`, where there is one, is opened first, and not `model.onnx`: given whether
            the CPU runs all of it, and whether every call names an adapter for each row.
        calls_rows: Whether calls run `model_rows.onnx` where they name an adapter for each row.
        generation: How an open export generates; it raises a `ServingError` where it does not.
    """

    name: str
    opens_rows: Callable[[bool, bool], bool]
    calls_rows: bool
    generation: Callable[[OpenExport], Generation]

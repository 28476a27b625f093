"""Names of adapters as data, which are also those of files; light, so that options can be checked at once."""

from __future__ import annotations

import re
from pathlib import Path

from gralora_fx.errors import ExportError, GraloraError, shown

SUFFIX = ".onnx_adapter"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


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


def record_path(path: Path) -> Path:
    """Where the record of an adapter file is."""
    return path.with_suffix(".json")

"""Sessions over the export of a streamed model, which read large weights from their files."""

from __future__ import annotations

from pathlib import Path

from gralora_fx.exporters.artifact.staging import file_sizes
from gralora_fx.run.sessions.session import Runtime, mapped_options


def mapped_runtime(directory: Path, copied: int) -> Runtime | None:
    """Return how such sessions run; None for an export whose bytes they may copy, for faster products."""
    is_large = sum(file_sizes(directory).values()) > copied
    return Runtime(session_options=mapped_options()) if is_large else None

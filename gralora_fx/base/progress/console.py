"""Progress on a console, unless it is shown already or silenced."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gralora_fx.base.progress.stages import displayed

if TYPE_CHECKING:
    from rich.console import Console

SILENCED = "GRALORA_FX_PROGRESS"  # environment variable; 0 shows nothing


@contextmanager
def StageProgress(console: Console | None = None, *, silence: float | None = None) -> Iterator[None]:
    """Show stages, live on a terminal and as lines elsewhere, unless they are shown already or silenced."""
    if displayed.get() is not None or os.environ.get(SILENCED, "").strip().lower() in ("0", "off", "no", "false"):
        yield
        return
    from gralora_fx.base.progress.live_stages import live_stages

    with live_stages(console, silence):
        yield


with_progress = StageProgress()  # decorates a public function, so that it shows its stages


@contextmanager
def CommandProgress(console: Console | None = None, *, silence: float | None = None) -> Iterator[None]:
    """Show the stages of a command, and the package's log records."""
    records, logger = _Records(logging.INFO), logging.getLogger("gralora_fx")
    with StageProgress(console, silence=silence):
        logger.addHandler(records)
        logger.setLevel(logging.INFO)
        try:
            yield
        finally:
            logger.removeHandler(records)


class _Records(logging.Handler):
    """Prints log records to the current stderr, which a live display replaces."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stderr)

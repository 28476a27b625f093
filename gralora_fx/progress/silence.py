"""Silence for the progress notes of exporters; their errors still raise."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back what the libraries underneath print, log and warn about while the block runs."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # some of their loggers are named by file, outside every hierarchy
    try:
        sink = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)

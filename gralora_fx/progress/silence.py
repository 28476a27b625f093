"""Suppression of the exporters' output; their errors are still raised."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the prints, logs and warnings of the libraries underneath within the block."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # some of their loggers are named after files, outside any hierarchy
    try:
        sink = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)

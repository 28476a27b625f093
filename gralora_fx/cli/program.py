"""The process around a command: signals, warnings, and errors as lines."""

from __future__ import annotations

import gc
import os
import signal
import sys
import warnings
from typing import Any, NoReturn

from gralora_fx.cli.commands import app, notes
from gralora_fx.errors import GraloraError

_shown: set[str] = set()  # warnings
_ENDS = {130: "interrupted", 143: "terminated"}  # the shell's statuses for SIGINT and SIGTERM
_CLOSED = 141  # its status for SIGPIPE


def main() -> None:
    """Run the command line; errors of gralora-fx end it with a line, and one for each problem, and status 1."""
    signal.signal(signal.SIGTERM, _terminate)
    warnings.showwarning = _show_warning
    warnings.simplefilter("ignore", FutureWarning)  # for who calls the libraries underneath
    try:
        app()
    except GraloraError as error:
        notes.print(f"error: {error}", markup=False)
        sys.exit(1)
    except SystemExit as end:
        if end.code in _ENDS:
            notes.print(f"{_ENDS[end.code]}; nothing was left half written")
        _flush(end)
        raise
    finally:
        gc.freeze()  # what is left goes with the process; to look through it once more takes a second


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Show a warning as a line of its own, without the line of code that it was raised for."""
    text = str(message)
    if text not in _shown:  # an adapter's configuration is read by several stages
        _shown.add(text)
        notes.print(f"warning: {text}", markup=False)


def _flush(end: SystemExit) -> None:
    """Write what was printed; a reader that has gone, as `head` does, is told by the status alone."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the interpreter flushes once more
        end.code = end.code or _CLOSED


def _terminate(number: int, _: object) -> NoReturn:
    """End as by an error, so that what was begun is cleaned up; the status is the shell's for a signal."""
    sys.exit(128 + number)

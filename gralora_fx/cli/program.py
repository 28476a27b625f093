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

_shown: set[str] = set()  # warnings shown already
_ENDS = {130: "interrupted", 143: "terminated"}  # the shell's statuses for SIGINT and SIGTERM
_CLOSED = 141  # its status for SIGPIPE


def main() -> None:
    """Run the command line; an error of gralora-fx is printed, one line for each problem, with exit status 1."""
    signal.signal(signal.SIGTERM, _terminate)
    warnings.showwarning = _show_warning
    warnings.simplefilter("ignore", FutureWarning)  # meant for callers of the libraries underneath
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
        gc.freeze()  # the process ends anyway; a last collection would take a second


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Show a warning as one line, without the source line that raised it."""
    text = str(message)
    if text not in _shown:  # an adapter's configuration is read by several stages
        _shown.add(text)
        notes.print(f"warning: {text}", markup=False)


def _flush(end: SystemExit) -> None:
    """Flush stdout; if its reader has gone, as with `head`, only the exit status tells."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # since the interpreter flushes once more
        end.code = end.code or _CLOSED


def _terminate(number: int, _: object) -> NoReturn:
    """Exit as on an error, so that everything is cleaned up, with the shell's status for the signal."""
    sys.exit(128 + number)

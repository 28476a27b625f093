"""The process around a command: signals, warnings, and errors as lines."""

from __future__ import annotations

import gc
import os
import re
import signal
import sys
import warnings
from typing import Any, NoReturn

import typer
from typer.main import get_command

from gralora_fx.base.compat.packages import is_installed
from gralora_fx.cli.commands import app
from gralora_fx.cli.wording import name_of, notes
from gralora_fx.errors import GraloraError, in_command

_shown: set[str] = set()  # warnings shown already
_ENDS = {130: "interrupted", 143: "terminated"}  # the shell's statuses for SIGINT and SIGTERM
_CLOSED = 141  # the shell's status for SIGPIPE
_EXTRA = re.compile(r"Got unexpected extra arguments?(?:\(s\))? \((.*)\)")  # in the parser's words
_PARSER = re.compile("Input should be")  # in pydantic's words
_MISUSED = 2  # the shell's status for wrong arguments
_UsageError: Any = typer.BadParameter.__base__  # what typer raises for them, under a name of its own in some versions


def main() -> None:
    """Run the command line.

    An error of gralora-fx is printed in the command line's words, one line for each problem, with exit status 1; wrong
    arguments are one line, with exit status 2.
    """
    program: Any = get_command(app)
    running = next((argument for argument in sys.argv[1:] if argument in program.commands), None)
    signal.signal(signal.SIGTERM, _terminate)

    def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
        """Show a warning as one line, without the source line that raised it."""
        text = in_command(message)
        if text not in _shown:  # an adapter's configuration is read by several stages
            _shown.add(text)
            notes.print(f"warning: {text}", markup=False)

    warnings.showwarning = show_warning
    warnings.simplefilter("ignore", FutureWarning)  # meant for callers of the libraries underneath
    try:
        sys.exit(program(prog_name="gralora-fx", standalone_mode=False))
    except GraloraError as error:
        notes.print(f"error: {in_command(error)}", markup=False)
        sys.exit(1)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if not missing or is_installed(missing):
            raise  # an error of a package's own
        remedy = "pip install gralora-fx (in a clone: pip install -e .) installs all that it needs"
        notes.print(f"error: gralora-fx {running} needs {missing}, which is not installed; {remedy}", markup=False)
        sys.exit(1)
    except _UsageError as error:
        command = program if running is None else program.commands[running]
        notes.print(f"error: {_misuse(error, command)}; {_help(running)}", markup=False)
        sys.exit(_MISUSED)
    except SystemExit as end:
        if end.code in _ENDS:
            notes.print(f"{_ENDS[end.code]}; nothing was left half written")
        _flush(end)
        raise
    finally:
        # The process ends anyway, and a last collection would take a second; but triton, which torch for CUDA brings,
        # prints what it finds uncollected.
        (gc.unfreeze if "triton" in sys.modules else gc.freeze)()


def _misuse(error: Any, command: Any) -> str:
    """Describe wrong arguments on one line, with the command's example if one is missing."""
    param = getattr(error, "param", None)
    text = " ".join(str(error.message).split()).rstrip(".").removeprefix("Value error, ")
    if type(error).__name__ == "MissingParameter" and param is not None:
        text = f"missing {name_of(param)}"
    elif param is not None:
        text = f"{param.opts[0]}: {_PARSER.sub('it must be', text)}"
    elif extra := _EXTRA.fullmatch(text):
        text = f"unexpected argument {extra[1]}"
    elif similar := getattr(error, "possibilities", None):
        text += f", did you mean {' or '.join(sorted(similar))}?"
    return f"{text}; for example: {command.epilog}" if text.startswith("missing ") else text


def _help(running: str | None) -> str:
    """Return where the valid arguments are listed."""
    if running is None:
        return "gralora-fx --help lists the commands"
    return f"gralora-fx {running} --help lists the options"


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

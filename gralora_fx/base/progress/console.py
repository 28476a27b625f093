"""Progress on a console: stages live on a terminal, and as a line now and then elsewhere."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import ParamSpec, TypeVar

from rich.console import Console

from gralora_fx.base.progress import stages
from gralora_fx.base.progress.heartbeat import Heartbeat
from gralora_fx.base.progress.stages import is_displayed

SILENCED = "GRALORA_FX_PROGRESS"  # the environment variable that is 0 where nothing is to be shown

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def is_silenced() -> bool:
    """Return whether the environment asks for no progress."""
    return os.environ.get(SILENCED, "").strip().lower() in ("0", "off", "no", "false")


class StageProgress:
    """Shows stages: live on a terminal, and elsewhere as a line now and then.

    A context manager. It shows nothing where the stages are shown already, or where the environment silences it.
    """

    def __init__(self, console: Console | None = None, *, silence: float | None = None) -> None:
        """Choose where and how often stages are shown."""
        self._console, self._silence = console, silence

    def __enter__(self) -> None:
        """Show the stages of this thread."""
        self._display: AbstractContextManager[object] = nullcontext()
        if not is_displayed() and not is_silenced():
            # the current stderr, so that the display goes on while the libraries' output is suppressed; in a notebook
            # it is a stream like any other
            console = self._console or Console(file=sys.stderr, highlight=False, soft_wrap=True, force_jupyter=False)
            if console.is_terminal:
                from gralora_fx.base.progress.live_stages import LiveStages

                self._display = LiveStages(console)
            else:
                self._display = Heartbeat(console, first=self._silence, silence=self._silence)
        self._display.__enter__()

    def __exit__(self, kind: object = None, *_: object) -> None:
        """Stop, and show the total of several stages on a terminal unless an error ended the work."""
        self._display.__exit__(kind, None, None)  # type: ignore[arg-type]


class CommandProgress(StageProgress):
    """Shows the stages of a command, and what else the package logs, as it comes."""

    def __enter__(self) -> None:
        """Show the stages of this thread, and the package's log."""
        super().__enter__()
        self._records = _Records()
        logger = logging.getLogger("gralora_fx")
        logger.addHandler(self._records)
        logger.setLevel(logging.INFO)

    def __exit__(self, kind: object = None, *rest: object) -> None:
        """Stop, as `StageProgress` does."""
        logging.getLogger("gralora_fx").removeHandler(self._records)
        super().__exit__(kind, *rest)


class _Records(logging.Handler):
    """Prints the package's log records to stderr, but for those of stages, which are shown otherwise."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.addFilter(lambda record: record.name != stages.__name__)

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stderr)


def with_progress(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Let a public function show the stages of its work, unless its caller shows them."""

    @functools.wraps(function)
    def shown(*args: _Parameters.args, **options: _Parameters.kwargs) -> _Result:
        with StageProgress():
            return function(*args, **options)

    return shown

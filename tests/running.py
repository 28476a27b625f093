"""A run of the command line in this process."""

from __future__ import annotations

import gc
import io
import signal
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from unittest.mock import patch

import pytest

from gralora_fx.cli import main


@dataclass(frozen=True)
class Run:
    """The results of a run."""

    status: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """The only line of stderr, which is an error without a traceback."""
        lines = self.stderr.splitlines()
        assert len(lines) == 1, self.stderr
        assert lines[0].startswith("error: "), self.stderr
        assert self.stdout == ""
        return lines[0].removeprefix("error: ")


def run(*arguments: object, stdin: bytes = b"") -> Run:
    out, err = io.StringIO(), io.StringIO()
    handler = signal.getsignal(signal.SIGTERM)
    argv = patch.object(sys, "argv", ["gralora-fx", *map(str, arguments)])
    given = patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    quiet = (redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings())
    with argv, given, quiet[0], quiet[1], quiet[2], pytest.raises(SystemExit) as end:
        main()
    signal.signal(signal.SIGTERM, handler)
    gc.unfreeze()
    return Run(int(end.value.code or 0), out.getvalue(), err.getvalue())

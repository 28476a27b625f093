"""A program run in a terminal of its own, as wide as a test asks for."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Sequence


def in_terminal(command: Sequence[str], columns: int, **environment: str) -> str:
    """Run a program in a terminal; return its output, control sequences included; it must succeed.

    Args:
        command: The program and its arguments.
        columns: Width of the terminal.
        environment: Variables that are set.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    kept |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TERM": "xterm"} | environment
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=kept)
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the last writer has closed it
            break
        if not part:
            break
        shown += part
    os.close(ours)
    assert process.wait() == 0, shown.decode()
    return shown.decode()


def plain_lines(shown: str) -> list[str]:
    """Return the lines that a terminal was sent, without control sequences; what is drawn again is there again."""
    return [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line).rstrip() for line in re.split(r"[\r\n]+", shown)]

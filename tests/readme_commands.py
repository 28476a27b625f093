"""The commands of the README's shell blocks, ready to be run."""

from __future__ import annotations

import gc
import itertools
import re
import shlex
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

from gralora_fx.cli import main

README = Path(__file__).parent.parent / "README.md"
_SHELL = ("", "sh", "bash", "shell", "console")
_ASSIGNMENT = re.compile(r"(?:export +)?([A-Za-z_]\w*)=(.*)")
_VARIABLE = re.compile(r"\$\{?([A-Za-z_]\w*)\}?")
DEFAULTS = {"BASE": "base", "MODEL": "base", "ADAPTER": "adapter", "OUTPUT": "onnx", "EXPORT": "onnx", "ONNX": "onnx"}


def commands(text: str) -> list[list[str]]:
    """Return the arguments of every line of a page's shell blocks that runs `gralora-fx`, variables replaced.

    Args:
        text: The page. A variable has the value that a line of its blocks gives it, else that of `DEFAULTS`.
    """
    variables = dict(DEFAULTS)
    found = []
    for line in _lines(text):
        words = shlex.split(line.removeprefix("$ "), comments=True)
        if words and (assignment := _ASSIGNMENT.fullmatch(" ".join(words))):
            variables[assignment[1]] = assignment[2]
        elif words and words[0] == "gralora-fx":
            replaced = [_VARIABLE.sub(lambda match: variables[match[1]], word) for word in words[1:]]
            found.append([word for word in replaced if word != "&"])
    return found


def answers(text: str) -> list[str]:
    """Return the answers in the comments behind a page's `gralora-fx generate`."""
    lines = [line for line in _lines(text) if line.startswith("gralora-fx generate ")]
    return [line.partition("  # ")[2] for line in lines]


def run(command: list[str]) -> str:
    """Run a command in this process; what it printed on stderr has passed by `capfd`."""
    handler = signal.getsignal(signal.SIGTERM)
    argv = patch.object(sys, "argv", ["gralora-fx", *command])
    with argv, warnings.catch_warnings(), pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code, command
    signal.signal(signal.SIGTERM, handler)
    gc.unfreeze()
    return command[0]


def _lines(text: str) -> Iterator[str]:
    """Yield the lines of the shell blocks; one that ends in a backslash goes on."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if language in _SHELL:
            yield from block.replace("\\\n", " ").splitlines()


def inputs(command: list[str]) -> Iterator[tuple[str, str]]:
    """Yield the local directories that a command reads, each with what it is: `"base"` or `"adapter"`."""
    kinds = {"--model": "base", "--base": "base", "--adapter": "adapter"}
    for option, value in itertools.pairwise(command):
        if option in kinds and not value.endswith(".onnx_adapter"):
            yield value.rpartition("=")[2], kinds[option]

"""The commands of the README's shell blocks, ready to be run."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
_SHELL = ("", "sh", "bash", "shell", "console")
_ASSIGNMENT = re.compile(r"(?:export +)?([A-Za-z_]\w*)=(.*)")
_VARIABLE = re.compile(r"\$\{?([A-Za-z_]\w*)\}?")
DEFAULTS = {"BASE": "base", "MODEL": "base", "ADAPTER": "adapter", "OUTPUT": "onnx", "EXPORT": "onnx", "ONNX": "onnx"}


def commands(text: str) -> list[list[str]]:
    """The arguments of every line of a page's shell blocks that runs `gralora-fx`, variables replaced.

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


def _lines(text: str) -> Iterator[str]:
    """The lines of the shell blocks; one that ends in a backslash goes on."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if language in _SHELL:
            yield from block.replace("\\\n", " ").splitlines()


def inputs(command: list[str]) -> Iterator[tuple[str, str]]:
    """The local directories that a command reads, each with what it is: `"base"` or `"adapter"`."""
    kinds = {"--model": "base", "--base": "base", "--adapter": "adapter"}
    for option, value in itertools.pairwise(command):
        if option in kinds and not value.endswith(".onnx_adapter"):
            yield value.rpartition("=")[2], kinds[option]

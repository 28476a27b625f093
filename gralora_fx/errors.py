"""Errors and warnings of gralora-fx: each message says what is wrong, where, and what to do.

A remedy is an option, a function or another phrase: `f"give {option(overwrite=True)} to replace it"`. A `Message` words
it for Python, `overwrite=True`, and for the command line, `--overwrite`.
"""

import re
import shlex
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Self

_REMEDY = re.compile("\0([^\0]*)\0([^\0]*)\0")  # within a text: in the words of Python, and of the command line
_copies: ContextVar[str] = ContextVar("copies", default="")  # folder that messages leave out
_COMMAND_OPTIONS = {  # options whose name or value differs on the command line
    "base": "--model",
    "do_sample=False": "--temperature 0",
    "do_sample=True": "--temperature",
    "tokenizer=...": "--model with a tokenizer, and no --no-tokenizer",
    "verify=False": "--no-verify",
    "verify=True": "--verify quick",
}


def remedy(python: str, command: str) -> str:
    """Mark a remedy within a message, as worded in Python and on the command line."""
    return f"\0{python}\0{command}\0"


def option(name: str = "", /, **given: object) -> str:
    """Mark an option within a message: by name alone, or as a keyword with its value, `...` for any."""
    [(keyword, value)] = given.items() if given else [(name, ...)]
    flag = _COMMAND_OPTIONS.get(keyword, f"--{keyword.replace('_', '-')}")
    if name:
        return remedy(name, flag)
    python = f"{keyword}={'...' if value is ... else shown(value)}"
    if value is None or value is False:
        flag = f"no {flag}"
    elif value is not ... and value is not True:
        flag += f" {shlex.quote(str(value))}"
    return remedy(python, _COMMAND_OPTIONS.get(python, flag))


def command(function: str) -> str:
    """Mark an exporting function within a message; on the command line, the command that does the same."""
    return remedy(function, f"gralora-fx {re.sub('_(onnx|checkpoint)$', '', function).replace('_', '-')}")


class Message(str):
    """A text as worded in Python; `marked` is the text with its remedies marked."""

    marked: str

    def __new__(cls, told: object) -> Self:
        """Word the remedies of a text, or of another message or error."""
        text = marked(told)
        self = super().__new__(cls, _REMEDY.sub(r"\1", text))
        self.marked = text
        return self


def marked(told: object) -> str:
    """Return the text of an error, a warning or a message with remedies marked, for use within another message."""
    text = told.args[0] if isinstance(told, Exception) and told.args else told
    return text.marked if isinstance(text, Message) else str(told)


def in_command(told: object) -> str:
    """Return the text of an error, a warning or a message as worded on the command line."""
    return _REMEDY.sub(r"\2", marked(told))


def joined(parts: Iterable[str], separator: str = "\n") -> Message:
    """Join texts and messages to one message."""
    return Message(separator.join(map(marked, parts)))


class GraloraError(Exception):
    """Base of every error that gralora-fx raises on purpose.

    Attributes:
        field: The option, or the field of a request, that it is about; None if it is not about one.
    """

    field: str | None = None

    def __init__(self, message: str = "") -> None:
        super().__init__(Message(message))

    def about(self, field: str) -> Self:
        """Return the error with the option, or the field of a request, that it is about.

        Args:
            field: The name of an option, or of a field of a request.
        """
        self.field = field
        return self

    def reworded(self, message: str) -> Self:
        """Return the error with another text; its class and all else stay.

        Args:
            message: The text, with its remedies marked (see `marked`).
        """
        other = type(self).__new__(type(self))
        GraloraError.__init__(other, message)  # a class may take other arguments
        other.__dict__.update(self.__dict__)
        return other


@contextmanager
def concerning(field: str) -> Iterator[None]:
    """Set the field of errors of this package raised within the block, unless they name one."""
    try:
        yield
    except GraloraError as error:
        error.field = error.field or field
        raise


class ConfigError(GraloraError, ValueError):
    """A configuration field, or the file that holds it, is invalid."""


class TraceError(GraloraError, ValueError):
    """A model cannot be traced, or a trace was called with inputs it does not take."""


class TargetError(GraloraError, ValueError):
    """A configuration does not fit the linear call sites of a model."""


class RewriteError(GraloraError, ValueError):
    """A graph cannot be rewritten as asked; the graph is as it was."""


class MergeError(GraloraError):
    """Adapters cannot be folded into the weights; the weights are as they were."""


class CheckpointError(GraloraError):
    """Adapter files are missing, damaged, or do not fit the model."""


class ExportError(GraloraError):
    """A model cannot be exported, or an export directory cannot be read or written."""


class ServingError(GraloraError):
    """An exported model cannot be loaded or run as asked."""


class VersionError(GraloraError, ImportError):
    """An installed package's version lacks the private API that is used."""


_VOWEL = re.compile("[AEIOaeio]|[Uu][np](?!i|[A-Z])|[FHLMNRSX][A-Z0-9]")  # beginnings that sound as one
_SHOWN = 100  # characters of a value in a message


def shown(value: object) -> str:
    """Return a value's `repr` for a message, truncated if it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, lists in lists
        return f"a value of type {type(value).__name__}, too large to show"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def an(noun: str) -> str:
    """Return a noun with its indefinite article, for a message: `an int`, `a UNet`, `an LSTM`."""
    return f"{'an' if _VOWEL.match(noun) else 'a'} {noun}"


def listed(names: Iterable[object], most: int = 20) -> str:
    """Join names for a message with commas; of many, the first, and how many more there are."""
    texts = [str(name) for name in names]
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def bulleted(problems: Iterable[object], most: int = 20) -> str:
    """List problems for a message, a line each; of many, the first, and how many more there are."""
    lines = [f"- {problem}" for problem in problems]
    return "\n".join([*lines[:most], f"- and {len(lines) - most} more"] if len(lines) > most else lines)


def warn_caller(message: str, *, also: tuple[str, ...] = ()) -> None:
    """Warn at the nearest line of the call stack outside this package and those of `also`."""
    level, frame = 1, sys._getframe()
    within = (__package__, "contextlib", "importlib", *also)  # a public name is imported on first use
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in within:
        frame = frame.f_back
        level += "importlib._bootstrap" not in frame.f_code.co_filename  # `warn` skips import frames
    warnings.warn(Message(message.replace(_copies.get(), "")), stacklevel=level)


@contextmanager
def without_folder(folder: str) -> Iterator[None]:
    """Leave a folder of copies out of messages while the block runs: its path means nothing to the caller."""
    token = _copies.set(f"{folder}/")
    try:
        yield
    except GraloraError as error:
        raise error.reworded(marked(error).replace(f"{folder}/", "")) from error
    finally:
        _copies.reset(token)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, with the next if the first ends in a colon; its type if it is empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]) if lines else type(error).__name__

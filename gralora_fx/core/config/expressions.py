"""Regular expressions from a configuration: Python's syntax and meaning, and a match that cannot hang the process."""

from __future__ import annotations

import functools
import re
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import regex

from gralora_fx.core.config.checks import check_names
from gralora_fx.errors import ConfigError, shown

# templates into which PEFT's rules insert a name of the configuration, unescaped
WHOLE = "{}"  # target_modules, exclude_modules
END_OF_PATH = r"(?:.*\.)?(?:{})"  # a key of rank_pattern and its kin
SAVED_MODULE = r"(^|.*\.){}($|\..*)"  # modules_to_save
ANY_CONTAINER = r".*?\.[^.]*\.(?P<index>\d+)\."
CONTAINER = r"(?:^|.*?\.){}\.(?P<index>\d+)\."  # layers_pattern

_LONGEST = 1_000_000  # characters; the names of ten thousand layers, written out
_LIMIT = 1.0  # seconds of processor time that one expression may take in all; an ordinary match takes microseconds
_SLOW = 0.01  # seconds; faster matches are not counted
_SHORTEST = 0.001  # seconds; the timeout of an expression that has used up its limit

# What `regex` reads differently from `re`: fuzzy matching, `{e<=1}`, and classes such as `[:alpha:]`. Both are literal
# text in Python. An escaped character comes first, so that a bracket of it is left alone.
_LITERAL = re.compile(r"\\.|\{(?!\d*,\d*\}|\d+\})|(?<=\[):", re.DOTALL)


def within(template: str, name: str) -> str:
    """A rule's expression with a name inserted."""
    return template.replace("{}", name)


def check_expression(field: str, value: str) -> None:
    """Check that a value is a regular expression."""
    try:
        _Matcher.of(value)
    except ValueError as error:
        raise ConfigError(
            f"{field} {shown(value)} is not a valid regular expression ({error}); give a list to match by name"
        ) from error


def check_expressions(field: str, names: Iterable[str], template: str) -> None:
    """Check that names are regular expressions, by themselves and inserted into PEFT's template."""
    for name in names:
        try:
            _Matcher.of(name)
            _Matcher.of(within(template, name))
        except ValueError as error:
            raise ConfigError(
                f"{field} holds {shown(name)}, which is not a valid name ({error}); name modules"
            ) from error


def check_pattern(field: str, value: object, check_value: Callable[[str, Any], None]) -> None:
    """Check a dict from module names (or regular expressions) to values."""
    if not isinstance(value, dict):
        raise ConfigError(f"{field} must be a dict from module names to values, but got {shown(value)}")
    check_names(field, value)
    check_expressions(field, value, END_OF_PATH)
    for key, entry in value.items():
        check_value(f"{field}[{shown(key)}]", entry)


def fullmatch(expression: str, text: str) -> bool:
    """Whether an expression matches a whole text, as `re.fullmatch` does."""
    return _Matcher.of(expression).match(text, whole=True) is not None


def match(expression: str, text: str) -> regex.Match[str] | None:
    """The match of an expression at the beginning of a text, as `re.match` finds it."""
    return _Matcher.of(expression).match(text, whole=False)


class _Matcher:
    """A compiled expression, and the time spent on its slow matches."""

    def __init__(self, expression: str) -> None:
        self.expression, self.spent = expression, 0.0
        self.compiled = _compiled(expression)

    @classmethod
    @functools.lru_cache(maxsize=4096)
    def of(cls, expression: str) -> _Matcher:
        """The cached matcher of an expression, which keeps the time it has spent."""
        return cls(expression)

    def match(self, text: str, *, whole: bool) -> regex.Match[str] | None:
        """The match of a whole text, or at its beginning."""
        find = self.compiled.fullmatch if whole else self.compiled.match
        began = time.thread_time()
        try:
            return find(text, timeout=max(_LIMIT - self.spent, _SHORTEST))
        except TimeoutError as error:
            raise ConfigError(
                f"the regular expression {shown(self.expression)} takes too long to match ({shown(text)}); write it "
                "without repetitions inside or beside repetitions, or give a list of names"
            ) from error
        finally:
            took = time.thread_time() - began
            self.spent += took if took > _SLOW else 0.0


def _compiled(expression: str) -> regex.Pattern[str]:
    """Compile an expression with `regex`, with the meaning that it has in Python's `re`."""
    if len(expression) > _LONGEST:
        raise ValueError(f"it has {len(expression):,} characters, and {_LONGEST:,} are the most")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # about nested sets, reserved for a future meaning
            re.compile(expression)
        literal = _LITERAL.sub(lambda bracket: bracket[0] if bracket[0][0] == "\\" else f"\\{bracket[0]}", expression)
        return regex.compile(literal, regex.VERSION0, cache_pattern=False)
    except (re.error, regex.error, OverflowError) as error:
        raise ValueError(str(error)) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def pattern_key(keys: Iterable[str], path: str) -> str | None:
    """The pattern key that applies to a path: the path itself, else the first that matches.

    A key matches as in PEFT's LoRA: as a regular expression for a path, or for its end after a dot.
    """
    keys = list(keys)
    if path in keys:
        return path
    return next((key for key in keys if fullmatch(within(END_OF_PATH, key), path)), None)

"""Names in PEFT's files, and checks of values, names and regular expressions, whose errors say what to do.

Regular expressions have Python's syntax and meaning, and matching is limited in time, so that it cannot hang.
"""

from __future__ import annotations

import functools
import keyword
import math
import re
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import regex

from gralora_fx.base.sources import ACTING, ADAPTER_FILE
from gralora_fx.errors import ConfigError, RewriteError, option, shown

CONFIG_NAME = ADAPTER_FILE
ALL_LINEAR = "all-linear"
KEY_PREFIX = "base_model.model."  # of every key of an adapter's tensors in PEFT's file
LARGEST = 2**24  # no layer is that wide


def check_integer(name: str, value: object, least: int) -> None:
    """Check that a value is an integer of at least `least`."""
    if isinstance(value, int) and value > LARGEST:
        raise ConfigError(f"{name} must be at most {LARGEST}, but got {shown(value)}")
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        kind = "a positive integer" if least else "a non-negative integer"
        raise ConfigError(f"{name} must be {kind}, but got {shown(value)}")


def is_number(value: object) -> bool:
    """Return whether a value is a finite number in the range of a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= 1e300 and math.isfinite(value)


def check_number(name: str, value: object) -> None:
    """Check that a value is a finite number."""
    if not is_number(value):
        raise ConfigError(f"{name} must be a finite number, but got {shown(value)}")


def check_dropout(name: str, value: Any) -> None:
    """Check that a value is a probability below 1."""
    check_number(name, value)
    if not 0 <= value < 1:
        raise ConfigError(f"{name} must be in [0, 1), but got {value}; take 0 for none")


def check_flag(name: str, value: object) -> None:
    """Check that a value is True or False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False, but got {shown(value)}")


def check_names(name: str, values: Iterable[object]) -> None:
    """Check that values are non-empty strings."""
    for value in values:
        if not isinstance(value, str) or not value:
            raise ConfigError(
                f"{name} must hold non-empty strings, but it holds {shown(value)}; name modules as in the model"
            )


def check_parameters(names: object, dropout: str, probability: float) -> None:
    """Check `target_parameters`: a list of names, which excludes dropout."""
    if names is None:
        return
    if not isinstance(names, list):
        raise ConfigError(f"target_parameters must be a list of names or None, but got {shown(names)}")
    check_names("target_parameters", names)
    if names and probability:
        raise ConfigError(
            f"{dropout}={probability} does not work with target_parameters={shown(names)}: dropout acts on the input "
            f"of a layer, and an adapter of a parameter has none; set {dropout} to 0, as PEFT requires"
        )


def acts_from(fields: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the token ids that activate an adapter with these fields of a file; empty for all tokens."""
    check_tokens(tokens := fields.get(ACTING))
    return tuple(tokens or ())


def check_tokens(tokens: Any, parameters: list[str] | None = None) -> None:
    """Check the token ids that activate an adapter, which an adapter of parameters cannot have."""
    if tokens is None:
        return
    if not isinstance(tokens, list) or not tokens:
        raise ConfigError(
            f"{ACTING} must be a list of at least one token id, or None for an adapter that acts on every token, but "
            f"got {shown(tokens)}"
        )
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise ConfigError(
                f"{ACTING} must hold token ids, as the model's tokenizer has them without special tokens, but it holds "
                f"{shown(token)}"
            )
    if parameters:
        raise ConfigError(
            f"{ACTING} does not work with target_parameters={shown(parameters)}, which have one value for all tokens; "
            "take linear layers (target_modules)"
        )


def check_acts_everywhere(tokens: tuple[int, ...], adapter: object, purpose: str, error: type[Exception]) -> None:
    """Check that an adapter acts on all tokens (`acts_from` is empty), for a purpose such as "merging"."""
    if tokens:
        raise error(
            f"{adapter} acts only on its tokens {shown(list(tokens))} and what follows; {purpose} would let it act on "
            f"every token: keep it as it is, or export it as data ({option(adapters='data')})"
        )


def _unfit_name(name: object) -> ConfigError:
    """Return the error for an invalid adapter name."""
    return ConfigError(
        f"{name!r} cannot name an adapter; use letters, digits, _ and -, no dots, no attribute of nn.Module and no "
        "Python keyword"
    )


def check_adapter_letters(name: object) -> None:
    """Check that a name's letters can be part of an attribute path, of code and of a file path."""
    is_fit = (
        isinstance(name, str)
        and bool(name)
        and name.isprintable()
        and not set(name) & set("./\\'\"")
        and not keyword.iskeyword(name)
    )
    if not is_fit:
        raise _unfit_name(name)


BASE = "__base__"  # PEFT's name for rows without an adapter


def check_row_names(adapter_names: object, count: int | None = None) -> list[str]:
    """Check a call's adapter names: a list with one or None for each row, of length `count` if that is known."""
    if not isinstance(adapter_names, (list, tuple)) or not all(isinstance(name, str | None) for name in adapter_names):
        raise RewriteError(
            f"adapter_names has the name of an adapter for each row ({BASE!r} for none), but got {shown(adapter_names)}"
        )
    if count not in (None, len(adapter_names)):
        raise RewriteError(
            f"adapter_names names the adapter of each row: the batch has {count} rows, and {len(adapter_names)} names "
            "are given"
        )
    return [BASE if name is None else name for name in adapter_names]


def check_adapter_name(name: object) -> None:
    """Check that a name can be part of an attribute path, of code and of a file path."""
    from torch import nn

    check_adapter_letters(name)
    if name == BASE:
        raise ConfigError(f"{BASE!r} names rows without an adapter (adapter_names=); take another name")
    if hasattr(nn.Module(), str(name)):
        raise _unfit_name(name)


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
    """Return a rule's expression with a name inserted."""
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
    """Return whether an expression matches a whole text, as `re.fullmatch` does."""
    return _Matcher.of(expression).match(text, whole=True) is not None


def match(expression: str, text: str) -> regex.Match[str] | None:
    """Return the match of an expression at the beginning of a text, as `re.match` does."""
    return _Matcher.of(expression).match(text, whole=False)


class _Matcher:
    """A compiled expression, and the time spent on its slow matches."""

    def __init__(self, expression: str) -> None:
        self.expression, self.spent = expression, 0.0
        self.compiled = _compiled(expression)

    @classmethod
    @functools.lru_cache(maxsize=4096)
    def of(cls, expression: str) -> _Matcher:
        """Return the cached matcher of an expression, which keeps the time it has spent."""
        return cls(expression)

    def match(self, text: str, *, whole: bool) -> regex.Match[str] | None:
        """Match a whole text, or the beginning of it."""
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
    """Compile an expression with `regex`, with its meaning in Python's `re`."""
    if len(expression) > _LONGEST:
        raise ValueError(f"it has {len(expression):,} characters; the maximum is {_LONGEST:,}")
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
    """Return the pattern key that applies to a path: the path itself, else the first that matches.

    A key matches as in PEFT's LoRA: as a regular expression for a path, or for its end after a dot.
    """
    keys = list(keys)
    if path in keys:
        return path
    return next((key for key in keys if fullmatch(within(END_OF_PATH, key), path)), None)

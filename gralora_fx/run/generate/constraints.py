"""Protocols of constraints on an answer's tokens: compiled by a feature, with a state for each row."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gralora_fx.base.features import parts
from gralora_fx.run.engine.limits import DecoderLimits

if TYPE_CHECKING:
    from gralora_fx.core.loading.text_tokenizer import TextTokenizer

Wanted: TypeAlias = Mapping[str, tuple[Any, Any]]  # by option or field: kind and value, or None


class RowConstraint(Protocol):
    """The constraint state of one answer; `forced` are next tokens that need not be chosen."""

    forced: deque[int]

    @property
    def is_complete(self) -> bool:
        """Return whether nothing can follow."""

    def foresee(self) -> None:
        """Start computing the allowed tokens in the background."""

    def permits(self, token: int) -> bool:
        """Return whether a token may come next."""

    def allowed(self, size: int) -> NDArray[np.bool_]:
        """Return a mask of the tokens that may come next, `[size]`."""

    def prefix(self, tokens: Sequence[int]) -> int:
        """Return how many of the given tokens are allowed in sequence."""

    def take(self, token: int) -> None:
        """Advance past a token chosen among the allowed ones."""


class Constraint(Protocol):
    """A constraint on the tokens of all answers to a request."""

    def begin(self, ends: frozenset[int], most: int) -> RowConstraint:
        """Return the state of an empty answer, of at most `most` tokens, ended by one of `ends`."""


class Form(Protocol):
    """The required form of a part of an answer, checked as far as possible without a tokenizer."""

    @property
    def field(self) -> str | None:
        """The option or request field that set it."""

    @property
    def size(self) -> int:
        """Number of characters in its description."""


class Constraints(Protocol):
    """Compiles constraints for a tokenizer, if there is one."""

    tokenizer: TextTokenizer | None

    def of(self, wanted: Wanted) -> Constraint | None:
        """Compile the only form given; None if there is none."""

    def part(self, wanted: Wanted) -> Form | None:
        """Check the only form given; None if there is none."""

    def special_tokens(self, field: str | None) -> frozenset[int]:
        """Return ids of special tokens that no text contains, except end tokens; rules name them as `<[id]>`."""

    def joined(self, rules: str, named: Mapping[str, Form], field: str) -> Constraint:
        """Compile Lark rules in which `@name` refers to a part."""


def compiler_for(tokenizer: TextTokenizer | None, limits: DecoderLimits) -> Constraints | None:
    """Return the constraint compiler for a tokenizer; None if no feature has one."""
    compilers = parts("constraints")
    return compilers[0](tokenizer, limits) if compilers else None

"""What tokens an answer may have: contracts of what a feature compiles, and of the state that each row has of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from gralora_fx.base.features import parts
from gralora_fx.run.engine.limits import DecoderLimits

Wanted: TypeAlias = Mapping[str, tuple[Any, Any]]  # by an option or a field: a kind of constraint, and a value or None


class RowConstraint(Protocol):
    """The state of one answer.

    Attributes:
        forced: Tokens that come next, none of which needs to be chosen.
    """

    forced: deque[int]

    @property
    def is_complete(self) -> bool:
        """Return whether nothing can follow."""

    def foresee(self) -> None:
        """Begin to find out which tokens may come next."""

    def permits(self, token: int) -> bool:
        """Return whether a token may come next."""

    def allowed(self, size: int) -> NDArray[np.bool_]:
        """Return which tokens may come next, `[size]`."""

    def prefix(self, tokens: Sequence[int]) -> int:
        """Return how many of some tokens may come next, one after the other."""

    def take(self, token: int) -> None:
        """Go on after a token that was chosen among those that are allowed."""


class Constraint(Protocol):
    """What the tokens of all answers to a request may be."""

    def begin(self, ends: frozenset[int], most: int) -> RowConstraint:
        """Return the state of an answer without tokens, which has at most `most` and ends with one of `ends`."""


class Form(Protocol):
    """What a part of an answer has to be, checked as far as that needs no tokenizer."""

    @property
    def field(self) -> str | None:
        """The option or field that asks for it."""

    @property
    def size(self) -> int:
        """How many characters describe it."""


class Constraints(Protocol):
    """Compiles constraints for a tokenizer.

    Attributes:
        tokenizer: The tokenizer; None if there is none.
    """

    tokenizer: PreTrainedTokenizerBase | None

    def of(self, wanted: Wanted) -> Constraint | None:
        """Compile the one that is given; None if there is none."""

    def part(self, wanted: Wanted) -> Form | None:
        """Check the one that is given; None if there is none."""

    def special_tokens(self, field: str | None) -> frozenset[int]:
        """Return ids of tokens that no text has, without end tokens; rules name them as `<[id]>`."""

    def joined(self, rules: str, named: Mapping[str, Form], field: str) -> Constraint:
        """Compile rules in Lark in which `@name` stands for a part."""


def compiler_for(tokenizer: PreTrainedTokenizerBase | None, limits: DecoderLimits) -> Constraints | None:
    """Return what compiles constraints for a tokenizer; None if no feature does."""
    compilers = parts("constraints")
    return compilers[0](tokenizer, limits) if compilers else None

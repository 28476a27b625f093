"""Which tokens may come next in one answer, as its grammar says."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import takewhile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gralora_fx.run.generate.request_errors import DeadEndError

_foreseeing = ThreadPoolExecutor(1, "gralora-fx masks")  # one, as a step of the model wants the other cores


class RowGrammar:
    """What the tokens of one answer may be.

    An end token may come only where the answer is complete, and an answer that nothing can follow is over without one.
    A token of the text that is to end it, such as a brace, may come wherever the grammar allows it.

    Which tokens are allowed is found out when that is asked for, since whether a single one is takes a hundredth of it;
    or in another thread, while the model's step runs, if it is foreseen.

    Attributes:
        forced: Tokens that the grammar alone determines, which come next; none of them needs to be chosen.
    """

    def __init__(
        self,
        matcher: Any,
        own_ends: frozenset[int],
        ends: frozenset[int],
        most: int,
        vocabulary: int,
        field: str | None = None,
    ) -> None:
        """Begin an answer; see `AnswerGrammar.begin`."""
        self._vocabulary, self._field = vocabulary, field
        self._matcher, self._own_ends, self._ends, self._left = matcher, own_ends, ends, most
        self.forced: deque[int] = deque()
        self._allowed: NDArray[np.bool_] | None = None
        self._foreseen: Future[NDArray[np.bool_]] | None = None
        self._last: int | None = None  # the token that was taken last
        self._goes_on = True
        self._advance()

    @property
    def is_complete(self) -> bool:
        """Whether the answer is over: it meets the grammar, and nothing can follow it."""
        return not self.forced and not self._goes_on

    def foresee(self) -> None:
        """Find out in another thread which tokens may come next; whatever is asked then waits for that."""
        if self._allowed is None and self._foreseen is None and self._goes_on and self._left > 0:
            self._foreseen = _foreseeing.submit(self._find_allowed)

    def permits(self, token: int) -> bool:
        """Whether a token may come next."""
        self._settle()
        if self._allowed is not None:
            return token < self._vocabulary and bool(self._allowed[token])
        if token in self._ends and self._matcher.is_accepting():
            return True
        return token < self._vocabulary and token not in self._own_ends and self._matcher.validate_tokens([token]) == 1

    def allowed(self, size: int) -> NDArray[np.bool_]:
        """Which tokens may come next, `[size]`."""
        self._settle()
        if self._allowed is None:
            self._allowed = self._find_allowed()
        allowed = self._allowed[:size]
        return allowed if len(allowed) == size else np.pad(allowed, (0, size - len(allowed)))

    def prefix(self, tokens: Sequence[int]) -> int:
        """How many of some tokens may come next, one after the other."""
        self._settle()
        return int(self._matcher.validate_tokens(list(tokens[: self._left]))) if self._goes_on else 0

    def take(self, token: int) -> None:
        """Go on after a token that was chosen among those that are allowed."""
        self._settle()
        self._left -= 1
        if token in self._ends:
            return
        self._matcher.consume_token(token)
        self._last = token
        self._advance()

    def _advance(self) -> None:
        """Find the tokens that are forced, and whether others may come after them."""
        matcher, self._allowed = self._matcher, None
        forced = list(takewhile(self._is_taken, matcher.compute_ff_tokens()[: self._left]))
        forced = forced[: matcher.validate_tokens(forced)]  # a tokenizer may lack bytes of the text that is forced
        if forced:
            matcher.consume_tokens(forced)
            self.forced.extend(forced)
            self._left -= len(forced)
        self._goes_on = not matcher.is_stopped()
        self._check()
        if self._goes_on and self._left > 0 and not self._surely_goes_on():
            self._allowed = self._find_allowed()

    def _surely_goes_on(self) -> bool:
        """Whether a token can follow, or else it is soon enough to say so when one is chosen."""
        if self._last is None:
            return False
        return not self._matcher.is_accepting() or self._matcher.validate_tokens([self._last]) == 1

    def _settle(self) -> None:
        """Wait for what is found out in another thread; of an error `allowed` tells, where one is expected."""
        foreseen, self._foreseen = self._foreseen, None
        if foreseen is not None and foreseen.exception() is None:
            self._allowed = foreseen.result()

    def _is_taken(self, token: int) -> bool:
        """Whether a token that is forced is taken without a choice: it is one of the model's, and ends nothing."""
        return token not in self._ends and token < self._vocabulary

    def _find_allowed(self) -> NDArray[np.bool_]:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed: NDArray[np.bool_] = np.unpackbits(bits, count=self._vocabulary, bitorder="little").view(np.bool_)
        allowed[[end for end in self._own_ends if end < len(allowed)]] = False
        self._goes_on = bool(allowed.any())
        self._check()
        if self._matcher.is_accepting():
            allowed[[end for end in self._ends if end < len(allowed)]] = True
        return allowed

    def _check(self) -> None:
        """Check that something can go on, or the answer is complete."""
        if self._matcher.is_error() or not (self._goes_on or self._matcher.is_accepting()):
            reason = problem_of(self._matcher.get_error()) or "the model has no token for what comes next"
            raise DeadEndError(self._field, f"no token can go on with the grammar of the answer ({reason})")


def problem_of(message: str) -> str:
    """What llguidance says of an error, in one line."""
    if message.startswith("NoExtension"):
        return ""
    lines = [line.strip() for line in message.replace("<non-verbose/>", "").splitlines()]
    return " ".join(filter(None, lines))[:300]

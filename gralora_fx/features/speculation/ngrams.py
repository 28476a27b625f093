"""A text and where its last tokens occurred before: what followed there may follow again."""

from __future__ import annotations

from collections.abc import Sequence

ORDER = 3  # tokens that have to occur again
LONGEST = 16  # to which it is counted how many do


class NGrams:
    """A prompt and its answer so far, with the place where its last tokens occurred before.

    What it proposes depends on the text alone, so an answer is the same in every run.

    Attributes:
        matched: How many of the last tokens occurred before, at most `LONGEST`; 0 for fewer than `ORDER`.
        credit: How many steps of one token the row is ahead of a row without proposals (see `Speculation`).
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        """Begin with a prompt."""
        self._tokens = list(tokens)
        grams = zip(*(self._tokens[start:] for start in range(ORDER)), strict=False)
        # where the text goes on after each, the last time; the last of all has nothing after it yet
        self._ends = dict(zip(grams, range(ORDER, len(self._tokens)), strict=False))
        self._at = self.matched = 0
        self.credit = 0.0
        self._look_up()

    def add(self, token: int) -> bool:
        """Add the next token of the answer; returns whether it is the one that was proposed."""
        tokens = self._tokens
        is_proposed = self.matched > 0 and tokens[self._at] == token
        if len(tokens) >= ORDER:
            self._ends[tuple(tokens[-ORDER:])] = len(tokens)
        tokens.append(token)
        if is_proposed:
            self._at, self.matched = self._at + 1, min(self.matched + 1, LONGEST)
        else:
            self._look_up()
        return is_proposed

    def proposal(self, count: int) -> list[int]:
        """The next tokens as they followed before; those of a repetition that goes on, where the text ends."""
        if not self.matched:
            return []
        period = len(self._tokens) - self._at
        return [self._tokens[self._at + index % period] for index in range(count)]

    def _look_up(self) -> None:
        tokens = self._tokens
        at = self._ends.get(tuple(tokens[-ORDER:]))
        self.matched = 0
        if at is not None:
            self._at, self.matched = at, ORDER
            most = min(LONGEST, at)
            while self.matched < most and tokens[at - 1 - self.matched] == tokens[-1 - self.matched]:
                self.matched += 1

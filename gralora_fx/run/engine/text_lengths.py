"""The lengths of rows' texts, for models whose rotary embedding depends on the length of the whole text.

Such a model (LongRoPE) rotates all tokens of a text of up to `switch` tokens in one way, and those of longer texts in
another. A prompt longer than that is read in the second way from its first chunk on, as transformers reads it at once.
Where an answer makes a text longer, some models' generation computes the cache anew, in the second way; the others
keep the cache, and go on in the second way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass
class _Text:
    """The text of a row that is open."""

    is_long: bool = False  # whether its tokens are rotated as those of a long text
    tokens: list[int] = field(default_factory=list)  # those that it has read, while they may be read again


class TextLengths:
    """The texts of a decoder's rows.

    Attributes:
        switch: The length of the longest text of the first kind.
        rereads: Whether a text that grows longer is read again.
    """

    def __init__(self, switch: int, *, rereads: bool) -> None:
        """Start without rows."""
        self.switch, self.rereads = switch, rereads
        self._texts: dict[int, _Text] = {}

    @classmethod
    def of(cls, described: str) -> TextLengths:
        """Return those of a graph, from its metadata."""
        switch, _, kind = described.partition(" ")
        return cls(int(switch), rereads=kind == "anew")

    def begin(self, row: int) -> None:
        """Open a row."""
        self._texts[row] = _Text()

    def expect(self, row: int, length: int, count: int) -> bool:
        """Record that a row reads so many tokens next; return whether it is then a long text from its first one on."""
        text = self._texts[row]
        text.is_long = text.is_long or (length == 0 and count > self.switch)
        return text.is_long

    def cut(self, read: Mapping[int, NDArray[np.int64]], lengths: Mapping[int, int]) -> Mapping[int, NDArray[np.int64]]:
        """Return the tokens to read first: of a row that grows longer than the switch, those up to there."""
        for row, array in read.items():
            self.expect(row, lengths[row], len(array))
        left = {row: self.switch - lengths[row] for row in read if not self._texts[row].is_long}
        return {row: array[: left[row]] if left.get(row, 0) > 0 else array for row, array in read.items()}

    def grows(self, row: int, length: int, count: int) -> bool:
        """Return whether a row that reads so many tokens more becomes a long text."""
        return not self._texts[row].is_long and length + count > self.switch

    def grow(self, row: int) -> list[int]:
        """Record that a row becomes a long text; return the tokens that it reads again, none if it goes on."""
        text = self._texts[row]
        text.is_long = True
        return text.tokens

    def shrink(self, row: int) -> None:
        """Record that a row could not become a long text."""
        self._texts[row].is_long = False

    def read(self, row: int, tokens: Iterable[int]) -> None:
        """Record the tokens that a row has read."""
        if self.rereads and not self._texts[row].is_long:
            self._texts[row].tokens += tokens

    def totals(self, rows: range, read: Mapping[int, Any], lengths: Mapping[int, int]) -> NDArray[np.int32]:
        """Return `[rows]`, the lengths of the rows' texts that a step takes; 0 for rows that read nothing."""
        totals = np.zeros(len(rows), dtype=np.int32)
        for row, array in read.items():
            text = self._texts[row]
            least = self.switch + 1 if text.is_long else 0
            totals[row - rows.start] = max(lengths[row] + len(array), least)
        return totals

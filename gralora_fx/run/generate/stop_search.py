"""The search for a stop string in a growing text."""

from __future__ import annotations


class StopSearch:
    """An incremental Knuth-Morris-Pratt search for a stop string, one character at a time.

    Its table is extended only as far as the text has matched, so a long string costs no more than the text.

    Attributes:
        string: The stop string.
        matched: The length of its longest prefix that the text ends with.
    """

    def __init__(self, string: str) -> None:
        """Begin without text."""
        self.string = string
        self.matched = 0
        self._borders = [0]  # for each prefix: the length of its longest proper prefix that is also its suffix

    def step(self, letter: str) -> bool:
        """Add a character; returns whether the string is complete."""
        while self.matched and self.string[self.matched] != letter:
            self.matched = self._borders[self.matched - 1]
        if self.string[self.matched] == letter:
            self.matched += 1
            self._extend()
        return self.matched == len(self.string)

    def _extend(self) -> None:
        """Extend the table to the length of the match."""
        while len(self._borders) < self.matched:
            letter, border = self.string[len(self._borders)], self._borders[-1]
            while border and self.string[border] != letter:
                border = self._borders[border - 1]
            self._borders.append(border + (self.string[border] == letter))

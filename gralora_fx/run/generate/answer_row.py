"""An answer as a row of a decoder reads it: tokens that were chosen, and maybe tokens that are proposed after them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from gralora_fx.base.features import parts
from gralora_fx.errors import ServingError, shown
from gralora_fx.run.generate.token_choice import Choice, TokenChooser


class ProposedText(Protocol):
    """A prompt and its answer so far, and what is proposed to follow.

    Attributes:
        matched: How surely something is; 0 if nothing is.
    """

    matched: int

    def add(self, token: int) -> bool:
        """Add the next token of the answer, and return whether it is the one that was proposed."""

    def proposal(self, count: int) -> list[int]:
        """Return the next tokens as they are proposed, at most so many."""


class Proposer(Protocol):
    """Proposes next tokens of rows, which a step verifies."""

    def most(self, wanted: int | None) -> int:
        """Check an option, and return the most tokens that are proposed for a row; None for as many as pay."""

    def note(self, wanted: int | None, problem: str | None) -> str:
        """Return a line for a log, or raise if tokens are wanted that cannot be verified, with the problem."""

    def text(self, prompt: Sequence[int]) -> ProposedText | None:
        """Begin a text; None if nothing is ever proposed."""

    def propose(self, rows: Sequence[AnswerRow], room: int, most: int) -> int:
        """Propose tokens for a step in which rows read those that were chosen, and return how many."""

    def saw(self, matched: int, is_proposed: bool) -> None:
        """Take note of a token: how surely one was proposed there, and whether it is that one."""

    def ran(self, size: int, proposed: int, seconds: float) -> None:
        """Take note of how long a step took, in which rows that answer read so many tokens."""

    def settle(self, row: AnswerRow, gained: int) -> None:
        """Take note of how many proposed tokens a row that read in the last step got."""


class NoProposals:
    """Proposes nothing."""

    def most(self, wanted: int | None) -> int:
        """Return 0, unless tokens are asked for, which is an error."""
        if wanted:
            raise ServingError(
                f"{shown(wanted)} proposed tokens are asked for, and no feature that is installed proposes any; "
                "install gralora-fx with all of its features"
            )
        return 0

    def note(self, wanted: int | None, problem: str | None) -> str:
        """Return a line for a log."""
        self.most(wanted)
        return "no tokens are proposed"

    def text(self, prompt: Sequence[int]) -> None:
        """Begin no text."""

    def propose(self, rows: Sequence[AnswerRow], room: int, most: int) -> int:
        """Propose nothing."""
        return 0

    def saw(self, matched: int, is_proposed: bool) -> None:
        """Take note of nothing."""

    def ran(self, size: int, proposed: int, seconds: float) -> None:
        """Take note of nothing."""

    def settle(self, row: AnswerRow, gained: int) -> None:
        """Take note of nothing."""


def new_proposer() -> Proposer:
    """Return what proposes tokens: that of a feature, or one that proposes nothing."""
    found = parts("proposers")
    return found[0]() if found else NoProposals()


class AnswerRow:
    """The tokens that a row reads next, and what is chosen of their logits.

    A step reads the tokens that were chosen, and proposed ones after them. The token after the chosen ones is chosen of
    its own logits, as ever; while it is the proposed one, so is the next one, whose logits are there already.

    Attributes:
        text: The prompt and the answer so far, and what is proposed to follow; None if nothing is.
        unread: Tokens that were chosen, or forced by a constraint, and not read yet.
        proposed: Tokens that the next step reads after these, to verify them.
        accepted: How many of those that were proposed last were chosen.
        surplus: How many of them the row has read and has to forget.
    """

    def __init__(self, choose: TokenChooser, most: int, text: ProposedText | None = None) -> None:
        """Begin an answer of at most so many tokens."""
        self._choose, self._left = choose, most
        self.text = text
        self.unread: tuple[int, ...] = ()
        self.proposed: list[int] = []
        self.accepted = self.surplus = 0

    @property
    def matched(self) -> int:
        """How surely a token can be proposed; 0 if none can."""
        return 0 if self.text is None else self.text.matched

    @property
    def most(self) -> int:
        """The most tokens that may be proposed: the last token of an answer is not read."""
        return self._left - 1

    def propose(self, count: int) -> int:
        """Propose at most so many tokens, and return how many the answer's constraint allows."""
        assert self.text is not None
        self.proposed = self._choose.plausible(self.text.proposal(count))
        return len(self.proposed)

    def next_tokens(self, most: int) -> list[int]:
        """The tokens to read in the next step, at most so many."""
        return [*self.unread[:most], *self.proposed]

    def wanted(self, read: int) -> int | None:
        """After how many of the tokens that a step reads the logits are wanted (see `Decoder.step`).

        Where tokens can be proposed, a token computes as one of several, whether some are or not: so an answer depends
        on its text alone, and not on what it pays to propose.
        """
        is_all = read == len(self.unread) + len(self.proposed)
        return len(self.proposed) + 1 if self.matched and is_all else None

    def read(self, count: int) -> bool:
        """Take note of chosen tokens that were read, without proposed ones; returns whether all are."""
        self.unread = self.unread[count:]
        return not self.unread

    def choices(
        self, logits: NDArray[Any], saw: Callable[[int, bool], None] = lambda matched, is_proposed: None
    ) -> Iterator[Choice]:
        """Choose the next tokens, until one is not the proposed one; a caller ends it where the answer ends.

        Args:
            logits: `[vocabulary]` after the last chosen token, or `[1 + proposed, vocabulary]` after it and each
                proposed one.
            saw: Is told of each token how surely one was proposed, and whether it is that one (see `Proposer`).
        """
        proposed, self.proposed, self.unread, self.accepted = self.proposed, [], (), 0
        self.surplus = len(proposed)
        rows = logits[None] if logits.ndim == 1 else logits[-1 - len(proposed) :]
        while not self.unread:
            choice = self._choose(rows[self.accepted])
            self._left -= len(choice.tokens)
            for token in choice.tokens:
                if self.text is not None:
                    matched = self.text.matched
                    saw(matched, self.text.add(token))
                if not self.unread and self.accepted < len(proposed) and proposed[self.accepted] == token:
                    self.accepted += 1
                else:
                    self.unread += (token,)
            self.surplus = len(proposed) - self.accepted
            yield choice

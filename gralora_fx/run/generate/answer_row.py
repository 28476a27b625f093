"""An answer as read by a decoder's row: chosen tokens, optionally followed by proposed ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from gralora_fx.base.features import parts
from gralora_fx.errors import ServingError, shown
from gralora_fx.run.generate.token_choice import Choice, TokenChooser


class ProposedText(Protocol):
    """A prompt and its answer so far, with proposed continuations; `matched` is their confidence, 0 for none."""

    matched: int

    def add(self, token: int) -> bool:
        """Append the answer's next token, and return whether it is the proposed one."""

    def proposal(self, count: int) -> list[int]:
        """Return the next tokens proposed, at most `count`."""


class Proposer(Protocol):
    """Proposes next tokens of rows, which a step verifies."""

    def most(self, wanted: int | None) -> int:
        """Check an option, and return the maximum of proposed tokens per row; None for as many as pay."""

    def note(self, wanted: int | None, problem: str | None) -> str:
        """Return a line for a log; raise with the problem if tokens are requested that cannot be verified."""

    def text(self, prompt: Sequence[int]) -> ProposedText | None:
        """Start a text; None if nothing is ever proposed."""

    def propose(self, rows: Sequence[AnswerRow], room: int, most: int) -> int:
        """Propose tokens for a step in which rows read chosen ones, and return how many."""

    def saw(self, matched: int, is_proposed: bool) -> None:
        """Record a token: the confidence of a proposal there, and whether it was right."""

    def ran(self, size: int, proposed: int, seconds: float) -> None:
        """Record the time of a step and its number of tokens in rows that answer."""

    def settle(self, row: AnswerRow, gained: int) -> None:
        """Record how many proposed tokens a row got accepted in the last step."""


class NoProposals:
    """Proposes nothing."""

    def most(self, wanted: int | None) -> int:
        """Return 0; raise if tokens are requested."""
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
        """Return None."""

    def propose(self, rows: Sequence[AnswerRow], room: int, most: int) -> int:
        """Propose nothing."""
        return 0

    def saw(self, matched: int, is_proposed: bool) -> None:
        """Do nothing."""

    def ran(self, size: int, proposed: int, seconds: float) -> None:
        """Do nothing."""

    def settle(self, row: AnswerRow, gained: int) -> None:
        """Do nothing."""


def new_proposer() -> Proposer:
    """Return a feature's proposer, or one that proposes nothing."""
    found = parts("proposers")
    return found[0]() if found else NoProposals()


class AnswerRow:
    """The tokens that a row reads next, and the choice of tokens from its logits.

    A step reads the chosen tokens, and proposed ones after them. The token after the chosen ones is chosen from its own
    logits, as always; while it equals the proposed one, so is the next, whose logits were computed in the same step.

    Attributes:
        text: The prompt and the answer so far, with proposals; None if nothing is proposed.
        unread: Tokens chosen, or forced by a constraint, and not read yet.
        proposed: Tokens that the next step reads after these, to verify them.
        accepted: Number of the last proposed tokens that were chosen.
        surplus: Number of tokens that the row has read and must forget.
    """

    def __init__(self, choose: TokenChooser, most: int, text: ProposedText | None = None) -> None:
        """Start an answer of at most `most` tokens."""
        self._choose, self._left = choose, most
        self.text = text
        self.unread: tuple[int, ...] = ()
        self.proposed: list[int] = []
        self.accepted = self.surplus = 0

    @property
    def matched(self) -> int:
        """Confidence of a proposal; 0 if there is none."""
        return 0 if self.text is None else self.text.matched

    @property
    def most(self) -> int:
        """Maximum number of tokens to propose: an answer's last token is not read."""
        return self._left - 1

    def propose(self, count: int) -> int:
        """Propose at most `count` tokens, and return how many the answer's constraint allows."""
        assert self.text is not None
        self.proposed = self._choose.plausible(self.text.proposal(count))
        return len(self.proposed)

    def next_tokens(self, most: int) -> list[int]:
        """Return the tokens to read in the next step: at most `most` chosen ones, and the proposed ones."""
        return [*self.unread[:most], *self.proposed]

    def wanted(self, read: int) -> int | None:
        """Return how many of the last tokens of a step need logits (see `Decoder.step`).

        If tokens can be proposed, a token is always computed as one of several, so that an answer depends on its text
        alone, and not on whether proposing pays.
        """
        is_all = read == len(self.unread) + len(self.proposed)
        return len(self.proposed) + 1 if self.matched and is_all else None

    def read(self, count: int) -> bool:
        """Record that chosen tokens were read, without proposed ones; return whether all are read."""
        self.unread = self.unread[count:]
        return not self.unread

    def choices(
        self, logits: NDArray[Any], saw: Callable[[int, bool], None] = lambda matched, is_proposed: None
    ) -> Iterator[Choice]:
        """Yield the next tokens, until one differs from the proposed one; the caller stops where the answer ends.

        Args:
            logits: `[vocabulary]` after the last chosen token, or `[1 + proposed, vocabulary]` after it and each
                proposed one.
            saw: Receives for each token the proposal's confidence, and whether it was right (see `Proposer`).
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

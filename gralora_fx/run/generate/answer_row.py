"""An answer as a row of a decoder reads it: tokens that were chosen, and a draft of what followed them before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from numpy.typing import NDArray

from gralora_fx.run.generate.token_choice import Choice, TokenChooser

ORDER = 3  # tokens that have to occur again
LONGEST = 16  # to which it is counted how many do


class AnswerRow:
    """The tokens that a row reads next, and what is chosen of their logits.

    A step reads the tokens that were chosen, and a draft after them. The token after the chosen ones is chosen of its
    own logits, as ever; while it is the draft's, so is the next one, whose logits are there already.

    Attributes:
        unread: Tokens that were chosen, or forced by a grammar, and not read yet.
        draft: Tokens that the next step reads after these, to verify them.
        accepted: How many tokens of the last draft were chosen.
        surplus: How many tokens of it the row has read and has to forget.
        credit: How many steps of one token the row is ahead of a row without drafts (see `Speculation`).
    """

    def __init__(self, choose: TokenChooser, prompt: tuple[int, ...], most: int, verifies: bool) -> None:
        """Begin an answer."""
        self._choose, self._left = choose, most
        self._text = NGrams(prompt) if verifies else None
        self.unread: tuple[int, ...] = ()
        self.draft: list[int] = []
        self.accepted = self.surplus = 0
        self.credit = 0.0

    @property
    def matched(self) -> int:
        """How many of its last tokens occurred before, so that those after them may be proposed; 0 for too few."""
        return 0 if self._text is None else self._text.matched

    @property
    def most(self) -> int:
        """The most tokens of a draft: the last token of an answer is not read."""
        return self._left - 1

    def propose(self, count: int) -> int:
        """Make a draft of at most so many tokens; returns how many the grammar of the answer allows."""
        assert self._text is not None
        self.draft = self._choose.plausible(self._text.proposal(count))
        return len(self.draft)

    def next_tokens(self, most: int) -> list[int]:
        """The tokens to read in the next step, at most so many."""
        return [*self.unread[:most], *self.draft]

    def wanted(self, read: int) -> int | None:
        """After how many of the tokens that a step reads the logits are wanted (see `Decoder.step`).

        Where the text repeats itself, a token computes as one of several, whether there is a draft or not: so an answer
        depends on its text alone, and not on what it pays to propose.
        """
        is_all = read == len(self.unread) + len(self.draft)
        return len(self.draft) + 1 if self.matched and is_all else None

    def read(self, count: int) -> bool:
        """Take note of chosen tokens that were read, without a draft; returns whether all are."""
        self.unread = self.unread[count:]
        return not self.unread

    def choices(
        self, logits: NDArray[Any], saw: Callable[[int, bool], None] = lambda matched, is_proposed: None
    ) -> Iterator[Choice]:
        """Choose the next tokens, until one is not the draft's; a caller ends it where the answer ends.

        Args:
            logits: `[vocabulary]` after the last chosen token, or `[1 + draft, vocabulary]` after it and each of the
                draft.
            saw: Is told of each token how many before it occurred earlier, and whether it was the one proposed.
        """
        draft, self.draft, self.unread, self.accepted = self.draft, [], (), 0
        self.surplus = len(draft)
        rows = logits[None] if logits.ndim == 1 else logits[-1 - len(draft) :]
        while not self.unread:
            choice = self._choose(rows[self.accepted])
            self._left -= len(choice.tokens)
            for token in choice.tokens:
                if self._text is not None:
                    matched = self._text.matched
                    saw(matched, self._text.add(token))
                if not self.unread and self.accepted < len(draft) and draft[self.accepted] == token:
                    self.accepted += 1
                else:
                    self.unread += (token,)
            self.surplus = len(draft) - self.accepted
            yield choice


class NGrams:
    """A prompt and its answer so far, with the place where its last tokens occurred before.

    What it proposes depends on the text alone, so an answer is the same in every run.

    Attributes:
        matched: How many of the last tokens occurred before, at most `LONGEST`; 0 for fewer than `ORDER`.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        """Begin with a prompt."""
        self._tokens = list(tokens)
        grams = zip(*(self._tokens[start:] for start in range(ORDER)), strict=False)
        # where the text goes on after each, the last time; the last of all has nothing after it yet
        self._ends = dict(zip(grams, range(ORDER, len(self._tokens)), strict=False))
        self._at = self.matched = 0
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

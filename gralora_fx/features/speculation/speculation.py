"""N-gram proposals, and draft lengths chosen by measured acceptance and step costs."""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence

from gralora_fx.errors import ServingError, option
from gralora_fx.run.generate.answer_row import AnswerRow

ORDER = 3  # minimum length of a match
LONGEST = 16  # maximum counted length of a match
_MOST = 16  # default maximum tokens of a draft
_LEAST_LIKELY = 0.1
_LOSS = 0.02  # maximum share of its time that a row may lose to drafts
_MOST_CREDIT = 2.0  # maximum credit, in steps
_WEIGHT = 0.05  # weight of the last token in the acceptance rate
_KEPT, _FORGOTTEN = 5, 500  # times kept per size; steps after which they expire


class NGrams:
    """A prompt and its answer so far, with the place where its last tokens occurred before.

    Proposals depend on the text alone, so an answer is the same in every run.

    Attributes:
        matched: How many of the last tokens occurred before, at most `LONGEST`; 0 for fewer than `ORDER`.
        credit: Single-token steps by which the row is ahead of a row without proposals (see `Speculation`).
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = list(tokens)
        grams = zip(*(self._tokens[start:] for start in range(ORDER)), strict=False)
        # the position after the last occurrence of each; the very last one has nothing after it yet
        self._ends = dict(zip(grams, range(ORDER, len(self._tokens)), strict=False))
        self._at = self.matched = 0
        self.credit = 0.0
        self._look_up()

    def add(self, token: int) -> bool:
        """Append the answer's next token; return whether it was the proposed one."""
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
        """Return `count` tokens that followed the earlier occurrence, continuing its repetition past the text's end."""
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


class StepCosts:
    """Step time by number of tokens read, from the most recent timed steps."""

    def __init__(self) -> None:
        self._times: dict[int, deque[float]] = {}
        self._last: dict[int, int] = {}
        self._steps = 0
        self._sizes: list[int] = []  # known sizes, sorted
        self._best: dict[int, float] = {}

    def add(self, size: int, seconds: float) -> None:
        """Record the time of a step that read `size` tokens."""
        self._steps += 1
        times = self._times.setdefault(size, deque(maxlen=_KEPT))
        times.append(seconds)
        self._last[size] = self._steps
        if len(times) > 1:  # the first may include memory allocation
            self._best[size] = min(times)
        if len(self._best) != len(self._sizes) or self._steps % _FORGOTTEN == 0:
            for old in [size for size, last in self._last.items() if last <= self._steps - _FORGOTTEN]:
                del self._times[old], self._last[old]
                self._best.pop(old, None)
            self._sizes = sorted(self._best)

    def knows(self, size: int) -> bool:
        """Return whether such steps were timed recently."""
        return size in self._best

    @property
    def largest(self) -> int:
        """Largest known size; 0 if there is none."""
        return self._sizes[-1] if self._sizes else 0

    def __call__(self, size: int) -> float:
        """Return a step's seconds, interpolated between known sizes; constant beyond the largest."""
        if size in self._best:
            return self._best[size]
        index = bisect_left(self._sizes, size)
        above = self._sizes[min(index, len(self._sizes) - 1)]
        below = self._sizes[max(index - 1, 0)]
        if above <= below:
            return self._best[above]
        part = (size - below) / (above - below)
        return self._best[below] + part * (self._best[above] - self._best[below])


class Speculation:
    """Chooses draft lengths for the steps of a decoder.

    For every token of an answer it is known whether it would have been proposed, so acceptance rates cost nothing to
    measure, even without proposals. The cost of a step is known once it was tried: drafts grow from one token, and a
    longer one that does not pay is not tried again for some hundred steps.

    A step gets the drafts that maximise tokens per second over its rows. Each row has an account of what drafts, its
    own and those of others, gained and cost it; once it has lost more than a fiftieth of its time, its steps have none.
    """

    def __init__(self) -> None:
        self._costs = StepCosts()
        self._likely = [matched / (matched + 3) for matched in range(LONGEST + 1)]
        self._excess = 0.0  # extra cost of the last step over one without drafts, in such steps

    @staticmethod
    def most(wanted: int | None) -> int:
        """Check an option, and return the maximum number of proposed tokens per row."""
        if not (wanted is None or (type(wanted) is int and wanted >= 0)):
            raise ServingError(f"prompt_lookup_num_tokens must be a whole number from 0 on, but got {wanted!r:.80}")
        return _MOST if wanted is None else wanted

    def note(self, wanted: int | None, problem: str | None) -> str:
        """Return a line for a log."""
        if problem is None:
            return f"speculation: up to {self.most(wanted)} tokens that an answer repeats are verified in a step"
        if wanted:
            raise ServingError(f"speculative_tokens has no effect: {problem}; leave {option('speculative_tokens')} out")
        return f"no speculation: {problem}"

    @staticmethod
    def text(prompt: Sequence[int]) -> NGrams:
        """Start a text."""
        return NGrams(prompt)

    def saw(self, matched: int, is_proposed: bool) -> None:
        """Record a token: how many tokens before it matched, and whether it continued the match."""
        if matched:
            self._likely[matched] += _WEIGHT * (is_proposed - self._likely[matched])

    def propose(self, rows: Sequence[AnswerRow], room: int, most: int) -> int:
        """Make drafts for a step's decoding rows; return their total number of tokens."""
        base = sum(len(row.unread) for row in rows)
        limits = [min(most, row.most, room - len(row.unread)) if row.matched else 0 for row in rows]
        if max(limits, default=0) < 1 or not self._costs.knows(base) or any(_text(row).credit < 0 for row in rows):
            return 0
        counts = self._best_counts(rows, limits, base)
        return sum(row.propose(count) for row, count in zip(rows, counts, strict=True) if count)

    def _best_counts(self, rows: Sequence[AnswerRow], limits: Sequence[int], base: int) -> list[int]:
        """Return draft lengths that maximise tokens per second, taking the likeliest tokens first."""
        counts, best, chosen = [0] * len(rows), len(rows) / self._costs(base), 0
        waiting = [(-self._likely[row.matched], index) for index, row in enumerate(rows) if limits[index] > 0]
        heapq.heapify(waiting)
        most = 2 * max(self._costs.largest - base, 0) + 1  # slightly beyond the tried sizes
        taken: list[int] = []
        expected = float(len(rows))
        while waiting and len(taken) < most and -waiting[0][0] >= _LEAST_LIKELY:
            likely, index = heapq.heappop(waiting)
            taken.append(index)
            counts[index] += 1
            expected -= likely
            if (rate := expected / self._costs(base + len(taken))) > best:
                best, chosen = rate, len(taken)
            if counts[index] < limits[index]:
                after = min(rows[index].matched + counts[index], LONGEST)
                heapq.heappush(waiting, (likely * self._likely[after], index))
        for index in taken[chosen:]:
            counts[index] -= 1
        return counts

    def ran(self, size: int, proposed: int, seconds: float) -> None:
        """Record the seconds of a step of `size` tokens, some of them proposed."""
        self._costs.add(size, seconds)
        base, cost = size - proposed, self._costs(size) if self._costs.knows(size) else seconds
        self._excess = cost / self._costs(base) - 1 if proposed else 0.0

    def settle(self, row: AnswerRow, gained: int) -> None:
        """Record what a row gained in the last step."""
        text = _text(row)
        text.credit = min(text.credit + gained - self._excess + _LOSS, _MOST_CREDIT)


def _text(row: AnswerRow) -> NGrams:
    assert isinstance(row.text, NGrams)
    return row.text

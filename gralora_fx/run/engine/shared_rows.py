"""The rows of a decoder that share what they have read, through a prefix cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from gralora_fx.run.engine.limits import QUERIES
from gralora_fx.run.engine.prefix_blocks import BLOCK, common, owned
from gralora_fx.run.engine.prefix_cache import PrefixCache

_LEFT = 2  # the fewest tokens that a row reads itself
_WORTH = 16  # the fewest tokens that a later text must save for a step to be cut in two
_APART = 32  # the fewest tokens from a snapshot to the next tentative one


@dataclass
class _SharedRow:
    """A row that is open."""

    root: tuple[Any, Any]  # the version of its adapter, and its salt, or its kind and its salt
    text: list[int] = field(default_factory=list)  # the tokens that it has read, or that were filled in
    kept: int = 0  # how many of them were stored in the cache
    exact: int = 2**62  # up to which all were read in steps of several
    # for a model with states, the tokens that it is known to read, such as its prompt, from the first on
    planned: tuple[int, ...] = ()
    # numbers of these tokens after which another text diverges, or may diverge, from it
    stops: set[int] = field(default_factory=set)
    # keys of inputs that replace its tokens, by position
    names: Mapping[int, int] = field(default_factory=dict)
    start: int = 0  # the first token on which its adapter is active; the base reads those before
    adapter: int = 0  # the adapter's number, if it is active from a token on; else 0

    def named(self, start: int, tokens: Sequence[int]) -> list[int]:
        """Return the keys of tokens from a position on: their ids, or names of given inputs."""
        if not self.names and not self.adapter:
            return list(tokens)
        named = [self.names.get(position, token) for position, token in enumerate(tokens, start)]
        base = max(self.start - start, 0)
        return [*named[:base], *(owned(token, self.adapter) for token in named[base:])]


class SharedRows:
    """Stores what rows read in a prefix cache, and fills in from it what they would read next.

    The keys and values of a token are bitwise equal however many tokens a row reads in a step, as long as there are
    several: a matrix product with a single row is summed in another order. In float32 that changes the last digits; it
    changes more if values are rounded to eight bits or half precision. With such rounding, whatever follows a step of
    one token is not stored, so that an answer is the same as without a cache. A prompt is never read token by token
    (see `part_length`), so the next turn of a chat reads the answer once, as a part of its prompt.

    For a model with states, snapshots are stored: after each prompt and each text, and where another row's prompt, or a
    text in the cache, diverges; a step is cut in two there. At the end of a step within a prompt, and after its last
    whole block, a tentative snapshot is stored, for a later prompt that is equal up to there. Layers with states
    compute the same bits of a token wherever a prompt is cut.
    """

    def __init__(
        self,
        cache: PrefixCache,
        tensors: Callable[[int], Sequence[NDArray[Any]]],
        states: Callable[[int], Sequence[NDArray[Any]]],
        *,
        is_float32: bool,
    ) -> None:
        """Start without rows.

        Args:
            cache: The cache.
            tensors: The keys and values of a row by its number, `[heads, positions, size]`.
            states: The states of a row by its number.
            is_float32: Whether nothing in the model is rounded to fewer bits.
        """
        self.cache, self._tensors, self._states, self._is_float32 = cache, tensors, states, is_float32
        self._rows: dict[int, _SharedRow] = {}

    def begin(
        self, row: int, version: Any, salt: str | None, names: Mapping[int, int] | None, start: int | None = None
    ) -> None:
        """Open a row.

        Args:
            row: Its number.
            version: The version of its adapter.
            salt: Rows share what they read only with rows of the same salt.
            names: Keys of inputs given instead of tokens, by position; None if nothing identifies them.
            start: The first token on which the adapter is active, after those of the base; None for all.
        """
        if version is None or start is None:
            self._rows[row] = _SharedRow((version, salt), names=names or {})
        else:  # a text of the base, continued by the adapter's own tokens
            self._rows[row] = _SharedRow((None, salt), names=names or {}, start=start, adapter=version.number)
        if names is None:
            self.lose([row])

    def part(self, row: int, kind: str) -> None:
        """Let a row that has read nothing share only with rows of the same kind."""
        version, salt = self._rows[row].root
        if not self._rows[row].text and not isinstance(salt, tuple):
            self._rows[row].root = version, (kind, salt)

    def end(self, row: int, length: int) -> None:
        """Close a row that has read so many tokens."""
        shared = self._at(row, length)
        stop = len(shared.text) if self.cache.keeps_states else self._sharable(shared)
        if self._sharable(shared) >= stop > max(shared.kept, _LEFT):
            self._store(row, shared, stop)
        del self._rows[row]

    def lose(self, rows: Iterable[int]) -> None:
        """Stop sharing rows whose step failed halfway."""
        for row in rows:
            self._rows[row].exact = -1

    def read(self, row: int, length: int, tokens: Sequence[int], proposed: int = 0, *, is_several: bool = True) -> None:
        """Record that a row has read tokens, after so many others."""
        shared = self._at(row, length)
        if proposed:
            self._keep_blocks(row, shared)
        shared.text += shared.named(length, tokens)
        if not is_several and not self._is_float32:
            shared.exact = min(shared.exact, length)
        if self.cache.keeps_states:
            if is_several:
                self._keep_states(row, shared)
        elif not proposed:
            self._keep_blocks(row, shared)

    def _keep_blocks(self, row: int, shared: _SharedRow) -> None:
        whole = (self._sharable(shared) - shared.kept) // BLOCK * BLOCK
        if whole > 0:
            self._store(row, shared, shared.kept + whole)

    def _keep_states(self, row: int, shared: _SharedRow) -> None:
        at = len(shared.text)
        is_chance = at != len(shared.planned) and at not in shared.stops
        if self._sharable(shared) == at > _LEFT and (not is_chance or at - shared.kept >= _APART):
            self._store(row, shared, at, is_chance=is_chance)

    def _store(self, row: int, shared: _SharedRow, stop: int, *, is_chance: bool = False) -> None:
        shared.kept, states = stop, self._states(row)
        self.cache.store(shared.root, shared.text[:stop], self._tensors(row), states, is_chance=is_chance)

    def cut(self, row: int, length: int, count: int) -> int:
        """Return how many of the tokens that a row is about to read go into a step of their own; 0 for no cut."""
        shared = self._at(row, length)
        chance = (len(shared.planned) - _LEFT) // BLOCK * BLOCK
        stops = {*shared.stops, chance} if chance - shared.kept >= _APART else shared.stops
        for stop in sorted(stop for stop in stops if length < stop < length + count):
            if stop - shared.kept < _WORTH:
                continue
            part = (stop - length) // 2 * 2  # quantized products take tokens in pairs
            while part and (count - part) % QUERIES == 1:
                part -= 2
            if part:
                if stop in shared.stops:
                    shared.stops.add(length + part)
                return part
        return 0

    def fill(self, row: int, length: int, tokens: Sequence[int]) -> int:
        """Fill in the cached part of the tokens that a row would read next, without the last ones."""
        shared = self._at(row, length)
        if len(tokens) <= _LEFT or self._sharable(shared) < length:
            return 0
        tokens = shared.named(length, tokens)
        text = known = shared.text + tokens[:-_LEFT]
        if shared.adapter and self.cache.known(shared.root, text) == shared.start - 1:
            known = text[: shared.start - _LEFT]  # the base would read one token alone
        count = self.cache.fill(shared.root, known, length, self._tensors(row), self._states(row)) - length
        shared.text += tokens[:count]
        shared.kept = max(shared.kept, length + count) if count else shared.kept
        if self.cache.keeps_states and len(shared.planned) != length + len(tokens):
            self._plan(shared, text, tokens)
        return count

    def _plan(self, shared: _SharedRow, text: Sequence[int], tokens: Sequence[int]) -> None:
        """Record the tokens that a row is to read, and where its text and others diverge."""
        shared.planned = (*text, *tokens[-_LEFT:])
        others = [other for other in self._rows.values() if other is not shared and other.root == shared.root]
        stops = [(other, common(other.planned[: len(text)], text)) for other in others]
        for reader, stop in [(shared, self.cache.known(shared.root, text)), *stops]:
            if stop >= max(len(reader.text), reader.kept) + _WORTH:
                reader.stops.add(stop)

    def _at(self, row: int, length: int) -> _SharedRow:
        """Return a row that has read so many tokens, perhaps fewer than before."""
        shared = self._rows[row]
        del shared.text[length:]
        shared.kept = min(shared.kept, length)
        return shared

    def _sharable(self, shared: _SharedRow) -> int:
        return min(len(shared.text), shared.exact)

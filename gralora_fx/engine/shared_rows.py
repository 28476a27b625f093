"""The rows of a decoder that share what they have read, through a prefix cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gralora_fx.engine.prefix_cache import BLOCK, PrefixCache

_LEFT = 2  # tokens that a row reads itself, at least


@dataclass
class _SharedRow:
    """A row that is open.

    Attributes:
        root: The version of its adapter, and its salt.
        text: The tokens that it has read, or that were filled in.
        kept: How many of them are in the cache, or were when they were put there.
        exact: Up to which of them all were read several in a step.
    """

    root: tuple[Any, str | None]
    text: list[int] = field(default_factory=list)
    kept: int = 0
    exact: int = 2**62


class SharedRows:
    """Puts into a prefix cache what rows read, and fills in from it what they would read next.

    The keys and values of a token are the same bits however many tokens a row reads in a step, as long as it reads
    several: a product with one row of values is summed up in another order. In float32 that changes the last digits;
    where values are rounded, to eight bits or to halves, it changes more. There what followed a step of one token is
    left out, so that an answer is the one that is given without a cache. A prompt is never read by one token (see
    `part_length`), so the next turn of a chat reads the answer as a part of its prompt, once.
    """

    def __init__(self, cache: PrefixCache, tensors: Callable[[int], Sequence[Tensor]], *, is_float32: bool) -> None:
        """Begin without rows.

        Args:
            cache: The cache.
            tensors: The cache of a row by its number, `[heads, positions, size]`.
            is_float32: Whether nothing in the model is rounded to fewer bits.
        """
        self.cache, self._tensors, self._is_float32 = cache, tensors, is_float32
        self._rows: dict[int, _SharedRow] = {}

    def begin(self, row: int, version: Any, salt: str | None) -> None:
        """A row is opened.

        Args:
            row: Its number.
            version: The version of its adapter; None for the base.
            salt: What keeps it apart from rows with another one.
        """
        self._rows[row] = _SharedRow((version, salt))

    def end(self, row: int, length: int) -> None:
        """A row is closed that has read so many tokens."""
        shared = self._at(row, length)
        if (stop := self._sharable(shared)) > max(shared.kept, _LEFT):
            self.cache.store(shared.root, shared.text[:stop], self._tensors(row))
        del self._rows[row]

    def read(self, row: int, length: int, tokens: Sequence[int], drafts: int = 0, *, is_several: bool = True) -> None:
        """A row has read tokens, after so many others.

        Args:
            row: Its number.
            length: How many tokens it had read before.
            tokens: The tokens.
            drafts: How many of them, at the end, the row may not keep.
            is_several: Whether they were read as several tokens are.
        """
        shared = self._at(row, length)
        if drafts:
            self._keep_blocks(row, shared)
        shared.text += tokens
        if not is_several:
            shared.exact = min(shared.exact, length)
        if not drafts:
            self._keep_blocks(row, shared)

    def _keep_blocks(self, row: int, shared: _SharedRow) -> None:
        whole = (self._sharable(shared) - shared.kept) // BLOCK * BLOCK
        if whole > 0:
            shared.kept += whole
            self.cache.store(shared.root, shared.text[: shared.kept], self._tensors(row))

    def fill(self, row: int, length: int, tokens: Sequence[int]) -> int:
        """Fill in what is known of the tokens that a row would read next, without the last ones.

        Args:
            row: The row's number.
            length: How many tokens it has read.
            tokens: The tokens.

        Returns:
            How many of them it need not read.
        """
        shared = self._at(row, length)
        if len(tokens) <= _LEFT or self._sharable(shared) < length:
            return 0
        text = shared.text + list(tokens[:-_LEFT])
        count = self.cache.fill(shared.root, text, length, self._tensors(row)) - length
        shared.text += tokens[:count]
        shared.kept = max(shared.kept, length + count) if count else shared.kept
        return count

    def _at(self, row: int, length: int) -> _SharedRow:
        """A row that has read so many tokens, maybe fewer than before."""
        shared = self._rows[row]
        del shared.text[length:]
        shared.kept = min(shared.kept, length)
        return shared

    def _sharable(self, shared: _SharedRow) -> int:
        return len(shared.text) if self._is_float32 else min(len(shared.text), shared.exact)

"""The prefix cache: keys and values of tokens that rows have read, for other rows whose text begins alike.

Blocks are the nodes of a radix tree. Each has up to `BLOCK` tokens, which follow those of the blocks above it, and the
keys and values of these tokens at their positions. Every version of an adapter, and every salt, has a tree of its own:
what one adapter computed is never found by another, nor by a later adapter of the same name.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias
from weakref import WeakSet

import torch
from torch import Tensor

from gralora_fx.errors import ServingError

BLOCK = 64  # most tokens of a block
_OVERHEAD, _OF_TOKEN = 2048, 40  # bytes of a block, and of each of its tokens, beside keys and values
_ALIGNMENT = 16  # bytes
_Root: TypeAlias = tuple[Any, str | None]  # the version of an adapter, None for the base; and the salt


class PrefixCacheError(ServingError):
    """Rows of a decoder cannot share what they read, or there is too little memory for it."""


class _Block:
    """Tokens that follow those of the blocks above.

    Attributes:
        tokens: The tokens; none of a root.
        values: Their keys and values, one tensor of the model's cache after the other.
        above: What they follow; None of a root.
        below: The blocks that follow, by their first token.
        root: Of a root, what its tree is of.
    """

    __slots__ = ("above", "below", "root", "tokens", "values")

    def __init__(
        self, tokens: tuple[int, ...], values: Tensor, above: _Block | None, root: _Root = (None, None)
    ) -> None:
        self.tokens, self.values, self.above, self.root = tokens, values, above, root
        self.below: dict[int, _Block] = {}

    @property
    def size(self) -> int:
        """Bytes."""
        return _OVERHEAD + _OF_TOKEN * len(self.tokens) + self.values.nbytes


class PrefixCache:
    """Blocks within a bound of bytes; for a new one those go that were not used for longest.

    Keys and values are copied in and out, so a row never shares memory with a block. Any thread may use it.

    Attributes:
        limit: The most bytes.
        evictions: How many blocks made room for others.
    """

    def __init__(self, limit: int, like: Sequence[Tensor]) -> None:
        """Begin without blocks.

        Args:
            limit: The most bytes.
            like: What a row's cache is, tensors `[heads, positions, size]` on the CPU.

        Raises:
            PrefixCacheError: There is no room for one block.
        """
        self._like = [(tensor.shape[0], tensor.shape[2], tensor.dtype) for tensor in like]
        block = _OVERHEAD + BLOCK * _OF_TOKEN + self._bytes(BLOCK)
        if limit < block:
            raise PrefixCacheError(
                f"prefix_cache={limit} has no room for a block of {BLOCK} tokens, which takes {block} bytes of this "
                "model; give more, or none"
            )
        self.limit, self.evictions = limit, 0
        self._bytes_used = 0
        self._roots: dict[_Root, _Block] = {}
        self._recent: OrderedDict[_Block, None] = OrderedDict()  # the last used at the end, each after those below it
        self._gone: WeakSet[Any] = WeakSet()  # versions of adapters
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        """How many bytes the blocks take."""
        return self._bytes_used

    def __len__(self) -> int:
        """How many blocks there are."""
        return len(self._recent)

    def fill(self, root: _Root, tokens: Sequence[int], start: int, row: Sequence[Tensor]) -> int:
        """Copy what is known of a text into the cache of a row, from a position on.

        Args:
            root: The version of the row's adapter, and the salt.
            tokens: The text, up to the last token that may be filled in.
            start: How many of the tokens the row has already.
            row: The row's cache, `[heads, positions, size]`.

        Returns:
            How many of the tokens the row has now.
        """
        with self._lock:
            at, last = 0, None
            for block, count in self._path(root, tokens):
                if at + count > start:
                    skip = max(start - at, 0)
                    for own, known in zip(row, self._tensors(block.values, len(block.tokens)), strict=True):
                        own[:, at + skip : at + count].copy_(known[:, skip:count])
                at, last = at + count, block
            self._use(last)
            return max(at, start)

    def store(self, root: _Root, tokens: Sequence[int], row: Sequence[Tensor]) -> None:
        """Keep what a row has read, as far as there is room.

        Args:
            root: The version of the row's adapter, and the salt; nothing is kept for a version that is gone.
            tokens: Its text.
            row: Its cache, `[heads, positions, size]`.
        """
        with self._lock:
            if root[0] is not None and root[0] in self._gone:
                return
            top = self._roots.get(root) or _Block((), torch.empty(0), None, root)
            block, at = top, 0
            while at < len(tokens):
                below = block.below.get(tokens[at])
                if below is None:
                    below = self._add(block, tuple(tokens[at : at + BLOCK]), at, row)
                    if below is None:
                        break
                else:
                    count = _common(below.tokens, tokens[at : at + BLOCK])
                    if count < len(below.tokens) and at + count < len(tokens):
                        self._split(below, count)
                block, at = below, at + len(below.tokens)
            self._use(block)
            self._make_room(0, block)  # that a block in two parts takes
            if top.below:
                self._roots[root] = top

    def drop(self, version: Any) -> None:
        """Free the blocks of a version of an adapter, for good.

        Args:
            version: The version, which no row that is opened from now on has.
        """
        with self._lock:
            self._gone.add(version)
            for root in [root for root in self._roots if root[0] is version]:
                blocks = [self._roots.pop(root)]
                while blocks:
                    block = blocks.pop()
                    blocks += block.below.values()
                    if block.above is not None:
                        del self._recent[block]
                        self._bytes_used -= block.size

    def _path(self, root: _Root, tokens: Sequence[int]) -> Iterator[tuple[_Block, int]]:
        """The blocks that a text begins with, and how many tokens of each it has: all, but maybe of the last."""
        block, at = self._roots.get(root), 0
        while block is not None and at < len(tokens):
            block = block.below.get(tokens[at])
            if block is not None:
                count = _common(block.tokens, tokens[at : at + BLOCK])
                yield block, count
                if count < len(block.tokens):
                    return
                at += count

    def _add(self, above: _Block, tokens: tuple[int, ...], at: int, row: Sequence[Tensor]) -> _Block | None:
        """A new block below another; None if there is no room beside those above it."""
        length = self._bytes(len(tokens))
        self._use(above)
        if not self._make_room(_OVERHEAD + _OF_TOKEN * len(tokens) + length, above):
            return None
        try:
            values = torch.empty(length, dtype=torch.uint8)
        except (MemoryError, RuntimeError):  # torch's own error for the same
            return None
        for known, own in zip(self._tensors(values, len(tokens)), row, strict=True):
            known.copy_(own[:, at : at + len(tokens)])
        block = above.below[tokens[0]] = _Block(tokens, values, above)
        self._recent[block] = None
        self._bytes_used += block.size
        self._use(above)
        return block

    def _split(self, block: _Block, count: int) -> None:
        """Let a block have its first tokens alone, and a new one below it the others."""
        parts: list[tuple[tuple[int, ...], Tensor]] = []
        for tokens in (block.tokens[:count], block.tokens[count:]):
            values = torch.empty(self._bytes(len(tokens)), dtype=torch.uint8)
            start = len(parts) * count
            whole = self._tensors(block.values, len(block.tokens))
            for part, known in zip(self._tensors(values, len(tokens)), whole, strict=True):
                part.copy_(known[:, start : start + len(tokens)])
            parts.append((tokens, values))
        self._bytes_used -= block.size
        rest = _Block(*parts[1], block)
        rest.below, block.below = block.below, {rest.tokens[0]: rest}
        for below in rest.below.values():
            below.above = rest
        block.tokens, block.values = parts[0]
        self._bytes_used += block.size + rest.size
        self._recent[rest] = None
        self._use(rest)

    def _use(self, block: _Block | None) -> None:
        """A block and all above it were used now."""
        while block is not None and block.above is not None:
            self._recent.move_to_end(block)
            block = block.above

    def _make_room(self, size: int, last: _Block) -> bool:
        """Let blocks go until there is room; returns whether there is, beside the path to one that was just used."""
        while self._bytes_used + size > self.limit:
            oldest = next(iter(self._recent), None)
            if oldest is None or any(oldest is block for block in _upwards(last)):
                return False
            assert oldest.above is not None
            assert not oldest.below
            del self._recent[oldest]
            del oldest.above.below[oldest.tokens[0]]
            self._bytes_used -= oldest.size
            self.evictions += 1
            if oldest.above.above is None and not oldest.above.below:
                self._roots.pop(oldest.above.root, None)
        return True

    def _bytes(self, count: int) -> int:
        """Bytes of the keys and values of some tokens."""
        return sum(_aligned(heads * count * size * dtype.itemsize) for heads, size, dtype in self._like)

    def _tensors(self, values: Tensor, count: int) -> Iterator[Tensor]:
        """The tensors of a block of some tokens, `[heads, count, size]`."""
        at = 0
        for heads, size, dtype in self._like:
            length = heads * count * size * dtype.itemsize
            yield values[at : at + length].view(dtype).view(heads, count, size)
            at += _aligned(length)


def _aligned(length: int) -> int:
    return -(-length // _ALIGNMENT) * _ALIGNMENT


def _upwards(block: _Block | None) -> Iterator[_Block]:
    while block is not None:
        yield block
        block = block.above


def _common(known: Sequence[int], tokens: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    if known == tuple(tokens):
        return len(known)
    pairs = enumerate(zip(known, tokens, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(known), len(tokens)))

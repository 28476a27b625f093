"""The prefix cache: keys and values of tokens that rows have read, for other rows whose text begins alike.

Blocks are the nodes of a radix tree. Each has up to `BLOCK` tokens, which follow those of the blocks above it, and the
keys and values of these tokens at their positions. Every version of an adapter, and every salt, has its own tree: a
result of one adapter is never found by another, nor by a later adapter of the same name.

States cannot be set back to those after fewer tokens. If a model has states, a block may have a snapshot of them after
its last token, and a text can be continued only from a snapshot. As in Marconi (Pan et al., 2024,
https://arxiv.org/abs/2411.19379), snapshots are taken where a text ends, and where two texts diverge.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Container, Iterator, Sequence
from itertools import chain
from typing import Any
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from gralora_fx.errors import ServingError, option
from gralora_fx.run.engine.prefix_blocks import (
    BLOCK,
    OF_TOKEN,
    OVERHEAD,
    Arrays,
    Bytes,
    Kind,
    Root,
    TokenBlock,
    common,
    length_of,
    owner_of,
    unpacked,
    upwards,
)


class PrefixCacheError(ServingError):
    """Rows of a decoder cannot share what they read, or there is too little memory for it."""


class PrefixCache:
    """Blocks within a limit of bytes; the least recently used ones are evicted for new ones.

    If the model has states, snapshots are evicted, first the tentative ones that no text has continued from; a block
    is removed with the last snapshot below it.

    Keys, values and states are copied in and out, so a row never shares memory with a block. Any thread may use it.

    Attributes:
        limit: The most bytes.
        room: The most bytes now: rows in limited memory need the rest.
        evictions: The number of blocks, or snapshots, evicted.
    """

    def __init__(self, limit: int, like: Arrays, states: Arrays = ()) -> None:
        """Start without blocks.

        Args:
            limit: The most bytes.
            like: A row's keys and values, arrays `[heads, positions, size]`, for shapes and dtypes.
            states: Its states, likewise; empty for a model without any.
        """
        self._like = [(array.shape[0], array.shape[2], array.dtype) for array in like]
        self._states: list[Kind] = [(array.shape, array.dtype) for array in states]
        block = OVERHEAD + BLOCK * OF_TOKEN + length_of(self._kinds(BLOCK)) + length_of(self._states)
        if limit < block:
            what = f"{BLOCK} tokens and the states after it" if states else f"{BLOCK} tokens"
            raise PrefixCacheError(
                f"{option(prefix_cache=limit)} has no room for a block of {what}, which takes {block} bytes of this "
                "model; give more, or none"
            )
        self.limit, self.room, self.evictions = limit, limit, 0
        self._bytes_used = self._count = 0
        self._roots: dict[Root, TokenBlock] = {}
        # points where a text may continue, least recently used first: blocks, each after those below it, or snapshots
        self._recent: OrderedDict[TokenBlock, None] = OrderedDict()
        self._chances: OrderedDict[TokenBlock, None] = OrderedDict()  # with a snapshot that no text has continued from
        self._gone: WeakSet[Any] = WeakSet()  # versions of adapters
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        """Bytes of the blocks."""
        return self._bytes_used

    def __len__(self) -> int:
        """Return the number of blocks."""
        return self._count

    @property
    def snapshots(self) -> int:
        """The number of snapshots of states."""
        return len(self._recent) + len(self._chances) if self._states else 0

    @property
    def keeps_states(self) -> bool:
        """True if texts can be continued from snapshots of states only."""
        return bool(self._states)

    def known(self, root: Root, tokens: Sequence[int]) -> int:
        """Return the length of a text's cached prefix, whether or not a text can be continued there."""
        with self._lock:
            return sum(count for _, count in self._path(root, tokens))

    def fill(self, root: Root, tokens: Sequence[int], start: int, row: Arrays, states: Arrays = ()) -> int:
        """Copy the cached part of a text into the cache of a row, from a position on.

        Args:
            root: The version of the row's adapter, and the salt.
            tokens: The text, up to the last token that may be filled in.
            start: How many of the tokens the row has already.
            row: The row's keys and values, `[heads, positions, size]`.
            states: Its states, which are overwritten by a snapshot's if there is one after `start`.
        """
        with self._lock:
            path = list(self._path(root, tokens))
            while self._states and path and (path[-1][0].states is None or path[-1][1] < len(path[-1][0].tokens)):
                path.pop()
            at, last = 0, path[-1][0] if path else None
            if self._bytes_used > self.room and not self._makes_room_beside(last):
                return start
            for block, count in path:
                if at + count > start:
                    skip = max(start - at, 0)
                    for own, known in zip(row, self._tensors(block), strict=True):
                        own[:, at + skip : at + count] = known[:, skip:count]
                at += count
            if at > start and last is not None and last.states is not None:
                for own, known in zip(states, unpacked(last.states, self._states), strict=True):
                    own[...] = known
                self._keep(last)
            self._use(last)
            return max(at, start)

    def store(
        self, root: Root, tokens: Sequence[int], row: Arrays, states: Arrays = (), *, is_chance: bool = False
    ) -> None:
        """Store a row's tokens as far as there is room, or for a model with states all or none of them.

        Args:
            root: The version of the row's adapter, and the salt; nothing is stored for a version that was unloaded.
            tokens: Its text.
            row: Its keys and values, `[heads, positions, size]`.
            states: Its states, after the text.
            is_chance: Whether the snapshot is tentative, since no text is known to continue there; it evicts only
                other tentative ones.
        """
        with self._lock:
            owner = owner_of(tokens[-1]) if tokens else 0
            if any(each is root[0] or (owner and owner == getattr(each, "number", 0)) for each in self._gone):
                return
            if self._states and length_of(self._kinds(len(tokens))) + length_of(self._states) > self.room:
                return
            top = self._roots.get(root) or TokenBlock((), np.empty(0, np.uint8), None, root)
            block, at = top, 0
            while at < len(tokens):
                below = block.below.get(tokens[at])
                if below is None:
                    below = self._add(block, tuple(tokens[at : at + BLOCK]), at, row, is_chance=is_chance)
                    if below is None:
                        break
                else:
                    count = common(below.tokens, tokens[at : at + BLOCK])
                    if count < len(below.tokens) and (self._states or at + count < len(tokens)):
                        below = self._split(below, count)
                block, at = below, at + len(below.tokens)
            if self._states:
                if at == len(tokens):
                    self._take(block, states, is_chance=is_chance)
                self._prune(block)
            self._use(block)
            self._make_room(0, None if self._states else block)  # that a block in two parts takes
            if top.below:
                self._roots[root] = top

    def shrink(self) -> None:
        """Free the blocks for which there is no room now."""
        with self._lock:
            self._make_room(0, None)

    def drop(self, version: Any) -> None:
        """Free the blocks of an adapter's version, and store none of it again."""
        with self._lock:
            self._gone.add(version)
            number = getattr(version, "number", None)
            for root in [root for root in self._roots if root[0] is version]:
                self._free(self._roots.pop(root))
            waiting = list(self._roots.values())
            while waiting:
                block = waiting.pop()
                if block.above is not None and owner_of(block.tokens[-1]) == number:
                    del block.above.below[block.tokens[0]]
                    self._free(block)
                    self._prune(block.above)
                else:
                    waiting += block.below.values()

    def _free(self, block: TokenBlock) -> None:
        """Free a block and all below it."""
        blocks = [block]
        while blocks:
            block = blocks.pop()
            blocks += block.below.values()
            if block.above is not None:
                self._recent.pop(block, None)
                self._chances.pop(block, None)
                self._bytes_used -= block.size
                self._count -= 1

    def _path(self, root: Root, tokens: Sequence[int]) -> Iterator[tuple[TokenBlock, int]]:
        """Yield the blocks that a text begins with, each with its number of equal tokens (all but in the last)."""
        block, at = self._roots.get(root), 0
        while block is not None and at < len(tokens):
            block = block.below.get(tokens[at])
            if block is not None:
                count = common(block.tokens, tokens[at : at + BLOCK])
                yield block, count
                if count < len(block.tokens):
                    return
                at += count

    def _add(
        self, above: TokenBlock, tokens: tuple[int, ...], at: int, row: Arrays, *, is_chance: bool
    ) -> TokenBlock | None:
        """Add a block below another; return it, or None if there is no room beside those above it."""
        kinds = self._kinds(len(tokens))
        self._use(above)
        values = self._memory(kinds, above, OVERHEAD + OF_TOKEN * len(tokens), is_chance=is_chance)
        if values is None:
            return None
        for known, own in zip(unpacked(values, kinds), row, strict=True):
            known[...] = own[:, at : at + len(tokens)]
        block = above.below[tokens[0]] = TokenBlock(tokens, values, above)
        self._count += 1
        self._bytes_used += block.size
        if not self._states:
            self._recent[block] = None
        self._use(above)
        return block

    def _take(self, block: TokenBlock, states: Arrays, *, is_chance: bool) -> None:
        """Give a block a snapshot, if there is room."""
        if block.states is None:
            block.states = self._memory(self._states, block, 0, is_chance=is_chance)
            if block.states is None:
                return
            self._bytes_used += block.states.nbytes
            self._chances[block] = None
            for known, own in zip(unpacked(block.states, self._states), states, strict=True):
                known[...] = own
        if not is_chance:
            self._keep(block)

    def _keep(self, block: TokenBlock) -> None:
        """Mark a block's snapshot as used: a text continues from it, or ends there."""
        self._chances.pop(block, None)
        self._recent[block] = None
        self._recent.move_to_end(block)

    def _memory(self, kinds: Sequence[Kind], last: TokenBlock, more: int, *, is_chance: bool) -> Bytes | None:
        """Allocate room for arrays and some more bytes, beside the path to a block; return None if there is none."""
        length = length_of(kinds)
        if not self._make_room(length + more, last, is_chance=is_chance):
            return None
        try:
            return np.empty(length, np.uint8)
        except MemoryError:
            return None

    def _split(self, block: TokenBlock, count: int) -> TokenBlock:
        """Split a block before its last tokens; return the new block above it, with the first ones."""
        assert block.above is not None
        parts: list[tuple[tuple[int, ...], Bytes]] = []
        for tokens in (block.tokens[:count], block.tokens[count:]):
            kinds, start = self._kinds(len(tokens)), len(parts) * count
            values = np.empty(length_of(kinds), np.uint8)
            for part, known in zip(unpacked(values, kinds), self._tensors(block), strict=True):
                part[...] = known[:, start : start + len(tokens)]
            parts.append((tokens, values))
        self._bytes_used -= block.size
        first = block.above.below[block.tokens[0]] = TokenBlock(*parts[0], block.above)
        block.tokens, block.values = parts[1]
        block.above, first.below = first, {block.tokens[0]: block}
        self._bytes_used += first.size + block.size
        self._count += 1
        if not self._states:
            self._recent[first] = None
            self._use(first)
        return first

    def _use(self, block: TokenBlock | None) -> None:
        """Mark a block and all above it as used; with states, only snapshots are marked (see `_keep`)."""
        while not self._states and block is not None and block.above is not None:
            self._recent.move_to_end(block)
            block = block.above

    def _makes_room_beside(self, last: TokenBlock | None) -> bool:
        """Free blocks until the others have room; return whether those on the path to a block are left."""
        self._use(last)
        if last is not None and last.states is not None:
            self._keep(last)
        is_whole = self._make_room(0, last)
        return is_whole and (last is None or not self._states or last.states is not None)

    def _make_room(self, size: int, last: TokenBlock | None, *, is_chance: bool = False) -> bool:
        """Evict blocks until there is room; return whether there is, beside the path to one that was just used."""
        path = set(upwards(last)) if self._bytes_used + size > self.room else set[TokenBlock]()
        while self._bytes_used + size > self.room:
            oldest = next(chain(self._chances, () if is_chance else self._recent), None)
            if oldest is None or (oldest in path and oldest.states is None):
                return False
            self._recent.pop(oldest, None)
            self._chances.pop(oldest, None)
            if oldest.states is not None:
                self._bytes_used -= oldest.states.nbytes
                oldest.states = None
            self.evictions += 1
            self._prune(oldest, path)
        return True

    def _prune(self, block: TokenBlock, path: Container[TokenBlock] = ()) -> None:
        """Remove a block, and those above it, while no text can be continued from it and none is below it."""
        kept: tuple[Container[TokenBlock], ...] = (self._recent, self._chances, path)
        while block.above is not None and not block.below and not any(block in some for some in kept):
            above = block.above
            del above.below[block.tokens[0]]
            self._bytes_used -= block.size
            self._count -= 1
            if above.above is None and not above.below:
                self._roots.pop(above.root, None)
            block = above

    def _kinds(self, count: int) -> list[Kind]:
        """Return shapes and dtypes of the keys and values of some tokens."""
        return [((heads, count, size), dtype) for heads, size, dtype in self._like]

    def _tensors(self, block: TokenBlock) -> Iterator[NDArray[Any]]:
        """Yield the keys and values of a block, `[heads, tokens, size]`."""
        return unpacked(block.values, self._kinds(len(block.tokens)))

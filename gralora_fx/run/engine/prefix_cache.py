"""The prefix cache: keys and values of tokens that rows have read, for other rows whose text begins alike.

Blocks are the nodes of a radix tree. Each has up to `BLOCK` tokens, which follow those of the blocks above it, and the
keys and values of these tokens at their positions. Every version of an adapter, and every salt, has a tree of its own:
what one adapter computed is never found by another, nor by a later adapter of the same name.

Layers that keep states cannot tell what they were after fewer tokens. Of such a model a block may have a snapshot of
the states after its last token, and a text goes on from a snapshot alone. Where snapshots are taken follows Marconi
(Pan et al., 2024, https://arxiv.org/abs/2411.19379): where a text ends, and where two texts part.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Container, Iterator, Sequence
from itertools import chain
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from gralora_fx.errors import ServingError, option
from gralora_fx.run.engine.prefix_blocks import (
    BLOCK,
    OF_TOKEN,
    OVERHEAD,
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
    """Blocks within a bound of bytes; for a new one those go that were not used for longest.

    Of a model with states the snapshots go, first those that were taken on the chance that a text may go on from them
    and that none has; a block goes with the last snapshot that it leads to.

    Keys, values and states are copied in and out, so a row never shares memory with a block. Any thread may use it.

    Attributes:
        limit: The most bytes.
        room: The most bytes now: rows of a bounded memory need the rest.
        evictions: How many blocks, or snapshots, made room for others.
    """

    def __init__(self, limit: int, like: Sequence[Tensor], states: Sequence[Tensor] = ()) -> None:
        """Begin without blocks.

        Args:
            limit: The most bytes.
            like: What a row's keys and values are, tensors `[heads, positions, size]` on the CPU.
            states: What its states are; none of a model that has none.
        """
        self._like = [(tensor.shape[0], tensor.shape[2], tensor.dtype) for tensor in like]
        self._states: list[Kind] = [(tuple(tensor.shape), tensor.dtype) for tensor in states]
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
        # where a text may go on, the last used at the end: blocks, each after those below it, or those with a snapshot
        self._recent: OrderedDict[TokenBlock, None] = OrderedDict()
        self._chances: OrderedDict[TokenBlock, None] = OrderedDict()  # with a snapshot from which none has gone on yet
        self._gone: WeakSet[Any] = WeakSet()  # versions of adapters
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        """How many bytes the blocks take."""
        return self._bytes_used

    def __len__(self) -> int:
        """How many blocks there are."""
        return self._count

    @property
    def snapshots(self) -> int:
        """How many snapshots of states there are."""
        return len(self._recent) + len(self._chances) if self._states else 0

    @property
    def keeps_states(self) -> bool:
        """Whether texts go on from snapshots of states alone."""
        return bool(self._states)

    def known(self, root: Root, tokens: Sequence[int]) -> int:
        """How many tokens of a text are those of another one, whether or not a text can go on from there."""
        with self._lock:
            return sum(count for _, count in self._path(root, tokens))

    def fill(
        self, root: Root, tokens: Sequence[int], start: int, row: Sequence[Tensor], states: Sequence[Tensor] = ()
    ) -> int:
        """Copy what is known of a text into the cache of a row, from a position on.

        Args:
            root: The version of the row's adapter, and the salt.
            tokens: The text, up to the last token that may be filled in.
            start: How many of the tokens the row has already.
            row: The row's keys and values, `[heads, positions, size]`.
            states: Its states, which become those of a snapshot if there is one after `start`.
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
                        own[:, at + skip : at + count].copy_(known[:, skip:count])
                at += count
            if at > start and last is not None and last.states is not None:
                for own, known in zip(states, unpacked(last.states, self._states), strict=True):
                    own.copy_(known)
                self._keep(last)
            self._use(last)
            return max(at, start)

    def store(
        self,
        root: Root,
        tokens: Sequence[int],
        row: Sequence[Tensor],
        states: Sequence[Tensor] = (),
        *,
        is_chance: bool = False,
    ) -> None:
        """Keep what a row has read: of a model with states all or nothing, else as far as there is room.

        Args:
            root: The version of the row's adapter, and the salt; nothing is kept for a version that is gone.
            tokens: Its text.
            row: Its keys and values, `[heads, positions, size]`.
            states: Its states, after the text.
            is_chance: Whether no text is known to go on from there, so that nothing else makes room for it than what
                is a chance, too.
        """
        with self._lock:
            owner = owner_of(tokens[-1]) if tokens else 0
            if any(each is root[0] or (owner and owner == getattr(each, "number", 0)) for each in self._gone):
                return
            if self._states and length_of(self._kinds(len(tokens))) + length_of(self._states) > self.room:
                return
            top = self._roots.get(root) or TokenBlock((), torch.empty(0), None, root)
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
        """Free the blocks of a version of an adapter, for good."""
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
        """The blocks that a text begins with, and how many tokens of each it has: all, but maybe of the last."""
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
        self, above: TokenBlock, tokens: tuple[int, ...], at: int, row: Sequence[Tensor], *, is_chance: bool
    ) -> TokenBlock | None:
        """A new block below another; None if there is no room beside those above it."""
        kinds = self._kinds(len(tokens))
        self._use(above)
        values = self._memory(kinds, above, OVERHEAD + OF_TOKEN * len(tokens), is_chance=is_chance)
        if values is None:
            return None
        for known, own in zip(unpacked(values, kinds), row, strict=True):
            known.copy_(own[:, at : at + len(tokens)])
        block = above.below[tokens[0]] = TokenBlock(tokens, values, above)
        self._count += 1
        self._bytes_used += block.size
        if not self._states:
            self._recent[block] = None
        self._use(above)
        return block

    def _take(self, block: TokenBlock, states: Sequence[Tensor], *, is_chance: bool) -> None:
        """Let a block have a snapshot, if there is room."""
        if block.states is None:
            block.states = self._memory(self._states, block, 0, is_chance=is_chance)
            if block.states is None:
                return
            self._bytes_used += block.states.nbytes
            self._chances[block] = None
            for known, own in zip(unpacked(block.states, self._states), states, strict=True):
                known.copy_(own)
        if not is_chance:
            self._keep(block)

    def _keep(self, block: TokenBlock) -> None:
        """A text goes on from a block's snapshot, or ends there."""
        self._chances.pop(block, None)
        self._recent[block] = None
        self._recent.move_to_end(block)

    def _memory(self, kinds: Sequence[Kind], last: TokenBlock, more: int, *, is_chance: bool) -> Tensor | None:
        """Room for tensors and some more bytes, beside the path to a block; None if there is none."""
        length = length_of(kinds)
        if not self._make_room(length + more, last, is_chance=is_chance):
            return None
        try:
            return torch.empty(length, dtype=torch.uint8)
        except (MemoryError, RuntimeError):  # torch's own error for the same
            return None

    def _split(self, block: TokenBlock, count: int) -> TokenBlock:
        """Let a block have its last tokens alone, and a new one above it, which is returned, the first."""
        assert block.above is not None
        parts: list[tuple[tuple[int, ...], Tensor]] = []
        for tokens in (block.tokens[:count], block.tokens[count:]):
            kinds, start = self._kinds(len(tokens)), len(parts) * count
            values = torch.empty(length_of(kinds), dtype=torch.uint8)
            for part, known in zip(unpacked(values, kinds), self._tensors(block), strict=True):
                part.copy_(known[:, start : start + len(tokens)])
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
        """A block and all above it were used now; of a model with states that is said of the snapshot alone."""
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
        """Let blocks go until there is room; returns whether there is, beside the path to one that was just used."""
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
        """Let a block go, and those above it, as long as no text can go on from it nor is below it."""
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
        """The keys and values of some tokens."""
        return [((heads, count, size), dtype) for heads, size, dtype in self._like]

    def _tensors(self, block: TokenBlock) -> Iterator[Tensor]:
        """The keys and values of a block, `[heads, tokens, size]`."""
        return unpacked(block.values, self._kinds(len(block.tokens)))

"""Blocks of tokens in the tree of a prefix cache, and arrays packed in consecutive bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

BLOCK = 64  # most tokens of a block
OVERHEAD, OF_TOKEN = 2048, 40  # bytes of a block, and of each of its tokens, beside keys, values and states
_ALIGNMENT = 16  # bytes
_NUMBER = 256  # bits of a token or its key; the higher bits are the number of the adapter that reads it
Arrays: TypeAlias = Sequence[NDArray[Any]]
Bytes: TypeAlias = NDArray[np.uint8]
Kind: TypeAlias = tuple[tuple[int, ...], np.dtype[Any]]  # of an array: its shape and dtype
Root: TypeAlias = tuple[Any, str | None]  # the version of an adapter, None for the base; and the salt


class TokenBlock:
    """Tokens that follow those of the blocks above.

    Attributes:
        tokens: The tokens; none of a root.
        values: Their keys and values, the arrays of the model's cache packed in order.
        states: The states after them, packed likewise; None without a snapshot.
        above: The block that they follow; None of a root.
        below: The blocks that follow, by their first token.
        root: Of a root, the key of its tree.
    """

    __slots__ = ("above", "below", "root", "states", "tokens", "values")

    def __init__(
        self, tokens: tuple[int, ...], values: NDArray[np.uint8], above: TokenBlock | None, root: Root = (None, None)
    ) -> None:
        """Start without blocks below."""
        self.tokens, self.values, self.above, self.root = tokens, values, above, root
        self.below: dict[int, TokenBlock] = {}
        self.states: NDArray[np.uint8] | None = None

    @property
    def size(self) -> int:
        """Bytes."""
        states = 0 if self.states is None else self.states.nbytes
        return OVERHEAD + OF_TOKEN * len(self.tokens) + self.values.nbytes + states


def length_of(kinds: Iterable[Kind]) -> int:
    """Return the bytes of packed arrays."""
    return sum(_aligned(math.prod(shape) * dtype.itemsize) for shape, dtype in kinds)


def unpacked(values: NDArray[np.uint8], kinds: Iterable[Kind]) -> Iterator[NDArray[Any]]:
    """Yield the arrays packed in bytes, in order."""
    at = 0
    for shape, dtype in kinds:
        length = math.prod(shape) * dtype.itemsize
        yield values[at : at + length].view(dtype).reshape(shape)
        at += _aligned(length)


def _aligned(length: int) -> int:
    return -(-length // _ALIGNMENT) * _ALIGNMENT


def upwards(block: TokenBlock | None) -> Iterator[TokenBlock]:
    """Yield a block and those above it."""
    while block is not None:
        yield block
        block = block.above


def owned(token: int, number: int) -> int:
    """Return the key of a token that an adapter reads after those of the base."""
    return token + (number << _NUMBER)


def owner_of(token: int) -> int:
    """Return the number of the adapter that reads a token after those of the base; 0 for the base."""
    return token >> _NUMBER


def common(known: Sequence[int], tokens: Sequence[int]) -> int:
    """Return the length of the common prefix of two texts."""
    if known == tuple(tokens):
        return len(known)
    pairs = enumerate(zip(known, tokens, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(known), len(tokens)))

"""Rows whose adapter becomes active at a token, or whose text grows longer than a rotary embedding is for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gralora_fx.errors import ServingError, shown
from gralora_fx.run.engine.limits import part_length

if TYPE_CHECKING:
    from gralora_fx.run.engine.adapters import Adapters
    from gralora_fx.run.engine.shared_rows import SharedRows
    from gralora_fx.run.engine.text_lengths import TextLengths


class StartedRows:
    """Rows that know the token at which their adapters become active."""

    _adapters: Adapters

    @cached_property
    def _starts(self) -> dict[int, int]:
        return {}

    def start(self, row: int) -> int | None:
        """Return how many of a row's tokens the base reads before its adapter is active; None if that was not given."""
        return self._starts.get(row)

    def start_of(self, adapter: str | None, tokens: Sequence[int]) -> int | None:
        """Return how many tokens of a prompt the base reads before an adapter is active, for `open`.

        Args:
            adapter: The adapter; None for the base.
            tokens: The prompt.

        Returns:
            The number; None for an adapter that is always active.

        Raises:
            NotInvokedError: The prompt lacks the tokens that activate the adapter.
        """
        return None if adapter is None else self._adapters[adapter].start_in(tokens)

    def acts(self, row: int, length: int) -> bool:
        """Return whether a row's adapter is active on the token after `length` others."""
        return length >= self._starts.get(row, 0)

    def _begin_at(self, row: int, adapter: str | None, start: int | None) -> None:
        """Record where the adapter of a row that is opened becomes active."""
        self._starts.pop(row, None)
        if start is None:
            if adapter is not None:
                self._adapters[adapter].check_acts_everywhere("a row that does not say from where on")
            return
        if type(start) is not int or start < 0:
            raise ServingError(f"start is how many tokens the base reads before the adapter acts, not {shown(start)}")
        if adapter is not None:
            self._starts[row] = start

    def _up_to_starts(
        self, read: Mapping[int, NDArray[np.int64]], lengths: Mapping[int, int]
    ) -> Mapping[int, NDArray[np.int64]]:
        """Return the tokens to read first: of a row whose adapter becomes active among them, those before."""
        crossing = {row: start - lengths[row] for row, start in self._starts.items() if row in read}
        cut = {row: count for row, count in crossing.items() if 0 < count < len(read[row])}
        return {row: array[: cut.get(row, len(array))] for row, array in read.items()} if cut else read


class GrowingRows:
    """Rows of a model whose rotary embedding may depend on the length of the whole text."""

    chunk: int
    _texts: TextLengths | None = None  # None if it does not
    _lengths: dict[int, int]
    _shared: SharedRows | None
    _lock: Any
    _check_open: Callable[[int], None]
    _read: Callable[[Mapping[int, NDArray[np.int64]], Mapping[int, int]], dict[int, NDArray[Any]]]

    def expect(self, row: int, count: int) -> None:
        """Record how many tokens a row will read next, such as those of its prompt.

        `fill` does so too. It matters to models that compute tokens of a long text differently from the first on.

        Args:
            row: Its number, as returned by `open`.
            count: How many tokens.

        Raises:
            ServingError: The row is not open.
        """
        with self._lock:
            self._check_open(row)
            self._expect_text(row, count)

    def _expect_text(self, row: int, count: int) -> None:
        """Record how many tokens a row will read next; a long text shares what it reads with long ones."""
        is_long = self._texts is not None and self._texts.expect(row, self._lengths[row], count)
        if is_long and self._shared is not None:
            self._shared.part(row, "long")

    def _grow(self, texts: TextLengths, read: Mapping[int, NDArray[np.int64]]) -> None:
        """Let rows read their texts again that become long ones, if their model's generation does so."""
        for row, array in read.items():
            length = self._lengths[row]
            if not texts.grows(row, length, len(array)):
                continue
            if self._shared is not None:
                self._shared.lose([row])
            text = texts.grow(row)
            try:
                self._lengths[row] = 0 if text else length
                while text:
                    count = part_length(len(text), self.chunk)
                    self._read({row: np.array(text[:count])}, {})
                    text = text[count:]
            except ServingError:
                self._lengths[row] = length
                texts.shrink(row)
                raise

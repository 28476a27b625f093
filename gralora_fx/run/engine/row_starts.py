"""Rows whose adapters become active at a token; the base reads all tokens before it, as in any other row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gralora_fx.errors import ServingError, shown

if TYPE_CHECKING:
    from gralora_fx.run.engine.adapters import Adapters


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

"""A decoder's rows with an adapter that one of them should not have, which verification has to see."""

from __future__ import annotations

from collections.abc import Sequence

from gralora_fx.exporters.verify.greedy_tokens import RowSteps


class ShiftedSteps(RowSteps):
    """Gives the third row the next adapter."""

    @staticmethod
    def adapters(name: str | None, others: Sequence[str | None], rows: int) -> list[str | None]:
        names = RowSteps.adapters(name, others, rows)
        there = [name, *others]
        names[2] = there[(there.index(names[2]) + 1) % len(there)]
        return names

"""A decoder's rows with an adapter that one of them should not have, which verification has to see."""

from __future__ import annotations

from gralora_fx.exporters.verification.decoder_rows import ExportedRows, RowSteps


class ShiftedSteps(RowSteps):
    """Gives the third row the next adapter."""

    @staticmethod
    def adapters(export: ExportedRows, rows: int) -> list[str | None]:
        names = RowSteps.adapters(export, rows)
        there = [export.name, *export.others]
        names[2] = there[(there.index(names[2]) + 1) % len(there)]
        return names

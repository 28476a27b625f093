"""A decoder's rows with an adapter that one of them should not have, which verification has to see."""

from __future__ import annotations

from typing import Any

import numpy as np

from gralora_fx.exporters.verification.mixed_rows import MixedSteps


class ShiftedSteps(MixedSteps):
    """Gives the third row the next adapter."""

    def ids(self, rows: int) -> np.ndarray[Any, Any]:
        right = super().ids(rows)
        return np.where(np.arange(len(right)) == 2, (right + 1) % self.count, right)

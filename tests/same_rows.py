"""Compare results of one row and of several as this processor allows (docs/quantization.md, int4)."""

from __future__ import annotations

from typing import Any

import numpy as np

from gralora_fx.run.sessions.integer_sums import adds_exactly


def same_rows(found: Any, expected: Any, *, quantize: str) -> bool:
    """Return whether a row's results are those that it has alone: to the bit, but for int4 without VNNI."""
    if quantize == "int4" and not adds_exactly():
        return bool(np.allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max()))
    return np.array_equal(found, expected)

"""The namespace of this project's operators, and whether they are computed or only traced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

NAMESPACE = "gralora"

_library: Any = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]
_depth = [0]  # of traces that are being made


def is_traced() -> bool:
    """Whether a model is being traced: only shapes matter then, and working out the rest takes most of the time."""
    return _depth[0] > 0


@contextmanager
def only_shapes() -> Iterator[None]:
    """Let operators give results of the right shape, without values, while the block lasts."""
    _depth[0] += 1
    try:
        yield
    finally:
        _depth[0] -= 1

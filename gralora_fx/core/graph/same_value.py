"""Comparison of constants of code and of graphs, types included."""

from __future__ import annotations

from typing import Any

import torch

_PLAIN = (str, bytes, int, torch.device)


def same_value(one: Any, other: Any) -> bool:
    """Return whether two constants are the same: 1 is not True, 0.0 is not -0.0, and what is in doubt is not."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(same_value, one, other))
    if isinstance(one, dict):
        return same_value(list(one.items()), list(other.items()))
    if isinstance(one, frozenset):
        return same_value(sorted(one, key=repr), sorted(other, key=repr))
    if isinstance(one, slice):
        return same_value((one.start, one.stop, one.step), (other.start, other.stop, other.step))
    if isinstance(one, (float, complex)):
        return repr(one) == repr(other)
    return isinstance(one, _PLAIN) and bool(one == other)

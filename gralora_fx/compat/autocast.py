"""Autocast entered and left by calls, where a `with` block does not do: in the nodes of a graph."""

from __future__ import annotations

from typing import Any

import torch


def enter_autocast(device_type: str, dtype: torch.dtype | None, enabled: bool, cache_enabled: bool | None) -> Any:
    """Begin `torch.autocast` of these arguments.

    Returns:
        The context, for `leave_autocast`.
    """
    return torch.amp.autocast_mode._enter_autocast(device_type, dtype, enabled, cache_enabled)  # type: ignore[no-untyped-call]


def leave_autocast(context: Any) -> None:
    """End what `enter_autocast` began."""
    torch.amp.autocast_mode._exit_autocast(context)  # type: ignore[no-untyped-call]

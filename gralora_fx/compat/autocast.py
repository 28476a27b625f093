"""Autocast entered and left by function calls, for graphs, where a `with` block is not possible."""

from __future__ import annotations

from typing import Any

import torch


def enter_autocast(device_type: str, dtype: torch.dtype | None, enabled: bool, cache_enabled: bool | None) -> Any:
    """Enter `torch.autocast` with these arguments.

    Returns:
        The context, for `leave_autocast`.
    """
    return torch.amp.autocast_mode._enter_autocast(device_type, dtype, enabled, cache_enabled)  # type: ignore[no-untyped-call]


def leave_autocast(context: Any) -> None:
    """Leave the context that `enter_autocast` entered."""
    torch.amp.autocast_mode._exit_autocast(context)  # type: ignore[no-untyped-call]

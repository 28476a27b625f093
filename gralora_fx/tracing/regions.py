"""Regions of a graph that run without gradients or under autocast, as pairs of nodes around them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import has_side_effect

_PREFIX = f"{__name__.replace('.', '_')}_"  # of the names that `fx` gives to functions of this file in its code
_INDENT = "    "


@has_side_effect
def enter_grad_mode(enabled: bool) -> bool:
    """Let the nodes that follow record gradients or not.

    Returns:
        The mode before, for `leave_grad_mode`.
    """
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(enabled)
    return before


@has_side_effect
def leave_grad_mode(before: bool) -> None:
    """Set the mode that `enter_grad_mode` found."""
    torch.set_grad_enabled(before)


@has_side_effect
def enter_autocast(device_type: str, dtype: torch.dtype | None, enabled: bool, cache_enabled: bool | None) -> Any:
    """Let the nodes that follow run under `torch.autocast` of these arguments.

    Returns:
        The context, for `leave_autocast`.
    """
    return torch.amp.autocast_mode._enter_autocast(device_type, dtype, enabled, cache_enabled)  # type: ignore[no-untyped-call]


@has_side_effect
def leave_autocast(context: Any) -> None:
    """End what `enter_autocast` began."""
    torch.amp.autocast_mode._exit_autocast(context)  # type: ignore[no-untyped-call]


LEAVE: dict[Callable[..., Any], Callable[..., Any]] = {
    enter_grad_mode: leave_grad_mode,
    enter_autocast: leave_autocast,
}


def leave_after_errors(graph: fx.Graph) -> None:
    """Let the code of a graph end its regions where an error leaves them, as a `with` block does.

    Before: `before = enter_grad_mode(False); y = linear(x, w); leave_grad_mode(before)`
    After:  `before = enter_grad_mode(False); try: y = linear(x, w); finally: leave_grad_mode(before)`

    Copies of the graph keep it, since it belongs to the way in which code is made of the nodes.

    Args:
        graph: A graph; it must be compiled afterwards.
    """
    if not isinstance(graph._codegen._body_transformer, _Blocks):
        graph.set_codegen(copy.copy(graph._codegen))  # copies of a graph share theirs
        graph.on_generate_code(_Blocks)


@dataclass(frozen=True)
class _Blocks:
    """Makes a `try` block of each region, in the lines that another transformer returns."""

    before: Callable[[list[str]], list[str]] | None

    def __call__(self, body: list[str]) -> list[str]:
        depth, is_empty, lines = 0, False, []
        for piece in body if self.before is None else self.before(body):
            is_statement = bool(piece.strip()) and not piece.lstrip().startswith((";", "#"))
            begins, ends = (is_statement and f"{_PREFIX}{verb}_" in piece for verb in ("enter", "leave"))
            if ends:
                lines += [f"{_INDENT * depth}pass\n"] if is_empty else []
                depth -= 1
                lines.append(f"{_INDENT * depth}finally:\n")
            lines.append(f"{_INDENT * (depth + ends)}{piece}" if is_statement else piece)
            if begins:
                lines.append(f"\n{_INDENT * depth}try:\n")
                depth += 1
            is_empty = begins or (is_empty and not is_statement)
        return lines

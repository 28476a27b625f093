"""Indices of an image's patches on its grid, by arithmetic that a trace records for images of any size.

transformers' own functions (`transformers.vision_utils`) read the grid's numbers into Python, which a trace cannot.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.vision_utils import _interpolation_axis_taps_weights


class Windows(NamedTuple):
    """The windows of attention on a grid."""

    order: Tensor  # the merged patches in the order of their windows `[merged patches]`
    ends: Tensor  # where each window begins among the patches, and the count of all `[windows + 1]`
    most: int  # the most patches of a window


def places(grid: Tensor, count: Any, merge: int) -> Tensor:
    """Return the row and column of every patch of an image, `[patches, 2]`, by blocks of `merge` x `merge` patches.

    Processors of Qwen's kind write them so. `grid [1, 3]` is one frame with height and width in patches, and `count`
    how many there are, maybe a symbol.
    """
    width, area = grid[0, 2], merge * merge
    patch = torch.arange(count, device=grid.device)
    block, inner = patch // area, patch % area
    blocks = width // merge
    return torch.stack([block // blocks * merge + inner // merge, block % blocks * merge + inner % merge], dim=-1)


def blocks(grid: Tensor, patches: Tensor, merge: int) -> tuple[Tensor, Tensor, Any]:
    """Return where one frame's `patches [patches, 2]` go when merged by blocks, their weights, and how many blocks."""
    row, column = patches.unbind(1)
    block = row // merge * (grid[0, 2] // merge) + column // merge
    place = block * merge * merge + row % merge * merge + column % merge
    return place, torch.ones_like(place, dtype=torch.float32), patches.shape[0] // (merge * merge)


def windows(grid: Tensor, merge: int, side: int, merged: Any) -> Windows:
    """Return the windows of `side` merged patches a side of an image, row by row; `grid` is `[1, 3]`, in patches."""
    height, width = grid[0, 1] // merge, grid[0, 2] // merge
    across = (width + side - 1) // side
    index = torch.arange(merged, device=grid.device)
    window = index // width // side * across + index % width // side
    order = torch.argsort(window * merged + index)
    count = ((height + side - 1) // side * across).item()
    torch._check(count >= 1)  # type: ignore[no-untyped-call]
    torch._check(count <= merged)  # type: ignore[no-untyped-call]
    each = torch.arange(count, device=grid.device)
    rows = (height - each // across * side).clamp(max=side)
    columns = (width - each % across * side).clamp(max=side)
    ends = torch.nn.functional.pad((rows * columns * merge * merge).cumsum(0), (1, 0))
    return Windows(order, ends, side * side * merge * merge)


def table_taps(
    grid: Tensor, patches: Tensor, side: int, mode: str, padding: str, *, corners: bool
) -> tuple[Tensor, Tensor]:
    """Return which entries of a square table of positions a patch is interpolated of, and their weights.

    Args:
        grid: `[1, 3]`: one frame, and its height and width in patches.
        patches: The row and column of every patch `[patches, 2]`.
        side: Entries on a side of the table.
        mode: `"bilinear"` or `"bicubic"`.
        padding: `"border"` or `"zeros"`, as of `torch.nn.functional.grid_sample`.
        corners: Whether the outermost entries are those of the outermost patches.

    Returns:
        Indices and weights, each `[patches, taps]`.
    """
    taps, weights = zip(
        *(
            _interpolation_axis_taps_weights(patches[:, axis], grid[0, axis + 1], side, mode, corners, padding)
            for axis in (0, 1)
        ),
        strict=True,
    )
    indices = (taps[0][:, :, None] * side + taps[1][:, None, :]).flatten(1)
    return indices, (weights[0][:, :, None] * weights[1][:, None, :]).flatten(1)

"""transformers' functions of an image's grid, by arithmetic that a trace records (see `vision_grids`)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gralora_fx.base.patches import patched_here
from gralora_fx.features.images import vision_grids


@contextmanager
def grids_by_arithmetic(model: nn.Module, count: Any) -> Iterator[None]:
    """Let a model's code call functions of grids by arithmetic in the block; its one image has `count` patches."""
    modules = {sys.modules[type(part).__module__] for part in model.modules()}
    with ExitStack() as changed:
        for name, function in _functions(count).items():
            for module in modules:
                if hasattr(module, name):
                    changed.enter_context(patched_here(module, name, function))
        yield


def _functions(count: Any) -> dict[str, Callable[..., Any]]:
    """Return the functions by transformers' names, with its arguments; `merge` is the patches on a side of a block."""
    most: dict[int, int] = {}  # the most patches of a segment, by the tensor that says where segments end

    def ends(grid: Tensor, *_: Any, **__: Any) -> Tensor:
        return nn.functional.pad(grid.prod(1), (1, 0))

    def longest(ends: Tensor, *_: Any, **__: Any) -> Any:
        return most.get(id(ends), count)

    def places(grid: Tensor, spatial_merge_size: Any, include_temporal: bool = False, **_: Any) -> Tensor:
        found = vision_grids.places(grid, count, spatial_merge_size)
        return torch.cat([torch.zeros_like(found[:, :1]), found], dim=1) if include_temporal else found

    def windows(
        grid: Tensor, spatial_merge_size: int, window_size: int, patch_size: int, **_: Any
    ) -> tuple[Tensor, Tensor]:
        merge = spatial_merge_size
        found = vision_grids.windows(grid, merge, window_size // merge // patch_size, count // (merge * merge))
        most[id(found.ends)] = found.most
        return found.order, found.ends

    def taps(
        grid: Tensor,
        num_grid_per_side: int,
        mode: str = "bilinear",
        align_corners: bool = False,
        spatial_merge_size: int = 1,
        padding: str = "border",
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        patches = vision_grids.places(grid, count, spatial_merge_size)
        return vision_grids.table_taps(grid, patches, num_grid_per_side, mode, padding, corners=align_corners)

    def blocks(grid: Tensor, height: int, width: int, **_: Any) -> tuple[Tensor, Tensor, Any]:
        return vision_grids.blocks(grid, vision_grids.places(grid, count, 1), height)

    def shuffled(grid: Tensor, merge_size: int, **_: Any) -> Tensor:
        row, column = vision_grids.places(grid, count, merge_size).unbind(1)
        return row * grid[0, 2] + column

    return {
        "get_vision_cu_seqlens": ends,
        "get_max_seqlen": longest,
        "get_vision_attention_seqlens": lambda grid, *_, **__: (ends(grid), count),
        "get_vision_position_ids": places,
        "get_vision_window_index": windows,
        "get_vision_interpolation_indices_and_weights": taps,
        "get_vision_frame_index": lambda grid, **_: grid.new_zeros(count),
        "get_vision_temporal_merge_index": blocks,
        "get_vision_pixel_shuffle_index": shuffled,
    }

"""Indices of patches by arithmetic equal those that transformers computes of the grid's numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import vision_utils
from transformers.models import kimi_k25, minimax_m3_vl, muse_glimmer, qwen2_5_vl

from gralora_fx.features.images import vision_grids
from gralora_fx.features.images.image_rows import grid_positions
from gralora_fx.features.images.vision_functions import _functions
from tests.architectures.image_prompts import tiny_image_model

_SIZES = [(1, 1), (1, 7), (2, 3), (4, 4), (5, 9), (8, 8), (9, 4), (13, 2)]  # in merged patches


def _grid(height: int, width: int, merge: int) -> torch.Tensor:
    return torch.tensor([[1, height * merge, width * merge]])


@pytest.mark.parametrize("merge", [1, 2, 3])
@pytest.mark.parametrize(("height", "width"), _SIZES)
def test_rows_and_columns_are_those_of_transformers(height: int, width: int, merge: int) -> None:
    grid = _grid(height, width, merge)
    found = vision_grids.places(grid, int(grid.prod()), merge)
    assert torch.equal(found, vision_utils.get_vision_position_ids(grid, merge))


@pytest.mark.parametrize("side", [1, 2, 4, 5])
@pytest.mark.parametrize(("height", "width"), _SIZES)
def test_windows_are_those_of_transformers(height: int, width: int, side: int) -> None:
    grid = _grid(height, width, 2)
    found = vision_grids.windows(grid, 2, side, height * width)
    order, ends = vision_utils.get_vision_window_index(grid, 2, side * 2 * 14, 14)
    assert torch.equal(found.order, order)
    assert torch.equal(found.ends, ends.long())
    assert (found.ends[1:] - found.ends[:-1]).max() <= found.most


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("corners", [True, False])
@pytest.mark.parametrize("padding", ["border", "zeros"])
def test_interpolated_positions_are_those_of_transformers(mode: str, corners: bool, padding: str) -> None:
    for height, width in _SIZES:
        grid = _grid(height, width, 2)
        patches = vision_grids.places(grid, int(grid.prod()), 2)
        found = vision_grids.table_taps(grid, patches, 6, mode, padding, corners=corners)
        expected = vision_utils.get_vision_interpolation_indices_and_weights(
            grid, 6, mode=mode, align_corners=corners, spatial_merge_size=2, padding=padding
        )
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1])


@pytest.mark.parametrize("sizes", [[(2, 3)], [(4, 2), (1, 1)], [(3, 5), (5, 3), (2, 2)]], ids=str)
def test_positions_of_a_prompt_are_those_of_the_model(sizes: list[tuple[int, int]]) -> None:
    model = tiny_image_model("Qwen2_5_VLForConditionalGeneration")
    token, merge = model.config.image_token_id, model.config.vision_config.spatial_merge_size
    ids, grids = [5, 6], []
    for height, width in sizes:
        ids += [*[token] * (height * width), 7, 8, 9]
        grids.append([1, height * merge, width * merge])
    tensor = torch.tensor([ids])
    types = (tensor == token).int()
    expected, _ = model.model.get_rope_index(tensor, types, image_grid_thw=torch.tensor(grids))
    found = grid_positions(np.array(ids) == token, np.array(grids), merge)
    assert np.array_equal(found, expected[:, 0].numpy())


@pytest.mark.parametrize(("height", "width"), _SIZES)
def test_functions_of_a_grid_are_those_of_transformers(height: int, width: int) -> None:
    grid = _grid(height, width, 2)
    for model, name, arguments in (
        (
            qwen2_5_vl.modeling_qwen2_5_vl,
            "get_vision_window_index",
            {"spatial_merge_size": 2, "window_size": 112, "patch_size": 14},
        ),
        (
            minimax_m3_vl.modeling_minimax_m3_vl,
            "get_vision_position_ids",
            {"spatial_merge_size": 2, "include_temporal": True},
        ),
        (
            kimi_k25.modeling_kimi_k25,
            "get_vision_interpolation_indices_and_weights",
            {"num_grid_per_side": 4, "mode": "bicubic"},
        ),
        (kimi_k25.modeling_kimi_k25, "get_vision_frame_index", {}),
        (kimi_k25.modeling_kimi_k25, "get_vision_temporal_merge_index", {"kernel_height": 2, "kernel_width": 2}),
        (muse_glimmer.modeling_muse_glimmer, "get_vision_pixel_shuffle_index", {"merge_size": 2}),
        (muse_glimmer.modeling_muse_glimmer, "get_vision_cu_seqlens", {}),
    ):
        expected = getattr(model, name)(grid, **arguments)
        found = _functions(int(grid.prod()))[name](grid, *arguments.values())
        for one, other in zip(
            found if isinstance(found, tuple) else [found],
            expected if isinstance(expected, tuple) else [expected],
            strict=True,
        ):
            assert torch.equal(torch.as_tensor(one).long(), torch.as_tensor(other).long()), name

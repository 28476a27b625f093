"""Pixels of random images as the processors of tiny models give them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

_GRIDS = ((2, 3), (4, 2))  # height and width in tokens


def pixels_of(model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
    """Process one image, the first or the second."""
    generator = torch.Generator().manual_seed(seed)
    vision: Any = model.config.vision_config
    if model.config.model_type == "mllama":
        way = seed + 1  # of one tile, or of two
        tiles = (torch.arange(vision.max_num_tiles) < way).float()
        pixels = torch.randn(1, vision.max_num_tiles, 3, *[vision.image_size] * 2, generator=generator)
        mask = {"aspect_ratio_ids": torch.tensor([way]), "aspect_ratio_mask": tiles[None].long()}
        return {"pixel_values": pixels * tiles[:, None, None, None], **mask}
    names = _own_inputs(model)
    if "image_grid_thw" in names:
        return _patches(model, generator, *_GRIDS[seed])
    if "image_position_ids" in names:
        height, width = (side * vision.pooling_kernel_size for side in _GRIDS[seed])
        patch = torch.arange(height * width)
        places = torch.full((1, 8 * vision.pooling_kernel_size**2, 2), -1)  # padded
        places[0, : len(patch)] = torch.stack([patch % width, patch // width], dim=1)
        side = vision.patch_size * (1 if hasattr(model.model, "vision_tower") else vision.pooling_kernel_size)
        values = torch.rand(*places.shape[:2], 3 * side**2, generator=generator)
        return {"pixel_values": values * (places[..., :1] >= 0), "image_position_ids": places}
    if hasattr(model.config, "image_grid_pinpoints"):
        tiles, size = ((3, (20, 50)), (5, (70, 60)))[seed]  # of two tiles and the whole, and of four
        pixels = torch.zeros(1, 5, 3, vision.image_size, vision.image_size)  # padded
        pixels[:, :tiles] = torch.randn(1, tiles, *pixels.shape[2:], generator=generator)
        return {"pixel_values": pixels, "image_sizes": torch.tensor([size])}
    if "image_sizes" in names and vision.model_type == "pixtral":
        step = vision.patch_size * getattr(model.config, "spatial_merge_size", 1)
        height, width = (side * step for side in _GRIDS[seed])
        pixels = torch.zeros(1, 3, 4 * step, 3 * step)  # padded
        pixels[:, :, :height, :width] = torch.randn(1, 3, height, width, generator=generator)
        return {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])}
    if model.config.model_type == "idefics2":
        height, width = ((24, 32), (32, 16))[seed]
        mask = torch.zeros(1, 32, 32, dtype=torch.long)
        mask[:, :height, :width] = 1
        return {"pixel_values": torch.randn(1, 3, 32, 32, generator=generator) * mask, "pixel_attention_mask": mask}
    size = getattr(vision, "image_size", 768)  # Florence-2's, which its configuration does not say
    size = size if isinstance(size, int) else size[0]
    return {"pixel_values": torch.randn(1 + seed, 3, size, size, generator=generator)}


def _patches(model: PreTrainedModel, generator: torch.Generator, height: int, width: int) -> dict[str, Tensor]:
    """Return an image of so many tokens as patches, in the shape that the model's code takes."""
    vision: Any = model.config.vision_config
    found = (getattr(vision, name, None) for name in ("spatial_merge_size", "merge_size", "merge_kernel_size"))
    merge = next((value for value in found if value), 1)
    merge = merge if isinstance(merge, int) else merge[0]
    grid = torch.tensor([[1, height * merge, width * merge]])
    channels: int = getattr(vision, "in_channels", None) or getattr(vision, "num_channels", 3)
    flat, side = channels * vision.patch_size**2, vision.patch_size
    more = {"image_merge_sizes": torch.tensor([merge])} if "image_merge_sizes" in _own_inputs(model) else {}
    problems: list[str] = []
    for shape in ((flat * getattr(vision, "temporal_patch_size", 1),), (channels, side, side), (2 * flat,)):
        pixels = torch.randn(int(grid.prod()), *shape, generator=generator)
        inputs = {"pixel_values": pixels, "image_grid_thw": grid, **more}
        try:
            with torch.no_grad():
                _reader(model)(**inputs)
        except Exception as error:  # noqa: BLE001  # a model raises what it likes
            problems.append(str(error))
        else:
            return inputs
    raise ValueError(f"{type(model).__name__} takes no patches: {problems}")


def pixels_of_both(model: PreTrainedModel, images: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Process all images of a prompt."""
    joined = {name: torch.cat([each[name] for each in images]) for name in images[0]}
    return _of_batch(model, joined)


def features_of(model: PreTrainedModel, pixels: dict[str, Tensor]) -> int:
    """Return the number of tokens that a model makes of an image."""
    if model.config.model_type == "mllama":  # whose layers attend to what it makes of one
        return 1
    with torch.no_grad():
        found: Any = _reader(model)(**_of_batch(model, pixels), return_dict=True).pooler_output
    joined = found if isinstance(found, Tensor) else torch.cat([each.flatten(0, -2) for each in found])
    return joined.flatten(0, -2).shape[0]


def _of_batch(model: PreTrainedModel, pixels: dict[str, Tensor]) -> dict[str, Tensor]:
    """Prompts of some processors have an axis of their own."""
    if model.config.model_type in ("idefics2", "idefics3", "mllama", "smolvlm"):
        return {name: value[None] for name, value in pixels.items()}
    return pixels


def _reader(model: Any) -> Any:
    own = getattr(model, "get_image_features", None)
    return own if own is not None else model.model.get_image_features


def _own_inputs(model: PreTrainedModel) -> frozenset[str]:
    """Return the tensors of which a model's own code makes features."""
    code = inspect.unwrap(_reader(model))
    names = set(inspect.signature(code).parameters)
    if hasattr(model, "model") and hasattr(model.model, "get_image_features"):
        names |= set(inspect.signature(inspect.unwrap(model.model.get_image_features)).parameters)
    return frozenset(names)

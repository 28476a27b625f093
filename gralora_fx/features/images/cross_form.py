"""Call of the vision encoder of a model whose layers attend to images: an image's tiles and aspect ratio."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from gralora_fx.core.tracing.check import gap
from gralora_fx.features.images.cross_attention import cross_layers
from gralora_fx.features.images.cross_rows import seen_by
from gralora_fx.features.images.given_embeddings import called_with_images
from gralora_fx.features.images.image_rows import given_of
from gralora_fx.features.images.tasks_and_inputs import (
    ASPECT,
    GIVEN_PLACES,
    IMAGE_FEATURES,
    IMAGES,
    KEYS,
    TILES,
    VALUES,
)
from gralora_fx.features.images.vision_forms import VisionForm
from gralora_fx.format.input_names import EMBEDS, GIVEN, IDS


class CrossForm(VisionForm):
    """A tower that reads the tiles of one image and its aspect ratio id."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self._base: Any = model.model
        self.features = self.own

    def own(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Return the embedding of the token, keys and values of each layer, and which tiles are not padding."""
        pixels, ratios = inputs[IMAGES], inputs[ASPECT]
        tiles = self._tiles(ratios[0])
        found = self._base.vision_model(pixels[None, None], ratios, tiles[None]).last_hidden_state
        states = self._base.multi_modal_projector(found).flatten(0, -2)  # [tiles * patches, hidden]
        projected = []
        for layer in cross_layers(self.model):
            own = layer.cross_attn
            shape = (pixels.shape[0], -1, own.num_key_value_heads, own.head_dim)  # [tiles, patches, heads, size]
            keys = own.k_norm(own.k_proj(states).view(shape)).permute(2, 3, 0, 1)
            projected.append((keys, own.v_proj(states).view(shape).permute(2, 0, 1, 3)))
        keys, values = (torch.stack(each)[:, None] for each in zip(*projected, strict=True))
        token = torch.tensor([self.model.config.image_token_id], device=ratios.device)
        embedding = self.model.get_input_embeddings()(token)  # the text has it, as that of any token
        return {IMAGE_FEATURES: embedding, KEYS: keys, VALUES: values, TILES: tiles[0]}

    def _tiles(self, ratio: Tensor) -> Tensor:
        """Return which tiles are not padding `[1, tiles]`."""
        config: Any = self.model.config.vision_config
        counts = torch.tensor([1, *(rows * columns for rows, columns in config.supported_aspect_ratios)])
        return (torch.arange(config.max_num_tiles) < counts[ratio]).long()[None]

    def examples(self, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
        """Draw the tiles of images of several aspect ratios."""
        vision: Any = self.model.config.vision_config
        shape = (vision.max_num_tiles, vision.num_channels, vision.image_size, vision.image_size)
        for ratio in (min(2, vision.max_aspect_ratio_id), 1, vision.max_aspect_ratio_id):
            yield {IMAGES: torch.randn(shape, generator=generator), ASPECT: torch.tensor([[ratio]])}

    def check(self, generator: torch.Generator) -> str | None:
        """Compare logits of a prompt with two images with those of the model's own code."""
        model, images = self.model, list(self.examples(generator))[:2]
        places = np.array([False, True, False, False, True, False])
        ids = torch.where(torch.from_numpy(places), self.model.config.image_token_id, 1)[None]
        with torch.no_grad():
            read = [self.own(**{**each, IMAGES: each[IMAGES].to(model.dtype)}) for each in images]
            tiles = torch.stack([each[TILES] for each in read])
            seen = seen_by(places)[:, :, None] * tiles.numpy()
            own = model(
                input_ids=ids,
                pixel_values=torch.stack([each[IMAGES] for each in images])[None].to(model.dtype),
                aspect_ratio_ids=torch.cat([each[ASPECT] for each in images], dim=1),
                aspect_ratio_mask=tiles[None],
                cross_attention_mask=torch.from_numpy(seen)[None],
            ).logits
            outputs = [{name: value.float().numpy() for name, value in each.items()} for each in read]
            given = {name: torch.from_numpy(value) for name, value in given_of(places, outputs, None, 1).items()}
            del given[GIVEN_PLACES]
            given = {n: value.to(model.dtype) if n in (EMBEDS, KEYS, VALUES) else value for n, value in given.items()}
            with called_with_images(model, (IDS, *given)):
                found = model(input_ids=ids.masked_fill(torch.from_numpy(places), GIVEN), **given).logits
        return gap(own, found)

"""Prompts of an image and a text for tiny random models, and what a model itself puts in the place of their tokens."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from gralora_fx.format.input_names import GIVEN
from tests.architectures.image_fields import IMAGE_FIELDS, Fields
from tests.architectures.tiny_configs import small_fields, tiny_model

IMAGE, _BEFORE, _AFTER = 90, [5, 6], [7, 8, 9]  # the token of an image, and the text around it


def image_classes() -> tuple[str, ...]:
    """Return the class of every model of transformers that makes text of images and text."""
    return tuple(sorted(set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()) & set(dir(transformers))))


def tiny_image_model(name: str, **fields: Any) -> PreTrainedModel:
    """Return a tiny random model that reads images beside a text.

    Args:
        name: Its class.
        **fields: Fields of its text model and of its vision model, where they have them, to set besides.
    """
    own = IMAGE_FIELDS.get(name, Fields())
    model_class = getattr(transformers, name)
    parts = small_fields(model_class.config_class(), is_decoder=True)
    for part, given in (("text_config", own.text), ("vision_config", own.vision)):
        if part not in parts and not given:
            continue
        known = parts.get(part) or {}
        parts[part] = {**known, **given, **{field: value for field, value in fields.items() if field in known}}
    given = copy.deepcopy({**parts, "image_token_id": IMAGE, **own.both})  # into which it writes
    model = tiny_model(model_class, model_class.config_class(**given))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Gemma's projection, with which all images are zeros, and gates, behind which a part of Mllama is
            if (parameter.ndim > 1 or name.endswith("gate")) and not parameter.any():
                parameter.normal_()
    return model


def wide_image_model(name: str, vocabulary: int = 128) -> PreTrainedModel:
    """Return a tiny model whose weights are so wide that answers depend on the images."""
    model = tiny_image_model(name, vocab_size=vocabulary, max_position_embeddings=512).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    return model


def image_prompt(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return inputs of a model: a prompt of two tokens, an image and three tokens, and the image's pixels."""
    torch.manual_seed(2)
    vision = model.config.vision_config
    if hasattr(vision, "spatial_merge_size"):  # Qwen's: patches one after the other
        width = getattr(vision, "in_channels", 3) * vision.temporal_patch_size * vision.patch_size**2
        side = 2 * vision.spatial_merge_size
        pixels = {"pixel_values": torch.randn(side * side, width), "image_grid_thw": torch.tensor([[1, side, side]])}
        count = side * side // vision.spatial_merge_size**2
    else:
        size = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
        images = (1, 1) if model.config.model_type in ("idefics3", "smolvlm") else (1,)
        pixels = {"pixel_values": torch.randn(*images, 3, size, size)}
        with torch.no_grad():
            features = model.model.get_image_features(**pixels, return_dict=True).pooler_output
        features = torch.cat(list(features)) if not isinstance(features, Tensor) else features
        count = features.numel() // model.config.get_text_config().hidden_size
    ids = torch.tensor([[*_BEFORE, *[IMAGE] * count, *_AFTER]])
    types = (ids == IMAGE).long()
    beside = {"token_type_ids": types} if model.config.model_type == "gemma3" else {}
    if "image_grid_thw" in pixels:
        beside = {"mm_token_type_ids": types}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels, **beside}


def image_inputs_of(model: PreTrainedModel, prompt: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a model's logits of a prompt, and what an export takes of the same prompt.

    What the model's own code hands to its decoder of texts is noted, which is all that it knows of the image.
    """
    noted: dict[str, Any] = {}
    text = next(part for name in ("language_model", "text_model") if (part := getattr(model.model, name, None)))
    handle = text.register_forward_pre_hook(lambda _, args, options: noted.update(options), with_kwargs=True)
    try:
        with torch.no_grad():
            logits: Tensor = model(**prompt).logits
    finally:
        handle.remove()
    ids, embeds = prompt["input_ids"], noted["inputs_embeds"]
    given = ids == IMAGE
    inputs = {
        "input_ids": ids.masked_fill(given, GIVEN),
        "attention_mask": prompt["attention_mask"],
        "inputs_embeds": embeds,
    }
    places = noted.get("position_ids")
    if places is not None and places.ndim == 3:
        inputs["grid_position_ids"] = places[-3:]
    if (features := noted.get("deepstack_visual_embeds")) is not None:
        dense = torch.zeros(len(features), *embeds.shape)
        for layer, values in zip(dense, features, strict=True):
            layer[given] = values
        inputs["deepstack_embeds"] = dense
    return logits, inputs | {name: prompt[name] for name in ("token_type_ids",) if name in prompt}

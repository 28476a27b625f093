"""Tiny random models that take images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
PYRAMID = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
IMAGE_MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ),
    "convnext": lambda: ConvNextForImageClassification(ConvNextConfig(**PYRAMID, image_size=64)),
    "vit": lambda: ViTForImageClassification(ViTConfig(**VIT)),
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**VIT)),
    "swin": lambda: SwinForImageClassification(
        SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1], num_heads=[2], window_size=4)
    ),
}


def image_model(make: Callable[[], nn.Module]) -> Any:
    """Return a model in evaluation mode whose outputs depend on all of the image."""
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():  # transformers' initial values vanish in deep models
        if parameter.ndim > 1 and parameter.numel() and parameter[0].numel() > 4:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model

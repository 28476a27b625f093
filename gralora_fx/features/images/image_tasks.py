"""The tasks of models that read images: their classes, and a decoder of texts with what images put into them."""

from __future__ import annotations

from typing import Any

from gralora_fx.features.images.input_table import IMAGES
from gralora_fx.format.tasks import Task

CLASSIFICATION = "image-classification"


def reads_images(model: Any) -> bool:
    """Return whether a model has a part that reads images beside a decoder of texts."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or model.config.is_encoder_decoder or not model.can_generate():
        return False
    return getattr(model.config, "vision_config", None) is not None and model.config.get_text_config() != model.config


TASKS = (
    Task(
        "image-text-to-text",
        "AutoModelForImageTextToText",
        cache="decoder",
        adapters=("CAUSAL_LM",),
        takes_embeddings=True,
        is_of=reads_images,
    ),
    Task(
        CLASSIFICATION,
        "AutoModelForImageClassification",
        ("ForImageClassification",),
        inputs=(IMAGES,),
        adapters=("SEQ_CLS",),
        is_classification=True,
    ),
)

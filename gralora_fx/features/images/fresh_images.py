"""Random images beside the ids of a decoder's step, on which an export is compared."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.format.input_names import EMBEDS, GIVEN, IDS, beside_ids

_IMAGES = 0.4  # the share of positions that have an image


def images_beside(model: TracedModel, case: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Draw what a step of a model that takes embeddings beside ids has of images, at some of its positions."""
    examples = model.example_inputs
    given = torch.rand(case[IDS].shape, generator=generator) < _IMAGES
    drawn: dict[str, Tensor] = {IDS: torch.where(given, GIVEN, case[IDS])}
    for name, spec in beside_ids(examples).items():
        example = examples[name]
        drawn[name] = spec.of_text(example, case)
        if example.is_floating_point():
            drawn[name] = torch.randn(drawn[name].shape, generator=generator).to(example.dtype)
            if name != EMBEDS:  # features are those of images alone
                drawn[name] = drawn[name] * given.unsqueeze(-1)
        elif spec.follows == IDS:
            high = case["attention_mask"].shape[1]
            places = torch.randint(0, high, drawn[name].shape, generator=generator)
            drawn[name] = torch.where(given, places, drawn[name])
        else:  # types of tokens
            drawn[name] = (torch.rand(drawn[name].shape, generator=generator) < _IMAGES).to(example.dtype)
    return drawn

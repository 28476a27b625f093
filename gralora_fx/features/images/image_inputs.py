"""Example inputs of a trace, and random ones of verification: pixels, and what images put beside the ids of a step."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gralora_fx.core.tracing.inputs.samples import BATCH, part_with
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.errors import TraceError, option, warn_caller
from gralora_fx.features.images.cross_attention import cross_examples, drawn_seen, reads_across
from gralora_fx.features.images.tasks_and_inputs import (
    FEATURES,
    GRID,
    GRID_THW,
    IMAGES,
    PATCH_PLACES,
    PREFIX,
    SEEN,
    reads_images,
)
from gralora_fx.format.input_names import EMBEDS, GIVEN, IDS, beside_ids

_IMAGES = 0.4  # the share of a case's positions that have an image
# by `model_type`: those that `python -m benchmarks image-models` found to answer as the model that is given pixels
_COMPARED = frozenset(
    re.findall(
        r"\w+",
        """
    aya_vision cohere2_vision cohere_compass cosmos3_omni deepseek_vl exaone4_5 florence2 gemma3 gemma4 gemma4_unified
    glm46v glm4v glm4v_moe glm5_next glm_ocr got_ocr2 hyperclovax_vision_v2 idefics2 idefics3 internvl janus kimi_k25
    lfm3_vl lighton_ocr llava llava_next llava_next_video llava_onevision minimax_m3_vl mistral3 mistral_large4
    mllama muse_glimmer muse_spark paddleocr_vl paligemma qianfan_ocr qwen2_5_omni_thinker qwen2_5_vl qwen2_vl qwen3_5
    qwen3_5_moe qwen3_omni_moe_thinker qwen3_vl qwen3_vl_moe smolvlm video_llava vipllava
        """,
    )
)
_TEXT_ALONE = f"{option(task='text-generation-with-past')} exports the decoder of its texts"
# by the configuration's `model_type`: why embeddings in place of ids are not all that a text has of its images
_REFUSED = {
    "chameleon": "its images are ids of its own vocabulary",
    "deepseek_ocr2": "its prompts are read by an encoder whose masks tell images from queries",
    "emu3": "its images are ids of its own vocabulary",
    "ernie4_5_vl_moe": "its tokens are routed by whether they are of an image (moe_mm_token_type_ids)",
    "fuyu": "its images are cut into lines in the middle of its text",
    "git": "its images come before the text, and its mask tells them apart",
    "granite4_vision": "features of an image are added in layers of their own (deepstack_features)",
    "idefics": "layers of its own attend to images",
    "kosmos-2": "its decoder has positions and masks of images of its own",
    "kosmos-2.5": "its decoder has positions and masks of images of its own",
    "molmo2": "its masks of a prompt depend on whether it is the first step",
    "pi0": "it gives actions, not text",
    "qwen4_exp": "its layers read ids of images (ple_input_ids)",
    "unlimited_ocr": "its prompts are read by an encoder whose masks tell images from queries",
}


def example_of(model: PreTrainedModel, name: str, generator: torch.Generator) -> Tensor | None:
    """Return random images of the size in a model's configuration; None for another input."""
    if name != IMAGES:
        return None
    config = part_with(model.config, "image_size")
    size = getattr(config, "image_size", 224)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return torch.randn(BATCH, getattr(config, "num_channels", 3), height, width, generator=generator)


def drawn_patches(
    size: tuple[int, int], merge: int, shape: Sequence[int], generator: torch.Generator
) -> dict[str, Tensor]:
    """Draw the patches of an image of `size` tokens (`merge` patches a side), and its grid `[1, 3]`."""
    grid = torch.tensor([[1, size[0] * merge, size[1] * merge]])
    return {IMAGES: torch.randn(int(grid.prod()), *shape, generator=generator), GRID_THW: grid}


def drawn_places(size: tuple[int, int], merge: int, values: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw the patches of an image, and the column and row of each, as a tower takes them that pools by these."""
    height, width = size[0] * merge, size[1] * merge
    patch = torch.arange(height * width)
    places = torch.stack([patch % width, patch // width], dim=1)
    return {IMAGES: torch.rand(len(places), values, generator=generator), PATCH_PLACES: places}


def examples_beside(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Return a step's example ids and inputs with images at every second position, given `ids [batch, length]`."""
    _check_is_known(model)
    generator = torch.Generator().manual_seed(1)
    batch, length = ids.shape
    given = (torch.arange(batch)[:, None] + torch.arange(length)) % 2 == 0
    dtype, width = model.dtype, embedding_of(model).weight.shape[1]
    inputs = {EMBEDS: torch.randn(batch, length, width, generator=generator).to(dtype)}
    if has_grid_positions(model):
        drawn = torch.randint(0, mask.shape[1], (3, batch, length), generator=generator)
        inputs[GRID] = torch.where(given, drawn, -1)
    if (count := _deepstack_layers(model)) is not None:
        features = torch.randn(count, batch, length, width, generator=generator)
        inputs[FEATURES] = (features * given.unsqueeze(-1)).to(dtype)
    if (name := _types_of_blocks(model)) is not None:
        inputs[name] = (torch.arange(mask.shape[1]) % 4 > 1).long().expand(mask.shape).contiguous()
    if reads_across(model):
        inputs |= cross_examples(model, ids, generator)
    return {IDS: torch.where(given, GIVEN, ids), **inputs}


def drawn_beside(model: TracedModel, case: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Draw what a step of a model that takes embeddings beside ids has of images, at some of its positions."""
    examples = model.example_inputs
    given = torch.rand(case[IDS].shape, generator=generator) < _IMAGES
    drawn: dict[str, Tensor] = {IDS: torch.where(given, GIVEN, case[IDS])}
    for name, spec in beside_ids(examples).items():
        example = examples[name]
        drawn[name] = spec.of_text(example, case)
        if spec.axis is None:
            drawn[name] = torch.randn(example.shape, generator=generator).to(example.dtype)
        elif name == SEEN:
            drawn[name] = drawn_seen(given, example.shape[2:], generator)
        elif example.is_floating_point():
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


def embedding_of(model: PreTrainedModel) -> nn.Embedding:
    """Return the embedding table of a decoder."""
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding):
        raise TraceError(f"{type(model).__name__} has no table of embeddings, so none can be given in place of its own")
    return embedding


def _check_is_known(model: PreTrainedModel) -> None:
    why = _REFUSED.get(model.config.model_type)
    if why is not None:
        raise TraceError(f"{type(model).__name__} takes no embeddings in the place of ids: {why}; {_TEXT_ALONE}")
    if reads_images(model) and model.config.model_type not in _COMPARED:
        warn_caller(
            f"images of {type(model).__name__} were not tried: it is not known whether its text has more of them than "
            "embeddings in the place of ids; compare logits for an image with those of the model itself"
        )


def has_grid_positions(model: PreTrainedModel) -> bool:
    """Return whether a token of an image has a position in time, height and width."""
    return any(hasattr(part, "mrope_section") for part in model.modules())


def deepstack_part(model: nn.Module) -> nn.Module | None:
    """Return the decoder in whose first layers image features are added (deepstack); None if there is none."""
    parts = (part for part in model.modules() if hasattr(part, "_deepstack_process") and hasattr(part, "layers"))
    return next(parts, None)


def _deepstack_layers(model: PreTrainedModel) -> int | None:
    if deepstack_part(model) is None:
        return None
    return len(getattr(model.config.vision_config, "deepstack_visual_indexes", ()))


def _types_of_blocks(model: PreTrainedModel) -> str | None:
    """Return the name of the token types by which tokens of an image attend to each other; None if they do not."""
    if model.config.model_type == "paligemma":
        return PREFIX
    parts = {type(part).__module__ for part in model.children()} | {type(model).__module__}
    if not any(hasattr(sys.modules[name], "create_masks_for_vision_model") for name in parts):
        return None
    if model.config.model_type == "gemma3":
        return "token_type_ids"
    is_used = getattr(model.config.get_text_config(), "use_bidirectional_attention", None) == "vision"
    return "mm_token_type_ids" if is_used and reads_images(model) else None

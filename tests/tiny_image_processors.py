"""Processors of tiny models that read images, as transformers loads them from files."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from transformers import PreTrainedModel

from tests.architectures.image_prompts import IMAGE
from tests.tiny_tokenizers import tiny_tokenizer

_CHAT = (
    "{% for message in messages %}{{ message['role'] }}:"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def tiny_processor(model: PreTrainedModel) -> Any:
    """The processor of a model that `tiny_image_model` made."""
    kind, vision = model.config.model_type, model.config.vision_config
    if kind.startswith("qwen"):
        return _qwen(kind, vision)
    tokenizer = tiny_tokenizer({IMAGE: "<image>", 89: "<fake_token_around_image>", 88: "<global-img>"})
    size = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
    chat = _CHAT.replace("IMAGE", "<image>")
    if kind == "llava":
        from transformers import LlavaProcessor
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        images = CLIPImageProcessorPil(size={"height": size, "width": size}, do_center_crop=False)
        options = {"patch_size": vision.patch_size, "vision_feature_select_strategy": "default"}
        return LlavaProcessor(images, tokenizer, chat_template=chat, num_additional_image_tokens=1, **options)
    if kind == "idefics3":
        from transformers import Idefics3Processor
        from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

        images = Idefics3ImageProcessorPil(size={"longest_edge": 2 * size}, max_image_size={"longest_edge": size})
        count = (size // vision.patch_size) ** 2 // model.config.scale_factor**2
        return Idefics3Processor(images, tokenizer, image_seq_len=count, chat_template=chat)
    raise NotImplementedError(kind)


def _qwen(kind: str, vision: Any) -> Any:
    from transformers import Qwen2_5_VLProcessor, Qwen2VLVideoProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    names = {IMAGE: "<|image_pad|>", 89: "<|video_pad|>", 88: "<|vision_start|>", 87: "<|vision_end|>"}
    step = vision.patch_size * vision.spatial_merge_size
    images = Qwen2VLImageProcessorPil(
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
        size={"shortest_edge": step * step, "longest_edge": 24 * step * step},
    )
    chat = _CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    return Qwen2_5_VLProcessor(images, tiny_tokenizer(names), Qwen2VLVideoProcessor(), chat_template=chat)


def drawn_image(width: int, height: int, seed: int = 0) -> Image.Image:
    """A random picture in RGB."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))

"""Processors of tiny models that read images, as transformers loads them from files."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.architectures.image_prompts import IMAGE
from tests.tiny_tokenizers import tiny_tokenizer

_CHAT = (
    "{% for message in messages %}{{ message['role'] }}:"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def tiny_processor(model: PreTrainedModel) -> Any:
    """Return the processor of a model that `tiny_image_model` made."""
    kind, vision = model.config.model_type, model.config.vision_config
    if kind.startswith("qwen"):
        return _qwen(kind, vision)
    if (made := _OTHERS.get(kind)) is not None:
        return made(model)
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


def _of_patches(kind: Any, vision: Any) -> Any:
    """Return an image processor of a kind that writes patches of images of any size."""
    step = vision.patch_size * vision.spatial_merge_size
    return kind(
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
        size={"shortest_edge": step * step, "longest_edge": 24 * step * step},
    )


def _qwen(kind: str, vision: Any) -> Any:
    from transformers import Qwen2_5_VLProcessor, Qwen2VLVideoProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    names = {IMAGE: "<|image_pad|>", 89: "<|video_pad|>", 88: "<|vision_start|>", 87: "<|vision_end|>"}
    images = _of_patches(Qwen2VLImageProcessorPil, vision)
    chat = _CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    return Qwen2_5_VLProcessor(images, tiny_tokenizer(names), Qwen2VLVideoProcessor(), chat_template=chat)


def _mistral(model: PreTrainedModel) -> Any:
    from transformers import PixtralProcessor
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

    vision, merge = model.config.vision_config, model.config.spatial_merge_size
    step = vision.patch_size * merge
    images = PixtralImageProcessorPil(patch_size=step, size={"longest_edge": 4 * step})
    tokenizer = tiny_tokenizer({IMAGE: "[IMG]", 89: "[IMG_BREAK]", 88: "[IMG_END]"})
    options = {"patch_size": vision.patch_size, "spatial_merge_size": merge}
    return PixtralProcessor(images, tokenizer, chat_template=_CHAT.replace("IMAGE", "[IMG]"), **options)


def _llava_next(model: PreTrainedModel) -> Any:
    from transformers import LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    vision = model.config.vision_config
    side = vision.image_size
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_grid_pinpoints=model.config.image_grid_pinpoints,
    )
    options = {"patch_size": vision.patch_size, "vision_feature_select_strategy": "default"}
    tokenizer, chat = tiny_tokenizer({IMAGE: "<image>"}), _CHAT.replace("IMAGE", "<image>")
    return LlavaNextProcessor(images, tokenizer, chat_template=chat, num_additional_image_tokens=1, **options)


def _llava_onevision(model: PreTrainedModel) -> Any:
    from transformers import LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    vision = model.config.vision_config
    side = vision.image_size
    images = LlavaOnevisionImageProcessorPil(
        size={"height": side, "width": side}, image_grid_pinpoints=model.config.image_grid_pinpoints
    )
    tokenizer, chat = tiny_tokenizer({IMAGE: "<image>", 89: "<video>"}), _CHAT.replace("IMAGE", "<image>")
    return LlavaOnevisionProcessor(
        images,
        tokenizer,
        LlavaOnevisionVideoProcessor(size={"height": side, "width": side}),
        num_image_tokens=(side // vision.patch_size) ** 2,
        vision_feature_select_strategy="full",
        chat_template=chat,
        vision_aspect_ratio=model.config.vision_aspect_ratio,
    )


def _gemma_tokenizer() -> Any:
    names = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    names |= {"audio_token": "<audio_soft_token>", "boa_token": "<start_of_audio>", "eoa_token": "<end_of_audio>"}
    return named_tokenizer(names)


def named_tokenizer(names: dict[str, str]) -> Any:
    """Return a tokenizer that has attributes for its special tokens; the first is that of an image."""
    plain = tiny_tokenizer(dict(zip(range(IMAGE, IMAGE - len(names), -1), names.values(), strict=True)))
    special = {name: getattr(plain, name) for name in ("pad_token", "bos_token", "eos_token")}
    return PreTrainedTokenizerFast(tokenizer_object=plain.backend_tokenizer, **special, extra_special_tokens=names)


def _gemma3(model: PreTrainedModel) -> Any:
    from transformers import Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    side = model.config.vision_config.image_size
    images = Gemma3ImageProcessorPil(size={"height": side, "width": side})
    chat = "{{ bos_token }}" + _CHAT.replace("IMAGE", "<start_of_image>")
    return Gemma3Processor(images, _gemma_tokenizer(), chat, image_seq_length=model.config.mm_tokens_per_image)


def _gemma4(model: PreTrainedModel) -> Any:
    from transformers import Gemma4AudioFeatureExtractor, Gemma4Processor, Gemma4VideoProcessor
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    vision = model.config.vision_config
    images = Gemma4ImageProcessorPil(
        patch_size=vision.patch_size, pooling_kernel_size=vision.pooling_kernel_size, max_soft_tokens=70
    )
    chat = "{{ bos_token }}" + _CHAT.replace("IMAGE", "<image_soft_token>")
    audio, videos = Gemma4AudioFeatureExtractor(), Gemma4VideoProcessor()
    return Gemma4Processor(audio, images, _gemma_tokenizer(), videos, chat, image_seq_length=70)


def _glm4v(model: PreTrainedModel) -> Any:
    from transformers import Glm4vProcessor, Glm4vVideoProcessor
    from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

    images = _of_patches(Glm4vImageProcessorPil, model.config.vision_config)
    names = {IMAGE: "<|image|>", 89: "<|video|>", 88: "<|begin_of_image|>", 87: "<|end_of_image|>"}
    names |= {86: "<|begin_of_video|>", 85: "<|end_of_video|>"}
    chat = _CHAT.replace("IMAGE", "<|begin_of_image|><|image|><|end_of_image|>")
    return Glm4vProcessor(images, tiny_tokenizer(names), Glm4vVideoProcessor(), chat_template=chat)


def _idefics2(model: PreTrainedModel) -> Any:
    from transformers import Idefics2Processor
    from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

    images = Idefics2ImageProcessorPil(size={"shortest_edge": 20, "longest_edge": 60}, do_image_splitting=False)
    tokenizer = tiny_tokenizer({IMAGE: "<image>", 89: "<fake_token_around_image>", 88: "<end_of_utterance>"})
    count = model.config.perceiver_config.resampler_n_latents
    return Idefics2Processor(images, tokenizer, image_seq_len=count, chat_template=_CHAT.replace("IMAGE", "<image>"))


def _paligemma(model: PreTrainedModel) -> Any:
    from transformers import PaliGemmaProcessor
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    vision = model.config.vision_config
    side, count = vision.image_size, (vision.image_size // vision.patch_size) ** 2
    images = SiglipImageProcessorPil(size={"height": side, "width": side}, image_seq_length=count)
    tokenizer, chat = tiny_tokenizer({IMAGE: "<image>"}), _CHAT.replace("IMAGE", "<image>")
    return PaliGemmaProcessor(images, tokenizer, chat_template=chat)


def _tiles(model: PreTrainedModel) -> Any:
    """Return the image processor of models that cut images into tiles as GOT-OCR2 does."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    side = _side(model)
    return GotOcr2ImageProcessorPil(size={"height": side, "width": side}, crop_to_patches=True, max_patches=4)


def _side(model: PreTrainedModel) -> int:
    size: Any = model.config.vision_config.image_size
    return int(size if isinstance(size, int) else size[0])


def _patch(model: PreTrainedModel) -> int:
    size: Any = model.config.vision_config.patch_size
    return int(size if isinstance(size, int) else size[0])


def _internvl(model: PreTrainedModel) -> Any:
    from transformers import InternVLProcessor, InternVLVideoProcessor

    names = {"context_image_token": "<IMG_CONTEXT>", "start_image_token": "<img>", "end_image_token": "</img>"}
    tokenizer, count = named_tokenizer({**names, "video_token": "<video>"}), _side(model) // _patch(model)
    return InternVLProcessor(
        _tiles(model),
        tokenizer,
        InternVLVideoProcessor(),
        image_seq_length=int((count * model.config.downsample_ratio) ** 2),
        chat_template=_CHAT.replace("IMAGE", "<IMG_CONTEXT>"),
    )


def _aya(model: PreTrainedModel) -> Any:
    from transformers import AyaVisionProcessor

    names = ("<|IMG_PATCH|>", "<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_LINE_BREAK|>")
    tokenizer = tiny_tokenizer(dict(zip(range(IMAGE, IMAGE - len(names), -1), names, strict=True)))
    options = {
        "patch_size": _patch(model),
        "img_size": _side(model),
        "downsample_factor": model.config.downsample_factor,
    }
    return AyaVisionProcessor(_tiles(model), tokenizer, chat_template=_CHAT.replace("IMAGE", "<image>"), **options)


def _janus(model: PreTrainedModel) -> Any:
    from transformers import JanusProcessor
    from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

    side = _side(model)
    names = {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
    return JanusProcessor(
        JanusImageProcessorPil(size={"height": side, "width": side}),
        named_tokenizer(names),
        chat_template=_CHAT.replace("IMAGE", "<image_placeholder>"),
        num_image_tokens=(side // _patch(model)) ** 2,
    )


def _lighton(model: PreTrainedModel) -> Any:
    from transformers import LightOnOcrProcessor
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

    patch, merge = _patch(model), model.config.spatial_merge_size
    images = PixtralImageProcessorPil(patch_size=patch * merge, size={"longest_edge": 4 * patch * merge})
    names = {"image_token": "<|image_pad|>", "image_break_token": "<|vision_pad|>", "image_end_token": "<|vision_end|>"}
    options = {
        "patch_size": patch,
        "spatial_merge_size": merge,
        "chat_template": _CHAT.replace("IMAGE", "<|image_pad|>"),
    }
    return LightOnOcrProcessor(images, named_tokenizer(names), **options)


def _kimi(model: PreTrainedModel) -> Any:
    from transformers import Kimi_K25Processor, Kimi_K25VideoProcessor
    from transformers.models.kimi_k25.image_processing_kimi_k25 import Kimi_K25ImageProcessor

    merge = model.config.vision_config.merge_kernel_size
    options = {"patch_size": _patch(model), "merge_size": merge if isinstance(merge, int) else merge[0]}
    tokenizer = named_tokenizer({"image_token": "<|media_pad|>", "video_token": "<|kimi_k25_video_placeholder|>"})
    chat = _CHAT.replace("IMAGE", "<|media_pad|>")
    return Kimi_K25Processor(
        Kimi_K25ImageProcessor(max_patches=64, **options), tokenizer, Kimi_K25VideoProcessor(), chat_template=chat
    )


def _paddle(model: PreTrainedModel) -> Any:
    from transformers import PaddleOCRVLProcessor
    from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import PaddleOCRVLImageProcessorPil

    patch, merge = _patch(model), model.config.vision_config.spatial_merge_size
    size = {"shortest_edge": (patch * merge) ** 2, "longest_edge": 24 * (patch * merge) ** 2}
    images = PaddleOCRVLImageProcessorPil(patch_size=patch, merge_size=merge, size=size)
    names = {"image_token": "<|IMAGE_PLACEHOLDER|>", "start_token": "<|IMAGE_START|>", "end_token": "<|IMAGE_END|>"}
    chat = _CHAT.replace("IMAGE", "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>")
    return PaddleOCRVLProcessor(images, named_tokenizer(names), chat_template=chat)


def _cohere2(model: PreTrainedModel) -> Any:
    from transformers import Cohere2VisionProcessor
    from transformers.models.cohere2_vision.image_processing_cohere2_vision import Cohere2VisionImageProcessor

    side = _side(model)
    count = side // _patch(model) // model.config.downsample_factor
    names = {"image_token": "<|IMG_PATCH|>", "boi_token": "<|START_OF_IMG|>", "eoi_token": "<|END_OF_IMG|>"}
    tokenizer = named_tokenizer({**names, "img_line_break_token": "<|IMG_LINE_BREAK|>"})
    images = Cohere2VisionImageProcessor(
        size={"height": side, "width": side}, patch_size=count, crop_to_patches=True, max_patches=4
    )
    return Cohere2VisionProcessor(images, tokenizer, chat_template=_CHAT.replace("IMAGE", "<|IMG_PATCH|>"))


def _got(model: PreTrainedModel) -> Any:
    from transformers import GotOcr2Processor

    names = ("<imgpad>", "<img>", "</img>", "<|im_start|>", "<|im_end|>")
    tokenizer = tiny_tokenizer(dict(zip(range(IMAGE, IMAGE - len(names), -1), names, strict=True)))
    return GotOcr2Processor(_tiles(model), tokenizer, chat_template=_CHAT.replace("IMAGE", "<img><imgpad></img>"))


def _mllama(model: PreTrainedModel) -> Any:
    from transformers import MllamaProcessor
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    side = _side(model)
    images = MllamaImageProcessorPil(size={"height": side, "width": side})
    chat = "{{ bos_token }}" + _CHAT.replace("IMAGE", "<|image|>")
    return MllamaProcessor(images, tiny_tokenizer({IMAGE: "<|image|>", 89: "<|python_tag|>"}), chat_template=chat)


_OTHERS = {
    "mllama": _mllama,
    "internvl": _internvl,
    "aya_vision": _aya,
    "janus": _janus,
    "lighton_ocr": _lighton,
    "kimi_k25": _kimi,
    "paddleocr_vl": _paddle,
    "cohere2_vision": _cohere2,
    "got_ocr2": _got,
    "paligemma": _paligemma,
    "mistral3": _mistral,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "glm4v": _glm4v,
    "idefics2": _idefics2,
}


def drawn_image(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return a random picture in RGB."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))

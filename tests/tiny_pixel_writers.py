"""Tiny random encoder-decoders that write down what an image shows, and their processors."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipProcessor,
    DonutProcessor,
    DonutSwinConfig,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    GPT2Config,
    MBartConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrOCRConfig,
    TrOCRProcessor,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.donut.image_processing_pil_donut import DonutImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from tests.tiny_tokenizers import tiny_tokenizer

START, PAD, IMAGE, _VOCABULARY = 1, 0, 90, 100
_BART = {"layers": 2, "attention_heads": 4, "ffn_dim": 64}
_WIDTHS = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}


def tiny_pixel_writer(name: str) -> PreTrainedModel:
    """Return a model by name: `trocr` (a projection between the two widths), `donut`, or `vit-gpt2`."""
    encoder: PreTrainedConfig = ViTConfig(**_WIDTHS, image_size=32, patch_size=8)
    decoder: PreTrainedConfig
    sizes: dict[str, Any] = {"vocab_size": _VOCABULARY, "pad_token_id": PAD, "bos_token_id": START, "eos_token_id": 2}
    layers = {"d_model": 48, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}
    if name == "trocr":
        decoder = TrOCRConfig(**sizes, **layers, max_position_embeddings=64)
    elif name == "donut":
        encoder = DonutSwinConfig(image_size=[64, 32], embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
        decoder = MBartConfig(**sizes, **{**layers, "d_model": 32}, max_position_embeddings=64)
    else:
        decoder = GPT2Config(**sizes, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = START, PAD
    torch.manual_seed(0)
    model = VisionEncoderDecoderModel(config).eval()
    with torch.no_grad():  # so wide that answers depend on images
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    settings = model.generation_config
    settings.decoder_start_token_id, settings.pad_token_id, settings.eos_token_id = START, PAD, 2
    return model


def tiny_florence() -> PreTrainedModel:
    """Return a tiny Florence-2, whose images are of 768 x 768 and 10 tokens; its two tables of embeddings differ."""
    vision = {"depths": [1, 1], "patch_size": [16, 16], "patch_stride": [16, 16], "patch_padding": [0, 0]}
    vision |= {"patch_prenorm": [False, True], "embed_dim": [8, 16], "num_heads": [2, 2], "num_groups": [2, 2]}
    vision |= {"window_size": 4, "projection_dim": 32}
    heads = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in _BART.items()}
    special = {"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": 2, "decoder_start_token_id": 2}
    text = {"vocab_size": _VOCABULARY, "d_model": 32, "max_position_embeddings": 128, **heads, **special}
    text |= {"model_type": "bart", "forced_eos_token_id": None}
    config = Florence2Config(vision_config=vision, text_config=text, image_token_id=IMAGE)
    model = Florence2ForConditionalGeneration(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():  # so wide that answers depend on images
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    settings = model.generation_config
    settings.decoder_start_token_id, settings.pad_token_id, settings.eos_token_id = 2, PAD, 2
    return model


def tiny_florence_processor() -> Florence2Processor:
    """Return its processor."""
    images = CLIPImageProcessorPil(size={"height": 768, "width": 768}, do_center_crop=False, image_seq_length=10)
    known = tiny_tokenizer({IMAGE: "<image>"})
    special = {name: getattr(known, name) for name in ("pad_token", "bos_token", "eos_token")}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=known.backend_tokenizer, **special, extra_special_tokens={"image_token": "<image>"}
    )
    return Florence2Processor(images, tokenizer)


def tiny_writers_processor(name: str) -> Any:
    """Return the processor of such a model; for `vit-gpt2`, which has none, its tokenizer and its image processor."""
    if name == "donut":
        images = DonutImageProcessorPil(size={"height": 64, "width": 32})
        return DonutProcessor(images, tiny_tokenizer())
    pair = ViTImageProcessorPil(size={"height": 32, "width": 32}), tiny_tokenizer()
    return TrOCRProcessor(*pair) if name == "trocr" else pair


def tiny_captioner() -> BlipForConditionalGeneration:
    """Return a tiny BLIP that captions images; its answers end at a separator, which is not its end token."""
    text = {**_WIDTHS, "num_hidden_layers": 2, "vocab_size": _VOCABULARY, "max_position_embeddings": 64}
    text |= {"bos_token_id": START, "eos_token_id": 3, "sep_token_id": 2, "pad_token_id": PAD}
    vision = {**_WIDTHS, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision)).eval()
    wide = {"position_embeddings": 2.0, "attention.self.value": 0.6, "crossattention.self.value": 0.1}
    with torch.no_grad():  # so that answers depend on images and on the tokens before
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=next((std for part, std in wide.items() if f".{part}." in name), 0.3))
    return model


def tiny_captioners_processor() -> BlipProcessor:
    """Return its processor."""
    return BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tiny_tokenizer())

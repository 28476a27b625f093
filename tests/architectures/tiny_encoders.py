"""Tiny random models of every encoder class of transformers, by the mapping that lists it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from tests.architectures.tiny_configs import small_fields, tiny_model
from tests.architectures.tiny_decoders import own_fields

_FEATURES = "feature-extraction"
# task: transformers' mapping, from the type of a model to its class
_MAPPINGS: dict[str, Mapping[str, Any]] = {
    "fill-mask": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "text-classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "token-classification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "question-answering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "image-classification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "audio-classification": modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    _FEATURES: modeling_auto.MODEL_MAPPING_NAMES,
}
_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_INPUTS = ("input_ids", "pixel_values", "input_values", "input_features")


@dataclass(frozen=True)
class Listed:
    """A class and where transformers lists it.

    Attributes:
        name: The class.
        task: The task of its mapping.
    """

    name: str
    task: str


def encoder_classes() -> tuple[Listed, ...]:
    """Return every class with a head for classification or masked words, and the bare model of every other encoder."""
    found: dict[str, Listed] = {}
    for listed in _listed(dir(transformers)):
        found.setdefault(listed.name, listed)
    return tuple(found.values())


def task_of(name: str) -> str | None:
    """Return the task of a class of `encoder_classes()`, importing none of the others."""
    return next((listed.task for listed in _listed([name])), None)


def _listed(names: Iterable[str]) -> Iterator[Listed]:
    """Yield those of some classes that transformers lists for a task, first that of a head."""
    chosen = set(names)
    for task, mapping in _MAPPINGS.items():
        for kind, mapped in mapping.items():
            for name in (mapped,) if isinstance(mapped, str) else mapped:
                if name in chosen and (task != _FEATURES or skipped(kind) is None):
                    yield Listed(name, task)


def skipped(kind: str) -> str | None:
    """Return the reason to leave out the bare model of a type, or None.

    Args:
        kind: Type of the model, a key of transformers' mappings.
    """
    if kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "a decoder, which `python -m benchmarks decoders` checks"
    if any(kind in mapping for task, mapping in _MAPPINGS.items() if task != _FEATURES):
        return "its classes with a head are checked"
    config = getattr(transformers, CONFIG_MAPPING_NAMES.get(kind, ""), None)
    if config is None or any(kind in mapping for mapping in _DECODING):
        return "an encoder-decoder"
    if len(config.sub_configs) > 1:
        return "of several models"
    names = modeling_auto.MODEL_MAPPING_NAMES[kind]
    model_class = getattr(transformers, names if isinstance(names, str) else names[0], None)
    takes = getattr(model_class, "main_input_name", "input_ids")
    if takes not in _INPUTS:
        return "of neither a text, an image nor a sound alone"
    parameters = {} if model_class is None else inspect.signature(model_class.forward).parameters
    required = {name for name, each in parameters.items() if each.default is each.empty and each.kind not in _VARIABLE}
    is_alone = model_class is None or (takes in parameters and required <= {"self", takes})
    return None if is_alone else "a part of a model, which other parts give its inputs"


def skipped_types() -> dict[str, list[str]]:
    """Return the types whose bare model is left out, by the reason."""
    types: dict[str, list[str]] = {}
    for kind in modeling_auto.MODEL_MAPPING_NAMES:
        reason = skipped(kind)
        if reason is not None:
            types.setdefault(reason, []).append(kind)
    return types


_DECODING = (
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
)


def tiny_encoder(name: str, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """Return a randomly initialised tiny model, in evaluation mode.

    Args:
        name: Its class, such as `"BertForMaskedLM"`.
        seed: Seed of its weights.
        **fields: Configuration fields to set besides.
    """
    model_class = getattr(transformers, name)
    config_class = model_class.config_class
    own, _ = _EXCEPTIONS.get(name.partition("For")[0].removesuffix("Model"), ({}, ""))
    default = config_class()
    small = small_fields(default, is_decoder=False, layers=1)
    angles = getattr(default, "rope_parameters", None)
    if isinstance(angles, dict) and ("mrope_section" in angles or name in _OF_SECTIONS):
        small["rope_parameters"] = {**angles, "mrope_section": [2, 1, 1]}  # together half of a head
    config: PreTrainedConfig = config_class(**{**small, **own_fields(name), **own, **fields})
    for part in (config, config.get_text_config()):
        for field, token in _NEEDED.items():
            if getattr(part, field, None) is None:
                setattr(part, field, token)
    return tiny_model(model_class, config, seed)


_NEEDED = {"pad_token_id": 0, "decoder_start_token_id": 1}  # a classifier finds the end of a text by its padding
# their default leaves out how many angles tell time, height and width, and the model then takes those of its real size
_OF_SECTIONS = {"Glm4vTextModel", "GlmImageTextModel", "GlmOcrTextModel", "Qwen2VLTextModel", "Qwen2_5_VLTextModel"}
_WINDOWS = {"window_size": 2, "image_size": 64}, "its last stage has to be as wide as a window"
_PERCEIVER = {"num_latents": 8, "d_latents": 32, "d_model": 32, "num_self_attends_per_block": 1}
_PERCEIVER_HEADS = {"num_self_attention_heads": 2, "num_cross_attention_heads": 1}
# what no rule on names tells: architecture, fields, and why
_EXCEPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "Bit": ({"num_groups": 2}, "groups have to divide its channels"),
    "AST": ({"max_length": 64}, "its spectrograms have a length of their own"),
    "CohereCompassText": (
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
        "its default has no angles",
    ),
    "Cvt": ({"depth": [3, 3, 3], "embed_dim": [8, 8, 8]}, "its rates of dropped paths are taken by the stage"),
    "LayoutLMv3": ({"coordinate_size": 6, "shape_size": 4}, "its boxes are as wide as its words, in six parts"),
    "Lilt": ({"hidden_size": 48}, "its boxes are as wide as its words, in six parts"),
    "Mistral4": ({"head_dim": 16}, "half of a head is rotated"),
    "MobileViTV2": ({"image_size": 256}, "an image has to have two patches after five halvings"),
    "NeoMME": ({"head_dim": 16}, "its angles are a quarter of a head"),
    "TextNet": ({"stem_out_channels": 32}, "its stem is as wide as its first stage"),
    "Esm": ({"vocab_size": 96}, "its default has no vocabulary"),
    "GPTNeo": ({"num_layers": 2, "max_position_embeddings": 64}, "its kinds of layers are written as a product"),
    "GraniteSpeech5": ({"context_size": 16}, "a context has to fit its positions"),
    "GraniteSpeech5Encoder": ({"context_size": 16}, "a context has to fit its positions"),
    "Perceiver": ({**_PERCEIVER, **_PERCEIVER_HEADS}, "its latents have names of their own"),
    "Reformer": (
        {
            "axial_pos_embds_dim": [8, 24],
            "axial_pos_shape": [8, 8],
            "attn_layers": ["local", "lsh"],
            "num_hidden_layers": 2,
            "is_decoder": False,
        },
        "its positions are products",
    ),
    "DonutSwin": _WINDOWS,
    "MaskFormerSwin": _WINDOWS,
    "MobileBert": (
        {"hidden_size": 32, "true_hidden_size": 16, "intra_bottleneck_size": 16, "embedding_size": 16},
        "its layers have an inner width",
    ),
    "Swin": _WINDOWS,
    "Swinv2": _WINDOWS,
}

"""The transformers class to load a checkpoint with."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING

from gralora_fx.config.tasks import check_task
from gralora_fx.errors import TraceError, warn_caller
from gralora_fx.tracing.inputs.samples import task_of_class
from gralora_fx.tracing.sentence_encoder import SENTENCE_TASK

_log = logging.getLogger(__name__)

_AUTO_CLASSES = {
    "feature-extraction": "AutoModel",
    "fill-mask": "AutoModelForMaskedLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "text-generation": "AutoModelForCausalLM",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "automatic-speech-recognition": "AutoModelForSpeechSeq2Seq",
    "image-classification": "AutoModelForImageClassification",
}
_CLASSIFIERS = ("text-classification", "token-classification", "question-answering", "image-classification")


def class_for(config: PreTrainedConfig, task: str | None) -> Any:
    """The transformers class for a task, or the one that a configuration names.

    Args:
        config: The checkpoint's configuration.
        task: One of optimum's task names, or None.

    Raises:
        TraceError: The task is unknown, or the configuration names no class.
    """
    check_task(task)
    if task == SENTENCE_TASK:
        return _encoder_class(config)
    if task is not None:
        return getattr(transformers, _AUTO_CLASSES[task.removesuffix("-with-past")])
    name = _saved_class(config)
    if name is None:
        return transformers.AutoModel
    if not hasattr(transformers, name):
        raise TraceError(f"the checkpoint is a {name}, which transformers does not have; give its task")
    return getattr(transformers, name)


def _encoder_class(config: PreTrainedConfig) -> Any:
    """The class of a bare model; of an encoder-decoder only the encoder, such as `T5EncoderModel`."""
    encoder = MODEL_FOR_TEXT_ENCODING_MAPPING.get(type(config), None)
    if encoder is not None and encoder.__name__.endswith("EncoderModel"):
        return encoder
    if config.is_encoder_decoder:
        raise TraceError(
            f"{config.model_type} is an encoder-decoder, whose encoder transformers does not load alone; "
            f"{SENTENCE_TASK} is for encoders, decoders and T5"
        )
    return transformers.AutoModel


def warn_of_another_head(model: PreTrainedModel, origin: str | Path) -> None:
    """Warn if a head trained for one task is used for another, since both classes may have the same tensors.

    Args:
        model: A model loaded from a complete checkpoint.
        origin: Where the checkpoint is, for the message.
    """
    saved = _saved_class(model.config)
    saved_task, requested = task_of_class(saved or ""), task_of_class(type(model).__name__)
    if saved_task != requested and saved_task in _CLASSIFIERS and requested in _CLASSIFIERS:
        warn_caller(
            f"{origin} was saved as {saved}: its head was trained for {saved_task}, not for {requested}; take "
            f"task={saved_task!r}"
        )


def _saved_class(config: PreTrainedConfig) -> str | None:
    """The class that a configuration names."""
    names = config.architectures
    if not names:
        return None
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise TraceError(
            f"architectures in config.json is {names!r}, not a list of class names; repair or copy the file"
        )
    return names[0]

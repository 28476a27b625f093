"""Which class of transformers a checkpoint is loaded as."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from gralora_fx.config.tasks import check_task
from gralora_fx.errors import TraceError
from gralora_fx.tracing.inputs.samples import task_of_class

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
    """The class of transformers for a task, or the one that a configuration names.

    Args:
        config: The checkpoint's configuration.
        task: One of optimum's task names, or None.

    Raises:
        TraceError: The task is unknown, or the configuration names no class.
    """
    check_task(task)
    if task is not None:
        return getattr(transformers, _AUTO_CLASSES[task.removesuffix("-with-past")])
    name = _saved_class(config)
    if name is None:
        return transformers.AutoModel
    if not hasattr(transformers, name):
        raise TraceError(f"the checkpoint is a {name}, which transformers does not have; give its task")
    return getattr(transformers, name)


def warn_of_another_head(model: PreTrainedModel, origin: str | Path) -> None:
    """Warn where a head that was trained for one task is to do another: two classes may have the same tensors.

    Args:
        model: A model whose checkpoint had all of its tensors.
        origin: Where the checkpoint is, for the message.
    """
    saved = _saved_class(model.config)
    own, asked = task_of_class(saved or ""), task_of_class(type(model).__name__)
    if own != asked and own in _CLASSIFIERS and asked in _CLASSIFIERS:
        _log.warning(
            "%s was saved as %s: its head was trained for %s, not for %s; take --task %s",
            origin,
            saved,
            own,
            asked,
            own,
        )


def _saved_class(config: PreTrainedConfig) -> str | None:
    """The class that a configuration names."""
    names = config.architectures
    if not names:
        return None
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise TraceError(f"architectures in config.json is {names!r}, not a list of class names; mend or copy the file")
    return names[0]

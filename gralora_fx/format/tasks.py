"""The tasks that a model can be traced for, by optimum's names, and those that adapters are trained for, by PEFT's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gralora_fx.errors import ConfigError, TraceError

if TYPE_CHECKING:
    from gralora_fx.core.config.adapter_config import AdapterConfig

TASKS = (
    "feature-extraction",
    "sentence-similarity",
    "fill-mask",
    "text-classification",
    "token-classification",
    "question-answering",
    "text-generation",
    "text-generation-with-past",
    "image-text-to-text",
    "image-text-to-text-with-past",
    "text2text-generation",
    "text2text-generation-with-past",
    "automatic-speech-recognition",
    "automatic-speech-recognition-with-past",
    "image-classification",
)
# tasks of an encoder and a decoder with a cache, which are two graphs
ENCODER_DECODERS = ("text2text-generation-with-past", "automatic-speech-recognition-with-past")
# those of a decoder, which is one graph: of ids, and of ids with embeddings of images beside them
DECODERS = ("text-generation-with-past", "image-text-to-text-with-past")
GENERATING = (*DECODERS, *ENCODER_DECODERS)


_PEFT_TASKS = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "FEATURE_EXTRACTION": "feature-extraction",
}
# other tasks for which an adapter of a task type may be used
_ALIKE = {
    "SEQ_CLS": ("image-classification",),
    "CAUSAL_LM": ("image-text-to-text",),
    "SEQ_2_SEQ_LM": ("automatic-speech-recognition",),
    "FEATURE_EXTRACTION": ("sentence-similarity",),
}
_WITH_CACHE = tuple(task.removesuffix("-with-past") for task in GENERATING)


def check_task(task: str | None) -> None:
    """Check the name of a task."""
    if task is not None and task not in TASKS:
        raise TraceError(f"unknown task {task!r}; take one of {', '.join(TASKS)}")


def with_past(task: str) -> str:
    """The `-with-past` variant of a task, if it has one."""
    return f"{task}-with-past" if task in _WITH_CACHE else task


def requested_task(task_type: object, task: str | None, *, with_cache: bool) -> str | None:
    """The task that `load_traced` will trace for, if it can be told without the base."""
    if task is not None:
        return task
    adapter_task = _PEFT_TASKS.get(str(task_type))
    if adapter_task == "feature-extraction":
        return None  # sentence-similarity, if the base is a sentence encoder
    return with_past(adapter_task) if with_cache and adapter_task else adapter_task


def task_of(config: AdapterConfig, task: str | None, adapter: str) -> str | None:
    """The requested task, checked against the adapter's; or the adapter's own."""
    check_adapter_task(config.task_type, task, adapter)
    return task or _PEFT_TASKS.get(config.task_type or "")


def check_adapter_task(task_type: str | None, task: str | None, adapter: str) -> None:
    """Check that an adapter may be used for a task."""
    adapter_task = _PEFT_TASKS.get(task_type or "")
    if task is None or adapter_task is None:
        return
    check_task(task)
    if task.removesuffix("-with-past") not in (adapter_task, *_ALIKE.get(task_type or "", ())):
        raise ConfigError(
            f"the adapter {adapter} was trained for task_type {task_type}, which is task={adapter_task!r}, not {task}; "
            f"give task={adapter_task!r}, or another adapter"
        )

"""The tasks that a model can be traced for, by optimum's names."""

from __future__ import annotations

from gralora_fx.errors import TraceError

TASKS = (
    "feature-extraction",
    "sentence-similarity",
    "fill-mask",
    "text-classification",
    "token-classification",
    "question-answering",
    "text-generation",
    "text-generation-with-past",
    "text2text-generation",
    "text2text-generation-with-past",
    "automatic-speech-recognition",
    "automatic-speech-recognition-with-past",
    "image-classification",
)
# tasks of an encoder and a decoder with a cache, which are two graphs
ENCODER_DECODERS = ("text2text-generation-with-past", "automatic-speech-recognition-with-past")


def check_task(task: str | None) -> None:
    """Check the name of a task.

    Raises:
        TraceError: It is unknown; the message lists the tasks.
    """
    if task is not None and task not in TASKS:
        raise TraceError(f"unknown task {task!r}; take one of {', '.join(TASKS)}")

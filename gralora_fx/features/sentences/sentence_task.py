"""The task of a sentence encoder."""

from __future__ import annotations

from gralora_fx.format.tasks import Task

SENTENCE_TASK = "sentence-similarity"
TASKS = (Task(SENTENCE_TASK, inputs=("input_ids",), adapters=("FEATURE_EXTRACTION",), encoder_alone=True),)

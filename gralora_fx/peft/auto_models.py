"""`AutoPeftModel...`: the base that an adapter's configuration names, loaded by transformers, with the adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import transformers

from gralora_fx.core.methods import read_config
from gralora_fx.errors import ConfigError
from gralora_fx.peft.peft_configs import TaskType
from gralora_fx.peft.peft_model import CLASSES, PeftModel


class AutoPeftModel:
    """Loads an adapter with its base; the `task_type` of its configuration selects transformers' class."""

    _task: ClassVar[str | None] = None  # None for the configuration's
    _bases: ClassVar[dict[str, str]] = {
        "CAUSAL_LM": "AutoModelForCausalLM",
        "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
        "SEQ_CLS": "AutoModelForSequenceClassification",
        "TOKEN_CLS": "AutoModelForTokenClassification",
        "QUESTION_ANS": "AutoModelForQuestionAnswering",
        "FEATURE_EXTRACTION": "AutoModel",
    }

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: Any = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load the base model that an adapter names, and the adapter.

        Args:
            pretrained_model_name_or_path: Directory or hub id of the adapter.
            adapter_name: Name to give the adapter.
            is_trainable: Whether it trains.
            config: See `PeftModel.from_pretrained`.
            revision: Revision of the adapter's hub repository.
            **kwargs: Arguments for the base model's `from_pretrained`.

        Raises:
            ConfigError: The configuration is missing or invalid, or names no base or no task.
        """
        saved = read_config(pretrained_model_name_or_path, revision=revision)
        task = cls._task or saved.task_type or ""
        base = cls._bases.get(task)
        if base is None or saved.base_model_name_or_path is None:
            lacking = "task_type" if base is None else "base_model_name_or_path"
            raise ConfigError(
                f"{pretrained_model_name_or_path}: adapter_config.json has no {lacking}; load the base yourself and "
                "call PeftModel.from_pretrained(model, directory)"
            )
        model = getattr(transformers, base).from_pretrained(
            saved.base_model_name_or_path, **{"revision": saved.revision or "main", **kwargs}
        )
        return CLASSES.get(task, PeftModel).from_pretrained(
            model,
            pretrained_model_name_or_path,
            adapter_name=adapter_name,
            is_trainable=is_trainable,
            config=config,
            revision=revision,
        )


class AutoPeftModelForCausalLM(AutoPeftModel):
    """Loads a causal language model."""

    _task = TaskType.CAUSAL_LM


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """Loads an encoder-decoder language model."""

    _task = TaskType.SEQ_2_SEQ_LM


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """Loads a sequence classification model."""

    _task = TaskType.SEQ_CLS


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """Loads a token classification model."""

    _task = TaskType.TOKEN_CLS


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """Loads an extractive question answering model."""

    _task = TaskType.QUESTION_ANS


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """Loads a model whose outputs are hidden states."""

    _task = TaskType.FEATURE_EXTRACTION

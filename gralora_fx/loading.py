"""Base models and adapters by name, as the command line takes them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from gralora_fx.checkpoint import read_adapter
from gralora_fx.errors import ConfigError, GraloraError, TraceError, first_line
from gralora_fx.model import GraloraModel
from gralora_fx.shards import attach_shards, empty_model
from gralora_fx.sources import resolve_directory
from gralora_fx.stages import timed
from gralora_fx.tracing.quiet import quiet
from gralora_fx.tracing.samples import TASKS, infer_task
from gralora_fx.tracing.trace import trace
from gralora_fx.tracing.traced import TracedModel

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
_PEFT_TASKS = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "FEATURE_EXTRACTION": "feature-extraction",
}
_WITH_CACHE = {"text-generation": "text-generation-with-past"}
_HEAD_KEY = re.compile(r"(?:^|\.)(?:classifier|score)(?:\.out_proj|\.dense)?\.weight$")


def load_model(name: str | Path, task: str | None = None, *, num_labels: int | None = None) -> PreTrainedModel:
    """A transformers model in float32 and evaluation mode.

    Args:
        name: Local directory or hub id.
        task: One of optimum's task names; None for the class that the model's configuration names.
        num_labels: Number of classes of a classification head; None for the configuration's.

    Raises:
        TraceError: The task is unknown, or no model can be loaded.
    """
    options: dict[str, Any] = {} if num_labels is None else {"num_labels": num_labels, "ignore_mismatched_sizes": True}
    try:
        with quiet():
            model_class = _class_for(AutoConfig.from_pretrained(name), task)
            model: PreTrainedModel = model_class.from_pretrained(name, dtype=torch.float32, **options)
    except GraloraError:
        raise
    except Exception as error:  # transformers, safetensors and pickle raise types of their own
        raise TraceError(f"no model can be loaded from {name} ({first_line(error)})") from error
    return model.eval()


def load_streamed(name: str | Path, task: str | None = None, *, num_labels: int | None = None) -> PreTrainedModel:
    """The same model without its weights: parameters stand on the meta device and know their safetensors file.

    It can be traced, rewritten and exported, which reads one tensor at a time, but not run.

    Args:
        name: Local directory or hub id, of safetensors files.
        task: One of optimum's task names; None for the class that the model's configuration names.
        num_labels: Number of classes of a classification head; None for the configuration's.

    Raises:
        TraceError: The task is unknown, or no model can be made.
        CheckpointError: The files do not fit the model.
    """
    directory = resolve_directory(name, TraceError)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(directory)
            config.dtype = torch.float32  # as `load_model`
            if num_labels is not None:
                config.num_labels = num_labels
            model_class = _class_for(config, task)
            make = model_class.from_config if hasattr(model_class, "from_config") else model_class
            model = empty_model(lambda: make(config))
    except GraloraError:
        raise
    except Exception as error:  # transformers raises types of its own
        raise TraceError(f"no model can be made of {name} ({first_line(error)})") from error
    return attach_shards(model, directory)


def _class_for(config: PreTrainedConfig, task: str | None) -> Any:
    """The class of transformers for a task, or the one that a configuration names."""
    if task is not None and task not in TASKS:
        raise TraceError(f"unknown task {task!r}; take one of {', '.join(TASKS)}")
    architecture = (config.architectures or [None])[0]
    class_name = _AUTO_CLASSES.get((task or "").removesuffix("-with-past"), architecture or "AutoModel")
    return getattr(transformers, class_name, transformers.AutoModel)


def load_traced(
    model: str | None, adapter: str | None, task: str | None, *, with_cache: bool = False, stream: bool = False
) -> TracedModel | GraloraModel:
    """A traced model, rewritten with an adapter if one is given.

    Args:
        model: Local directory or hub id of the base; None for the one that the adapter names.
        adapter: PEFT-format adapter, or None.
        task: Task name; None for the adapter's or the model's own.
        with_cache: Whether a task that is not named is the one with a cache, where there is one: what generates.
        stream: Whether to leave the weights in their files, for an export (see `load_streamed`).

    Raises:
        ConfigError: Neither names a base model.
        TraceError: The base cannot be loaded or traced.
        TargetError: The adapter's configuration does not fit the base.
        CheckpointError: The adapter's tensors do not fit the base.
    """
    heads: list[int] = []
    base, asked = model, task
    with timed("load"):
        if adapter is not None:
            config, tensors = read_adapter(adapter)
            base = model or config.base_model_name_or_path
            task = task or _PEFT_TASKS.get(config.task_type or "")
            heads = [tensor.shape[0] for key, tensor in tensors.items() if _HEAD_KEY.search(key) and tensor.ndim == 2]
            del tensors  # they are read again when it is known where they go
        if base is None:
            raise ConfigError(
                "no model was named; give --model, or --adapter with a base_model_name_or_path"
                if adapter is None
                else f"{adapter} names no base model; give --model"
            )
        load = load_streamed if stream else load_model
        loaded = load(base, task, num_labels=heads[-1] if heads else None)
    task = task or infer_task(loaded)
    if with_cache and asked is None:
        task = _WITH_CACHE.get(task, task)
    with timed("trace"):
        try:
            traced = trace(loaded, task=task)
        except TraceError as error:
            if asked is None and task in _WITH_CACHE.values():
                without = task.removesuffix("-with-past")
                raise TraceError(f"{error}; take --task {without} for an export without a cache") from error
            raise
    if adapter is None:
        return traced
    with timed("rewrite"):
        return GraloraModel.from_pretrained(traced, adapter)

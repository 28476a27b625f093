"""Example inputs of transformers' models, made for a task from the configuration."""

from __future__ import annotations

import inspect
from itertools import chain
from typing import Any

import torch
from transformers import PreTrainedModel

from gralora_fx.core.tracing.inputs.arguments import padded
from gralora_fx.errors import TraceError
from gralora_fx.format.input_names import IDS
from gralora_fx.format.tasks import (
    all_tasks,
    check_task,
    classifies,
    find_task,
    is_decoder,
    is_encoder_decoder,
    task_of_class,
    with_past,
)

BATCH, _LENGTH, _DECODER_LENGTH = 2, 7, 5


def main_input(model: PreTrainedModel) -> str:
    """Return the name of the main input, a text or another signal: the class's own, or the first usual one it takes."""
    name: str = model.main_input_name
    if name == IDS:
        return name
    from gralora_fx.base.features import parts

    usual, accepted = [IDS, *chain.from_iterable(parts("main inputs"))], inspect.signature(model.forward).parameters
    return name if name in usual else next((other for other in usual if other in accepted), name)


def infer_task(model: PreTrainedModel) -> str:
    """Return a model's task by its class name; `feature-extraction` for a bare model."""
    task = task_of_class(type(model).__name__)
    if task != "text2text-generation":
        return task
    main = main_input(model)
    by_input = (other for other in all_tasks() if other.cache == "encoder-decoder" and main in other.inputs[:1])
    by_parts = (other for other in all_tasks() if other.is_of is not None and other.is_of(model))
    other = next(chain(by_input, by_parts), None)
    return task if other is None else other.name


def check_head(model: PreTrainedModel, task: str) -> None:
    """Check that a task fits a model's head, so that its outputs are not misinterpreted."""
    _check_main_input(model, task)
    model_task, requested = infer_task(model), task.removesuffix("-with-past")
    if task.endswith("-with-past"):  # whether it has a cache is checked when its inputs are generated
        return
    is_known = "feature-extraction" not in (model_task, requested)  # of a class without a head; any can return them
    if model_task != requested and is_known and (classifies(model_task) or classifies(requested)):
        raise TraceError(
            f"{type(model).__name__} is a model for {model_task}, not for {task}; leave task out, or load the class "
            f"for {task}"
        )


def _check_main_input(model: PreTrainedModel, task: str) -> None:
    known, main = find_task(task), main_input(model)
    takes = () if known is None else known.inputs
    if takes and main not in takes and task != infer_task(model):  # some classify what is given as tokens
        expected = " or ".join(takes)
        raise TraceError(f"task {task!r} takes {expected}, but {type(model).__name__} takes {main}; give its task")


def inputs_for_task(model: PreTrainedModel, task: str) -> dict[str, Any]:
    """Return random inputs of the shapes that a task needs, read from the model's configuration."""
    check_task(task)
    takes_embeddings = getattr(find_task(task), "takes_embeddings", False)
    if is_decoder(task) and main_input(model) == IDS:
        from gralora_fx.core.tracing.inputs.cached_steps import cached_inputs

        return cached_inputs(model, beside=takes_embeddings)
    main = main_input(model)
    has_cache = task.endswith("-with-past")
    if has_cache and (is_decoder(task) or not model.config.is_encoder_decoder):
        kind = "an encoder-decoder" if model.config.is_encoder_decoder else "no encoder-decoder"
        what = f"{type(model).__name__}, which takes {main} and is {kind} by its configuration"
        raise TraceError(f"task {task!r} is not one of {what}; give its task")
    _check_main_input(model, task)
    generator = torch.Generator().manual_seed(0)
    example = _main_input(model, main, generator)
    inputs = {main: example.to(model.dtype) if example.is_floating_point() else example}
    accepted = inspect.signature(model.forward).parameters
    if main == "input_ids":
        inputs["attention_mask"] = torch.ones_like(inputs[main])
        if "token_type_ids" in accepted and _has_token_types(model, task):
            inputs["token_type_ids"] = torch.zeros_like(inputs[main])
    if has_cache:
        from gralora_fx.core.tracing.inputs.cached_steps import decoder_step

        return decoder_step(model, padded(inputs), beside=main == IDS and takes_embeddings)
    feeds_decoder = is_encoder_decoder(with_past(task)) or task == "feature-extraction"
    if feeds_decoder and "decoder_input_ids" in accepted and model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = _token_ids(model, _DECODER_LENGTH, generator)
    return inputs


def _has_token_types(model: PreTrainedModel, task: str) -> bool:
    """Return whether token types are an input; not for a lone encoder with a single type, as in tokenizers."""
    known = find_task(task)
    count = getattr(model.config, "type_vocab_size", None) or 0
    return bool(count > 1 if known is not None and known.encoder_alone else count)


def _main_input(model: PreTrainedModel, name: str, generator: torch.Generator) -> torch.Tensor:
    if name == IDS:
        return _token_ids(model, _LENGTH, generator)
    from gralora_fx.base.features import parts

    for example_of in parts("example inputs", (name,)):
        example: torch.Tensor | None = example_of(model, name, generator)
        if example is not None:
            return example
    raise TraceError(f"{type(model).__name__} takes {name}, for which no example is known; give example_inputs")


def part_with(config: Any, field: str) -> Any:
    """Return the part of a configuration that has a field; the configuration itself if none has."""
    if hasattr(config, field):
        return config
    parts = [getattr(config, name, None) for name in config.sub_configs]
    return next((part for part in parts if hasattr(part, field)), config)


def _token_ids(model: PreTrainedModel, length: int, generator: torch.Generator) -> torch.Tensor:
    text_config = model.config.get_text_config()
    size = getattr(text_config, "vocab_size", 100)
    ids = torch.randint(min(3, size - 1), size, (BATCH, length), generator=generator)
    for special in ("pad_token_id", "eos_token_id"):
        token = getattr(text_config, special, None)
        if isinstance(token, int):
            ids[ids == token] = 1 if token != 1 else 2
    end = getattr(text_config, "eos_token_id", None)
    if isinstance(end, int) and end < size:  # models that pool at the end token need one in every row
        ids[:, -1] = end
    return ids

"""Calls of a model itself, which a trace is compared with: tokens one by one where several would be read wrongly."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from gralora_fx.core.tracing.inputs.input_trees import own_inputs
from gralora_fx.core.tracing.inputs.layouts import by_own_names
from gralora_fx.core.tracing.patches.known_code import forgets_before_prompts
from gralora_fx.format.input_names import PAST


def call_eager(model: nn.Module, sample: Mapping[str, Any]) -> Any:
    """What a model gives for inputs, whose cache stays as it is.

    Args:
        model: The model.
        sample: Inputs by name; with a cache it is a step of a decoder, whose next cache is returned.
    """
    inputs = own_inputs(sample)
    if isinstance(model, PreTrainedModel) and "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = PAST in sample
    inputs = dict(by_own_names(model.forward, inputs))
    return _by_token(model, inputs) if PAST in sample and forgets_before_prompts(model) else model(**inputs)


def _by_token(model: nn.Module, inputs: dict[str, Any]) -> Any:
    """What a model gives for a step of several tokens, one after the other: the logits of all, and the last cache.

    Args:
        model: A decoder whose code is right for single tokens alone.
        inputs: Inputs of the step, by the names of its forward.
    """
    from gralora_fx.core.tracing.inputs.cache import cached_length, returned_cache

    tokens = {name: inputs.pop(name) for name in ("input_ids", "position_ids") if name in inputs}
    mask, cache = inputs.pop("attention_mask", None), inputs.pop("cache", inputs.pop(PAST, None))
    count, logits = tokens["input_ids"].shape[1], []
    for place in range(count):
        step: dict[str, Any] = {name: value[:, place : place + 1] for name, value in tokens.items()}
        if mask is not None and cached_length(cache) is not None:  # what keeps states alone reads masks of new tokens
            step["attention_mask"] = mask[:, : mask.shape[1] - count + place + 1]
        outputs = model(**inputs, **step, cache=cache)
        cache = returned_cache(outputs)
        logits.append(outputs["logits"])
    outputs["logits"] = torch.cat(logits, dim=1)
    return outputs

"""Traces of the tiny models, made once a process: tests that share them must leave them as they are."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from tiny_models import TINY, text_batch, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from gralora_fx import TracedModel, trace

ENCODER_DECODERS = ("t5", "bart", "whisper")
_PAIRS: dict[str, tuple[PreTrainedModel, TracedModel]] = {}
TEXT_MODELS = tuple(name for name in TINY if name not in ("vit", "whisper"))


@functools.cache
def source(name: str) -> PreTrainedModel:
    """Return the model that `traced(name)` was made from."""
    return tiny_model(name)


@functools.cache
def traced(name: str) -> TracedModel:
    """Return a trace of a tiny model in evaluation mode, to be read only; making it warns of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        result = trace(source(name))
    _PAIRS[_key(name)] = copy.deepcopy((source(name), result))  # at once: a rewrite of this trace freezes the model
    return result


def _key(name: str, *sizes: Any, task: str | None = None, dtype: torch.dtype = torch.float32, **overrides: Any) -> str:
    return repr((name, sizes, task, dtype, sorted(overrides.items())))


def fresh(name: str, *sizes: Any, task: str | None = None, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """Return a tiny model and its trace over the same parameters, for a test to change: copies of a pair made once.

    Args:
        name: Name of a tiny model.
        sizes: Its seed, if another than the usual one.
        task: The task that the trace is for.
        dtype: What the model's weights are.
        overrides: Fields of its configuration.
    """
    key = _key(name, *sizes, task=task, dtype=dtype, **overrides)
    if key == _key(name):
        traced(name)  # which leaves a copy
    elif key not in _PAIRS:
        model = tiny_model(name, *sizes, **overrides).to(dtype)
        _PAIRS[key] = model, trace(model, task=task)
    torch.manual_seed(0)  # as a model made anew leaves it, for what is drawn next
    return copy.deepcopy(_PAIRS[key])


def fresh_trace(name: str, *sizes: Any, **options: Any) -> TracedModel:
    """Return the trace of `fresh`, for a test to change."""
    traced: TracedModel = fresh(name, *sizes, **options)[1]
    return traced


def inputs_of(name: str, batch: int = 3, length: int = 9, padding: str = "right") -> dict[str, Tensor]:
    """Return inputs of a tiny model, of other sizes than it was traced with."""
    generator = torch.Generator().manual_seed(17)
    if name == "vit":
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}
    decoder_ids = torch.randint(3, 100, (batch, max(1, length - 2)), generator=generator)
    if name == "whisper":
        return {"input_features": torch.randn(batch, 8, 40, generator=generator), "decoder_input_ids": decoder_ids}
    inputs = text_batch(batch, length, padding)
    return {**inputs, "decoder_input_ids": decoder_ids} if name in ENCODER_DECODERS else inputs


def main_output(outputs: Any) -> Tensor:
    """Return the tensor that a model is run for: its logits, or the first output of a bare model."""
    for name in ("logits", "text_embeds", "last_hidden_state"):
        if getattr(outputs, name, None) is not None:
            tensor: Tensor = getattr(outputs, name)
            return tensor
    return outputs if isinstance(outputs, Tensor) else outputs[0]


def run(model: Callable[..., Any], inputs: dict[str, Tensor]) -> Tensor:
    """Return a model's main output, without gradients."""
    with torch.no_grad():
        return main_output(model(**inputs))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected value."""
    assert actual.shape == expected.shape
    actual, expected = actual.detach(), expected.detach()
    return float((actual - expected).abs().max() / expected.abs().max())


def real_positions(outputs: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """Return the rows of per-token outputs whose token is not padding; other outputs as they are."""
    mask = inputs.get("attention_mask")
    is_per_token = mask is not None and outputs.ndim == 3 and outputs.shape[:2] == mask.shape
    return outputs[mask.bool()] if is_per_token and "decoder_input_ids" not in inputs else outputs

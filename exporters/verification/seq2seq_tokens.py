"""Greedy tokens of an exported encoder-decoder, step by step with its cache, held against PyTorch's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gralora_fx.model.gralora_model import GraloraModel
from gralora_fx.runtime.encoder_decoder_session import EncoderDecoderSession, as_past
from gralora_fx.tracing.inputs.decoder_cache import PAST
from gralora_fx.tracing.traced_model import TracedModel

_STEPS, _QUICK_STEPS = 8, 3


def compare_tokens(
    session: EncoderDecoderSession,
    model: TracedModel | GraloraModel,
    cases: Iterable[tuple[str, Mapping[str, Any]]],
    *,
    quick: bool = False,
) -> float:
    """The share of greedy tokens that are PyTorch's, for the largest batch that begins with an empty cache.

    Both take one step after another with their caches, as a generator does, PyTorch over ONNX Runtime's tokens.

    Args:
        session: The export.
        model: The model in evaluation mode.
        cases: Named inputs of the whole model.
        quick: Whether fewer steps are enough.
    """
    steps = _QUICK_STEPS if quick else _STEPS
    empty = [case for _, case in cases if PAST in case and not case[PAST].get_seq_length()]
    case = max(empty, key=lambda case: len(case["decoder_input_ids"]))
    source = {name: value for name, value in case.items() if name not in ("decoder_input_ids", PAST)}
    tensors = {name: value for name, value in source.items() if isinstance(value, Tensor)}
    found = greedy_tokens(session, tensors, case["decoder_input_ids"][:, :1], steps)
    cache, equal = None, []
    for place in range(steps):
        with torch.no_grad():
            result = model(**source, decoder_input_ids=found[:, place : place + 1], past_key_values=cache)
        cache = result[PAST]
        equal.append(result.logits[:, -1].argmax(-1) == found[:, place + 1])
    return float(torch.cat(equal).float().mean())


def greedy_tokens(session: EncoderDecoderSession, source: Mapping[str, Tensor], start: Tensor, steps: int) -> Tensor:
    """The likeliest tokens, one after another.

    Args:
        session: The export.
        source: What the encoder reads.
        start: `[batch, length]`, the tokens to begin with.
        steps: How many to add.

    Returns:
        `[batch, length + steps]`.
    """
    feed = {name: value.numpy() for name, value in source.items()}
    hidden, tokens, past = session.encode(feed), [start.numpy()], None
    for _ in range(steps):
        found = session.step(tokens[-1], hidden, feed.get("attention_mask"), past)
        past = as_past(found)
        tokens.append(found["logits"][:, -1:].argmax(-1))
    return torch.from_numpy(np.concatenate(tokens, axis=1))

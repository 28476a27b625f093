"""Encoder-decoders with a cache: the inputs that they are compared on, and their greedy tokens, read by the engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from gralora_fx.core.model.gralora_model import GraloraModel
from gralora_fx.core.tracing.inputs.cache import returned_cache, tensors_of, with_tensors
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.exporters.verify.cases import TokenResult, TokenRun, longest_text, pad, text_like
from gralora_fx.exporters.verify.greedy_tokens import EngineSteps, Step, engine_errors, read_together
from gralora_fx.exporters.verify.outputs import run_model
from gralora_fx.exporters.verify_report import TensorCheck
from gralora_fx.format.input_names import PAST
from gralora_fx.run.engine.encoder_decoder import EncoderDecoder, Encodings
from gralora_fx.run.engine.limits import DecoderLimits, DecoderSize

_TOKENS, _QUICK_TOKENS = 8, 3
# rows, length of the text, side of its padding, positions before, new positions
_ENCODED_STEPS = (
    (1, 24, "", 0, 1),
    (1, 1, "", 0, 6),
    (3, 11, "right", 0, 4),
    (4, 6, "left", 9, 1),
    (1, 24, "", 24, 1),
    (3, 11, "right", 5, 3),
)
_QUICK_ENCODED_STEPS = ((1, 9, "", 0, 1), (2, 6, "right", 0, 3), (2, 5, "left", 4, 1))


def encoder_decoder_inputs(
    model: TracedModel, generator: torch.Generator, quick: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """A decoder's first and later steps, over texts of several lengths, padded on either side."""
    limit = longest_text(model)
    for batch, source, side, past, length in _QUICK_ENCODED_STEPS if quick else _ENCODED_STEPS:
        if past + length > limit or source > limit:
            continue
        example = {name: value for name, value in model.example_inputs.items() if isinstance(value, Tensor)}
        case: dict[str, Any] = {
            name: text_like(name, value, model, batch, length if name.startswith("decoder_") else source, generator)
            for name, value in example.items()
        }
        pad(case, side or "right")
        held = tensors_of(model.example_inputs[PAST])
        shapes = {slot: slot.kind.shape(tensor.shape, batch, past) for slot, tensor in held.items()}
        drawn = {slot: torch.randn(shape, generator=generator) for slot, shape in shapes.items()}
        case[PAST] = with_tensors(model.example_inputs[PAST], drawn)
        read = f"{batch} x {source}" if "input_ids" in case else f"{batch} inputs"
        padded = f" padded {side}" if side and "attention_mask" in case else ""
        yield f"{length} after {past} of {read}{padded}", case


def compare_encoder_decoder(run: TokenRun) -> TokenResult:
    """Compare the greedy tokens of an encoder-decoder: all have to be PyTorch's.

    They are those of the largest batch of inputs that starts with an empty cache.
    """
    empty = [case for _, case in run.cases if PAST in case and not case[PAST].get_seq_length()]
    case = max(empty, key=lambda case: len(case["decoder_input_ids"]))
    source = {name: value for name, value in case.items() if name not in ("decoder_input_ids", PAST)}
    start, count = case["decoder_input_ids"][:, :1], _QUICK_TOKENS if run.quick else _TOKENS
    steps = [_answers_of_model(run.model, source), _answers_of_export(run, source, len(start), count)]
    same = [
        step.expected.argmax(-1) == step.actual[0].argmax(-1)
        for step in read_together(steps, start, torch.ones_like(start), count)
    ]
    share = float(torch.cat(same).float().mean())
    return TokenResult(share == 1.0, tensors=(TensorCheck("greedy tokens", 1.0 - share, 1.0 - share, share),))


def _answers_of_model(model: TracedModel | GraloraModel, source: Mapping[str, Any]) -> Step:
    cache: Any = None

    def read(ids: Tensor, mask: Tensor) -> Tensor:
        nonlocal cache
        outputs = run_model(model, "greedy tokens", **source, decoder_input_ids=ids, past_key_values=cache)
        cache = returned_cache(outputs)
        logits: Tensor = outputs["logits"]
        return logits

    return read


def _answers_of_export(run: TokenRun, source: Mapping[str, Any], rows: int, count: int) -> Step:
    """The export in the engine that `generate` and the service drive, a row for each of what its encoder reads."""
    tensors = {name: value for name, value in source.items() if isinstance(value, Tensor)}
    arrays = {name: (value.float() if value.is_floating_point() else value).numpy() for name, value in tensors.items()}
    limits = DecoderLimits(None, count, frozenset())
    with engine_errors("greedy tokens"):
        decoder = EncoderDecoder(run.session, run.adapters, limits, DecoderSize(rows), Encodings())
        opened = [
            decoder.open(source={name: array[row : row + 1] for name, array in arrays.items()}) for row in range(rows)
        ]
    return EngineSteps(decoder, opened, "greedy tokens")

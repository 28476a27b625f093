"""An encoder-decoder with a cache: fresh inputs over texts padded on either side, and its greedy tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from gralora_fx.engine.encoder_decoder import EncoderDecoder, Encodings
from gralora_fx.engine.limits import DecoderLimits, DecoderSize
from gralora_fx.exporters.reports import TensorCheck
from gralora_fx.exporters.verification.cases import TokenResult, TokenRun
from gralora_fx.exporters.verification.mixed_rows import engine_errors
from gralora_fx.exporters.verification.random_values import longest_text, pad, text_like
from gralora_fx.tracing.inputs.cache import PAST, decoder_cache, pairs_of, returned_cache
from gralora_fx.tracing.traced_model import TracedModel

# rows, length of the text, side of its padding, positions before, new positions
_STEPS = (
    (1, 24, "", 0, 1),
    (1, 1, "", 0, 6),
    (3, 11, "right", 0, 4),
    (4, 6, "left", 9, 1),
    (1, 24, "", 24, 1),
    (3, 11, "right", 5, 3),
)
_QUICK_STEPS = ((1, 9, "", 0, 1), (2, 6, "right", 0, 3), (2, 5, "left", 4, 1))
_TOKENS, _QUICK_TOKENS = 8, 3


def encoder_decoder_inputs(
    model: TracedModel, generator: torch.Generator, quick: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """A decoder's first and later steps, over texts of several lengths, padded on either side.

    Args:
        model: The traced model.
        generator: Draws the values.
        quick: Whether a few short ones are enough, each kind once.

    Yields:
        A description, and inputs by name.
    """
    limit = longest_text(model)
    for batch, source, side, past, length in _QUICK_STEPS if quick else _STEPS:
        if past + length > limit or source > limit:
            continue
        example = {name: value for name, value in model.example_inputs.items() if isinstance(value, Tensor)}
        case: dict[str, Any] = {
            name: text_like(name, value, model, batch, length if name.startswith("decoder_") else source, generator)
            for name, value in example.items()
        }
        pad(case, side or "right")
        pairs = [[(batch, t.shape[1], past, t.shape[3]) for t in pair] for pair in pairs_of(model.example_inputs[PAST])]
        case[PAST] = decoder_cache([[torch.randn(shape, generator=generator) for shape in pair] for pair in pairs])
        read = f"{batch} x {source}" if "input_ids" in case else f"{batch} inputs"
        padded = f" padded {side}" if side and "attention_mask" in case else ""
        yield f"{length} after {past} of {read}{padded}", case


def compare_tokens(run: TokenRun) -> TokenResult:
    """What an encoder-decoder's verification compares of its greedy tokens: that all are PyTorch's."""
    share = _equal_share(run)
    check = TensorCheck("greedy tokens", 1.0 - share, 1.0 - share, share)
    return TokenResult(share == 1.0, tensors=(check,))


def _equal_share(run: TokenRun) -> float:
    """The share of greedy tokens equal to PyTorch's, for the largest batch that starts with an empty cache.

    Both decode step by step with their caches, the export in the engine that `generate` and the service drive; PyTorch
    is fed the export's tokens.
    """
    steps = _QUICK_TOKENS if run.quick else _TOKENS
    empty = [case for _, case in run.cases if PAST in case and not case[PAST].get_seq_length()]
    case = max(empty, key=lambda case: len(case["decoder_input_ids"]))
    source = {name: value for name, value in case.items() if name not in ("decoder_input_ids", PAST)}
    tensors = {name: value for name, value in source.items() if isinstance(value, Tensor)}
    start = case["decoder_input_ids"][:, :1]
    generated = _greedy_tokens(run, tensors, start, steps)
    read = torch.cat([start, generated], dim=1)
    cache, equal = None, []
    for place in range(steps):
        with torch.no_grad():
            result = run.model(**source, decoder_input_ids=read[:, place : place + 1], past_key_values=cache)
        cache = returned_cache(result)
        equal.append(result.logits[:, -1].argmax(-1) == generated[:, place])
    return float(torch.cat(equal).float().mean())


def _greedy_tokens(run: TokenRun, source: Mapping[str, Tensor], start: Tensor, steps: int) -> Tensor:
    """The export's tokens after `start`, `[batch, 1]`, for what its encoder reads: `[batch, steps]`."""
    limits = DecoderLimits(None, steps, frozenset())
    generated: dict[int, list[int]] = {}
    with engine_errors("greedy tokens"):
        decoder = EncoderDecoder(run.session, run.adapters, limits, DecoderSize(len(start)), Encodings())
        last: dict[int, list[int]] = {}
        for row, token in enumerate(start):
            source_of_row = {name: value[row : row + 1].numpy() for name, value in source.items()}
            last[decoder.open(source=source_of_row)] = [int(token)]
        for _ in range(steps):
            last = {row: [int(logits.argmax())] for row, logits in decoder.step(last).items()}
            for row, tokens in last.items():
                generated.setdefault(row, []).extend(tokens)
    return torch.tensor([generated[row] for row in sorted(generated)])

"""Greedy tokens of an exported encoder-decoder, step by step with its cache, compared with PyTorch's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gralora_fx.engine.encoder_decoder import EncoderDecoder, Encodings
from gralora_fx.engine.limits import DecoderLimits, DecoderSize
from gralora_fx.exporters.reports import TensorCheck
from gralora_fx.exporters.verification.cases import TokenResult, TokenRun
from gralora_fx.exporters.verification.decoder_rows import engine_errors
from gralora_fx.tracing.inputs.decoder_cache import PAST, returned_cache

_STEPS, _QUICK_STEPS = 8, 3


def compare_tokens(run: TokenRun) -> TokenResult:
    """What an encoder-decoder's verification compares of its greedy tokens: that all are PyTorch's."""
    share = equal_share(run)
    check = TensorCheck("greedy tokens", 1.0 - share, 1.0 - share, share)
    return TokenResult(share == 1.0, tensors=(check,))


def equal_share(run: TokenRun) -> float:
    """The share of greedy tokens equal to PyTorch's, for the largest batch that starts with an empty cache.

    Both decode step by step with their caches, the export in the engine that `generate` and the service drive; PyTorch
    is fed the export's tokens.
    """
    steps = _QUICK_STEPS if run.quick else _STEPS
    empty = [case for _, case in run.cases if PAST in case and not case[PAST].get_seq_length()]
    case = max(empty, key=lambda case: len(case["decoder_input_ids"]))
    source = {name: value for name, value in case.items() if name not in ("decoder_input_ids", PAST)}
    tensors = {name: value for name, value in source.items() if isinstance(value, Tensor)}
    start = case["decoder_input_ids"][:, :1]
    found = _greedy_tokens(run, tensors, start, steps)
    read = torch.cat([start, found], dim=1)
    cache, equal = None, []
    for place in range(steps):
        with torch.no_grad():
            result = run.model(**source, decoder_input_ids=read[:, place : place + 1], past_key_values=cache)
        cache = returned_cache(result)
        equal.append(result.logits[:, -1].argmax(-1) == found[:, place])
    return float(torch.cat(equal).float().mean())


def _greedy_tokens(run: TokenRun, source: Mapping[str, Tensor], start: Tensor, steps: int) -> Tensor:
    """The export's tokens after `start`, `[batch, 1]`, for what its encoder reads: `[batch, steps]`."""
    limits = DecoderLimits(None, steps, frozenset())
    found: dict[int, list[int]] = {}
    with engine_errors("greedy tokens"):
        decoder = EncoderDecoder(run.session, run.adapters, limits, DecoderSize(len(start)), Encodings())
        last: dict[int, list[int]] = {}
        for row, token in enumerate(start):
            source_of_row = {name: value[row : row + 1].numpy() for name, value in source.items()}
            last[decoder.open(source=source_of_row)] = [int(token)]
        for _ in range(steps):
            last = {row: [int(logits.argmax())] for row, logits in decoder.step(last).items()}
            for row, tokens in last.items():
                found.setdefault(row, []).extend(tokens)
    return torch.tensor([found[row] for row in sorted(found)])

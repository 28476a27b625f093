"""Quality of quantization: a quantized export, as it is run, compared with the float32 model.

For a decoder, both read a user's texts, or texts begun by sampling the model, token by token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gralora_fx.base.progress.stages import counted
from gralora_fx.core.model.gralora_model import GraloraModel
from gralora_fx.core.tracing.inputs.input_trees import CacheLayout
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.exporters.artifact.tokenizer_files import loaded_tokenizer
from gralora_fx.exporters.kinds.conversion import base_trace, is_streamed
from gralora_fx.exporters.quantize.sensitivity import draw
from gralora_fx.exporters.verify.cases import Case, Verification, random_answers
from gralora_fx.exporters.verify.companion_quality import companion_quality
from gralora_fx.exporters.verify.comparable import variants
from gralora_fx.exporters.verify.given_texts import MeasuredTexts, drawn_texts, text_cases, user_texts
from gralora_fx.exporters.verify.greedy_tokens import DecoderSteps, ModelSteps, Step
from gralora_fx.exporters.verify.mapped_sessions import mapped_runtime
from gralora_fx.exporters.verify.outputs import OutputComparison
from gralora_fx.exporters.verify.quality_figures import (
    QualityTally,
    check_finite,
    compare_outputs,
    float32_reference,
)
from gralora_fx.format.manifest import read_manifest
from gralora_fx.format.quantized_weights import Quality, TokenQuality
from gralora_fx.run.sessions.session import Runtime, open_session, yielding_options
from gralora_fx.run.sessions.session_views import reads_tokens_apart, text_switch

_BATCH, _POSITIONS = 16, 256  # texts at a time, and positions of all that the model reads at once
_COPIED = 2**30  # bytes of an export whose weights the session may copy for faster products, if its model is streamed


def measure_quality(
    directory: Path,
    model: TracedModel | GraloraModel,
    verification: Verification,
    *,
    texts: Sequence[str] | None,
    tokenizer: Any,
) -> Quality:
    """Run a quantized export and the float32 model on the same inputs; a decoder's tokens with each active adapter."""
    traced, manifest = base_trace(model), read_manifest(directory)
    mapped = mapped_runtime(directory, _COPIED) if is_streamed(model) else None
    runtime = mapped or Runtime(session_options=yielding_options())
    session = open_session(directory, runtime)
    states = variants(session, model, manifest, directory)
    if traced.cache_layout is CacheLayout.DECODER:
        chosen = drawn_texts(traced) if texts is None else user_texts(texts, loaded_tokenizer(tokenizer), traced)
        tokens: list[TokenQuality] = []
        for variant in states:
            with variant.active(), float32_reference(model) as reference:
                tokens.append(token_quality(variant.session, reference, chosen, variant.name))
        if not manifest.companions:
            return Quality(str(chosen), (), tuple(tokens))
        beside = companion_quality(directory, model, manifest, tokenizer, session, runtime)
        return Quality(str(chosen), (), tuple(tokens), beside)
    base = next(states)  # adapters as data are left out
    cases: Iterable[Case]
    if traced.cache_layout is CacheLayout.ENCODER_DECODER:
        cases, inputs = random_answers(traced, seed=0), "random inputs"
    elif texts is None:
        cases, inputs = verification.cases(traced, seed=0, quick=True), "random inputs"
    else:
        cases, inputs = text_cases(texts, tokenizer, traced), f"{len(texts)} given text{'s' * (len(texts) > 1)}"
    with base.active(), float32_reference(model) as reference:
        return compare_outputs(OutputComparison(base.session, reference, manifest.logits), cases, inputs)


def token_quality(
    session: Any, model: TracedModel | GraloraModel, texts: MeasuredTexts, adapter: str | None = None
) -> TokenQuality:
    """Compare next-token probabilities at every position; both sides read the same tokens.

    Every text is followed by greedy tokens of the export, which are counted up to the first that the model would not
    give. The export reads tokens one by one, so that every logit is one that it serves; the model reads those that are
    known at once, since a pass over weights that are streamed costs as much for many tokens as for one.
    """
    tally, equal_tokens = QualityTally(), []
    generator = torch.Generator().manual_seed(0)
    # logits of some models depend on how many tokens are read at once
    most = 1 if reads_tokens_apart(session) or text_switch(session) is not None else _POSITIONS
    for start in range(0, len(texts.rows), _BATCH):
        rows = texts.rows[start : start + _BATCH]
        where = f"texts {start + 1} to {start + len(rows)}"
        steps = ModelSteps(model, len(rows), where), DecoderSteps(session, len(rows), where)
        lengths = torch.tensor([len(row) + texts.drawn for row in rows])
        equal = torch.full((len(rows),), texts.continued)
        positions = range(int(lengths.max()) + texts.continued - 1)
        logits = _both(*steps, replace(texts, rows=rows), max(1, most // len(rows)), len(positions), generator)
        for position, (expected, actual) in zip(
            counted(positions, "comparing with float32", "tokens"), logits, strict=True
        ):
            check_finite("logits", where, expected, actual)
            after = position + 1 - lengths  # tokens of the continuation read so far: negative before the first
            tally.add_logits(expected[after <= 0], actual[after <= 0], is_text=True)
            parts = (after >= 0) & (after < equal) & (expected.argmax(-1) != actual.argmax(-1))
            equal[parts] = after[parts]
        equal_tokens += equal.tolist()
    return tally.of_tokens(adapter, equal_tokens, texts.continued)


def _both(
    model: Step, export: Step, texts: MeasuredTexts, at_once: int, count: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the logits of the model and of the export after each of `count` positions, `[rows, vocabulary]` each.

    While the model draws tokens it reads them one by one, then `at_once`.
    """
    ids = torch.tensor([[row[0]] for row in texts.rows])
    while ids.shape[1] <= count:
        done = ids.shape[1] - 1
        stop = done + 1 if done < texts.drawn else min(done + at_once, count)
        actual: list[Tensor] = []
        for position in range(done, stop):
            ids = torch.cat([ids, _following(actual[-1], texts, position)], dim=1) if actual else ids
            actual.append(export(ids[:, -1:], torch.ones_like(ids))[:, -1].float())
        expected = model(ids[:, done:], torch.ones_like(ids)).float()
        yield from zip(expected.unbind(1), actual, strict=True)
        is_drawn = stop <= texts.drawn
        chosen = (
            draw(expected[:, -1], generator, texts.end)[:, None] if is_drawn else _following(actual[-1], texts, stop)
        )
        ids = torch.cat([ids, chosen], dim=1)


def _following(logits: Tensor, texts: MeasuredTexts, position: int) -> Tensor:
    """Return each row's token at a position, `[rows, 1]`: its text's, or the likeliest."""
    chosen = logits.argmax(-1)
    for index, row in enumerate(texts.rows):
        if position < len(row):
            chosen[index] = row[position]
    return chosen[:, None]

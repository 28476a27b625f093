"""Quality of quantization: a quantized export, as it is run, compared with the float32 model.

For a decoder, both read a user's texts, or texts drawn from the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
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
from gralora_fx.exporters.quantize.kept_work import KeptWork
from gralora_fx.exporters.verify.cases import Case, Verification, random_answers
from gralora_fx.exporters.verify.companion_quality import companion_quality
from gralora_fx.exporters.verify.comparable import variants
from gralora_fx.exporters.verify.drawn_texts import drawn_to_compare
from gralora_fx.exporters.verify.given_texts import MeasuredTexts, text_cases, user_texts
from gralora_fx.exporters.verify.greedy_tokens import DecoderSteps, ModelSteps, Step
from gralora_fx.exporters.verify.mapped_sessions import ReopenedSession, mapped_runtime
from gralora_fx.exporters.verify.outputs import OutputComparison
from gralora_fx.exporters.verify.quality_figures import QualityTally, check_finite, compare_outputs, float32_reference
from gralora_fx.format.manifest import Manifest, read_manifest
from gralora_fx.format.quantized_weights import Quality, TokenQuality
from gralora_fx.run.sessions.session import Runtime, open_session, yielding_options
from gralora_fx.run.sessions.session_views import reads_tokens_apart, text_switch

_BATCH, _POSITIONS = 16, 256  # texts at a time, and positions of all that the model reads at once
# bytes of a streamed model's export whose weights a session may copy, for faster products: beside the model, and alone
_COPIED, _COPIED_ALONE = 2**30, 6 * 2**30


def measure_quality(
    directory: Path,
    model: TracedModel | GraloraModel,
    verification: Verification,
    *,
    texts: Sequence[str] | None,
    tokenizer: Any,
    work: KeptWork | None = None,
) -> Quality:
    """Run a quantized export and the float32 model on the same inputs; a decoder's tokens with each active adapter.

    Without a user's texts, a decoder reads texts that the model draws, which `work` may hold; others random inputs.
    """
    traced, manifest = base_trace(model), read_manifest(directory)
    if traced.cache_layout is CacheLayout.DECODER:
        return _decoder_quality(directory, model, manifest, texts, tokenizer, work)
    session = open_session(directory, _runtime(directory, model, _COPIED))
    base = next(variants(session, model, manifest, directory))  # adapters as data are left out
    cases: Iterable[Case]
    if traced.cache_layout is CacheLayout.ENCODER_DECODER:
        cases, inputs = random_answers(traced, seed=0), "random inputs"
    elif texts is None:
        cases, inputs = verification.cases(traced, seed=0, quick=True), "random inputs"
    else:
        cases, inputs = text_cases(texts, tokenizer, traced), f"{len(texts)} given text{'s' * (len(texts) > 1)}"
    with base.active(), float32_reference(model) as reference:
        return compare_outputs(OutputComparison(base.session, reference, manifest.logits), cases, inputs)


def _runtime(directory: Path, model: TracedModel | GraloraModel, copied: int) -> Runtime:
    """Return how sessions run that take turns with a model; a streamed one's may copy so many bytes."""
    mapped = mapped_runtime(directory, copied) if is_streamed(model) else None
    return mapped or Runtime(session_options=yielding_options())


def _decoder_quality(
    directory: Path,
    model: TracedModel | GraloraModel,
    manifest: Manifest,
    texts: Sequence[str] | None,
    tokenizer: Any,
    work: KeptWork | None,
) -> Quality:
    traced = base_trace(model)
    given = None if texts is None else user_texts(texts, loaded_tokenizer(tokenizer), traced)
    close = None
    if is_streamed(model) and not manifest.companions:
        alone = _runtime(directory, model, _COPIED_ALONE)
        session: Any = ReopenedSession(partial(open_session, directory, alone))
        close = session.close
    else:
        session = open_session(directory, _runtime(directory, model, _COPIED))
    tokens: list[TokenQuality] = []
    for variant in variants(session, model, manifest, directory):
        with variant.active(), float32_reference(model) as reference:
            if close is not None:
                close()
            chosen = given or drawn_to_compare(reference, work if variant.name is None else None)
            tokens.append(token_quality(variant.session, reference, chosen, variant.name, close=close))
    if not manifest.companions:
        return Quality(str(chosen), (), tuple(tokens))
    beside = companion_quality(directory, model, manifest, tokenizer, session, _runtime(directory, model, _COPIED))
    return Quality(str(chosen), (), tuple(tokens), beside)


def token_quality(
    session: Any,
    model: TracedModel | GraloraModel,
    texts: MeasuredTexts,
    adapter: str | None = None,
    *,
    close: Callable[[], None] | None = None,
) -> TokenQuality:
    """Compare next-token probabilities at every position; both sides read the same tokens.

    Every text is followed by greedy tokens of the export, counted up to the first that the model would not give. The
    export reads tokens one by one, so that every logit is one that it serves; the model reads known ones at once. With
    `close`, which closes the session, the export reads all before the model reads any: memory need not hold both.
    """
    tally, equal_tokens = QualityTally(), []
    # logits of some models depend on how many tokens are read at once
    most = 1 if reads_tokens_apart(session) or text_switch(session) is not None else _POSITIONS
    for start in range(0, len(texts.rows), _BATCH):
        rows = texts.rows[start : start + _BATCH]
        where = f"texts {start + 1} to {start + len(rows)}"
        steps = ModelSteps(model, len(rows), where), DecoderSteps(session, len(rows), where)
        lengths = torch.tensor([len(row) for row in rows])
        equal = torch.full((len(rows),), texts.continued)
        positions = range(int(lengths.max()) + texts.continued - 1)
        logits = _both(*steps, rows, len(positions), max(1, most // len(rows)), close)
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
    model: Step, export: Step, rows: Sequence[Sequence[int]], count: int, at_once: int, close: Callable[[], None] | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the logits of the model and of the export after each of `count` positions, `[rows, vocabulary]` each."""
    ids, ahead = torch.tensor([[row[0]] for row in rows]), at_once if close is None else count
    for start in range(0, count, ahead):
        stop, actual = min(start + ahead, count), list[Tensor]()
        for position in range(start, stop):
            actual.append(export(ids[:, -1:], torch.ones_like(ids))[:, -1].float())
            ids = torch.cat([ids, _following(actual[-1], rows, position + 1)], dim=1)
        if close is not None:
            close()
        for first in range(start, stop, at_once):
            known = ids[:, : min(first + at_once, stop)]
            expected = model(known[:, first:], torch.ones_like(known)).float()
            yield from zip(expected.unbind(1), actual[first - start : first - start + at_once], strict=True)


def _following(logits: Tensor, rows: Sequence[Sequence[int]], position: int) -> Tensor:
    """Return each row's token at a position, `[rows, 1]`: its text's, or the likeliest."""
    chosen = logits.argmax(-1)
    for index, row in enumerate(rows):
        if position < len(row):
            chosen[index] = row[position]
    return chosen[:, None]

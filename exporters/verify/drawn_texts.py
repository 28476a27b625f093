"""Texts drawn from a decoder, token by token, by its own probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gralora_fx.base.progress.stages import counted
from gralora_fx.core.model.gralora_model import GraloraModel
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.exporters.kinds.conversion import base_trace
from gralora_fx.exporters.quantize.bfloat16_products import with_bfloat16_products
from gralora_fx.exporters.quantize.kept_work import KeptWork
from gralora_fx.exporters.quantize.sensitivity import draw
from gralora_fx.exporters.verify.cases import context_of, vocabulary_of
from gralora_fx.exporters.verify.given_texts import CONTINUED, MeasuredTexts
from gralora_fx.exporters.verify.greedy_tokens import ModelSteps

_COUNT, _LENGTH = 16, 24  # of the texts that an export is compared on, and tokens of each
_KEPT, _CHOOSING, _COMPARED = "the texts that the model drew", "ids", "compared"  # the kept result, and its arrays


@dataclass(frozen=True)
class Beginnings:
    """Beginnings from which texts are drawn."""

    first: tuple[int, ...]  # the token that begins each text
    length: int  # tokens of each
    seed: int
    end: tuple[int, ...]  # tokens that end a text or pad it, never drawn


def beginnings(traced: TracedModel, seed: int, length: int, count: int) -> Beginnings:
    """Begin texts with the token that the model begins with, or random ones; they take at most half of the context."""
    vocabulary = vocabulary_of(traced) or 4
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(min(3, vocabulary - 1), vocabulary, (count,), generator=generator).tolist()
    begins, ends, pads = (_special_tokens(traced, f"{name}_token_id", vocabulary) for name in ("bos", "eos", "pad"))
    return Beginnings(
        first=tuple(begins[0] if begins else token for token in first),
        length=min(length, max(1, _room(traced) // 2)),
        seed=seed,
        end=tuple(dict.fromkeys((*ends, *pads)))[: vocabulary - 1],
    )


def _room(traced: TracedModel) -> int:
    return context_of(traced) or _LENGTH + CONTINUED


def _special_tokens(traced: TracedModel, name: str, vocabulary: int) -> tuple[int, ...]:
    """Return the ids of a special token in a configuration: none, one or several."""
    config = None if traced.config is None else traced.config.get_text_config()
    value = getattr(config, name, None)
    tokens = value if isinstance(value, (list, tuple)) else [value]
    return tuple(token for token in tokens if isinstance(token, int) and 0 <= token < vocabulary)


@torch.no_grad()
def draw_texts(model: TracedModel | GraloraModel, wanted: Mapping[str, Beginnings]) -> dict[str, Tensor]:
    """Sample texts by name, `[texts, length]` ids each, all in the same steps.

    A pass over streamed weights costs as much for many rows as for one. Each text has its own random numbers, so that
    it does not depend on the others.
    """
    counts = [len(each.first) for each in wanted.values()]
    ids = torch.tensor([[token] for each in wanted.values() for token in each.first])
    generators = [torch.Generator().manual_seed(each.seed) for each in wanted.values()]
    narrow = with_bfloat16_products(model) if isinstance(model, TracedModel) else model
    steps = ModelSteps(narrow, len(ids))
    longest = max(each.length for each in wanted.values())
    for length in counted(range(1, longest), "drawing texts", "tokens"):
        logits = steps(ids[:, -1:], torch.ones(len(ids), length, dtype=torch.long))[:, -1].float()
        drawn = [
            draw(rows, generator, each.end)
            for rows, generator, each in zip(torch.split(logits, counts), generators, wanted.values(), strict=True)
        ]
        ids = torch.cat([ids, torch.cat(drawn)[:, None]], dim=1)
    parts = zip(wanted.items(), torch.split(ids, counts), strict=True)
    return {name: rows[:, : each.length] for (name, each), rows in parts}


def drawn_to_choose(traced: TracedModel, work: KeptWork, length: int, count: int, *, is_compared: bool) -> Tensor:
    """Return drawn texts to choose formats on, `[count, length]`, kept or drawn now.

    If an export will be compared on drawn texts, those are others, drawn and kept with them.
    """
    known = work.read(_KEPT)
    if known is None:
        wanted = {_CHOOSING: beginnings(traced, 1, length, count)}
        if is_compared:
            wanted[_COMPARED] = _compared(traced)
        known = {name: ids.numpy() for name, ids in draw_texts(traced, wanted).items()}
        work.keep(_KEPT, known)
    return torch.from_numpy(known[_CHOOSING])


def drawn_to_compare(model: TracedModel | GraloraModel, work: KeptWork | None = None) -> MeasuredTexts:
    """Return drawn texts to compare an export on, from what `drawn_to_choose` kept or drawn now."""
    traced = base_trace(model)
    known = None if work is None else work.read(_KEPT)
    if known is None or _COMPARED not in known:
        ids = draw_texts(model, {_COMPARED: _compared(traced)})[_COMPARED]
    else:
        ids = torch.from_numpy(known[_COMPARED])
    continued = max(1, min(CONTINUED, _room(traced) - ids.shape[1]))
    return MeasuredTexts(tuple(map(tuple, ids.tolist())), continued, is_drawn=True)


def _compared(traced: TracedModel) -> Beginnings:
    return beginnings(traced, 0, _LENGTH, _COUNT)

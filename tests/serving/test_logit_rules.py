"""Rules for logits and distributions to draw from: equal to those of transformers' processors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as oracle
from transformers import LogitsProcessorList

from gralora_fx.errors import ServingError
from gralora_fx.run.generate.answer_options import Sampling
from gralora_fx.run.generate.generation_rules import GenerationRules
from gralora_fx.run.generate.token_choice import TokenChooser, distribution, token_scores

WORDS, ENDS, PROMPT, SOURCE = 40, [2, 3], [1, 4, 5, 6], [5, 6, 7, 5, 6, 9, 5]
READ = torch.tensor([SOURCE])
PROCESSORS: list[tuple[dict[str, Any], Any]] = [  # fields of `generation_config.json`, and their processor
    ({"sequence_bias": [[[8], 1.5], [[5, 6], -2.0], [[6, 6, 9], 4.0]]}, oracle.SequenceBiasLogitsProcessor),
    ({"encoder_repetition_penalty": 1.4}, lambda p: oracle.EncoderRepetitionPenaltyLogitsProcessor(p, READ)),
    ({"repetition_penalty": 1.3}, oracle.RepetitionPenaltyLogitsProcessor),
    ({"no_repeat_ngram_size": 1}, oracle.NoRepeatNGramLogitsProcessor),
    ({"no_repeat_ngram_size": 3}, oracle.NoRepeatNGramLogitsProcessor),
    ({"encoder_no_repeat_ngram_size": 2}, lambda n: oracle.EncoderNoRepeatNGramLogitsProcessor(n, READ)),
    ({"bad_words_ids": [[2], [7], [6, 5], [5, 6, 8]]}, lambda words: oracle.NoBadWordsLogitsProcessor(words, ENDS)),
    ({"min_new_tokens": 3}, lambda n: oracle.MinNewTokensLengthLogitsProcessor(len(PROMPT), n, ENDS)),
    ({"min_length": 6}, lambda n: oracle.MinLengthLogitsProcessor(n, ENDS)),
    ({"forced_eos_token_id": 3}, lambda token: oracle.ForcedEOSTokenLogitsProcessor(len(PROMPT) + 6, token)),
    ({"remove_invalid_values": True}, lambda _: oracle.InfNanRemoveLogitsProcessor()),
    (
        {"exponential_decay_length_penalty": [2, 1.2]},
        lambda pair: oracle.ExponentialDecayLengthPenalty(tuple(pair), ENDS, len(PROMPT)),
    ),
    ({"suppress_tokens": [4, 9]}, oracle.SuppressTokensLogitsProcessor),
    (
        {"begin_suppress_tokens": [4, 9]},
        lambda tokens: oracle.SuppressTokensAtBeginLogitsProcessor(tokens, len(PROMPT)),
    ),
]


def logits_of(seed: int, size: int = WORDS) -> np.ndarray[Any, np.dtype[np.float32]]:
    return (np.random.default_rng(seed).standard_normal(size) * 3).astype(np.float32)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("fields", "processor"), PROCESSORS, ids=lambda value: next(iter(value), "") if isinstance(value, dict) else ""
)
def test_a_rule_is_transformers_processor(fields: dict[str, Any], processor: Any) -> None:
    rules = GenerationRules(Path("onnx"), fields, frozenset(ENDS)).processors(Sampling(), PROMPT, 6, SOURCE)
    processors, changed = LogitsProcessorList([processor(*fields.values())]), False
    for length in range(6):
        ids = [*PROMPT, *[5, 6, 6, 9, 5, 6][:length]]
        scores = logits_of(length)
        if "remove_invalid_values" in fields:
            scores[:3] = np.nan, np.inf, -np.inf
        expected = processors(torch.tensor([ids]), torch.from_numpy(scores.copy())[None])[0].numpy()
        changed = changed or not np.array_equal(expected, scores)
        for rule in rules:
            rule(ids, scores)
        np.testing.assert_allclose(scores, expected, rtol=1e-6)
    assert changed


def test_the_first_token_of_an_encoder_decoder_is_forced() -> None:
    (rule,) = GenerationRules(Path("onnx"), {"forced_bos_token_id": 7}, frozenset(ENDS)).processors(Sampling(), [1], 6)
    processor = oracle.ForcedBOSTokenLogitsProcessor(7)
    for ids in ([1], [1, 7]):
        scores = logits_of(0)
        expected = processor(torch.tensor([ids]), torch.from_numpy(scores.copy())[None])[0].numpy()
        rule(ids, scores)
        assert np.array_equal(scores, expected)


@pytest.mark.quick
@pytest.mark.parametrize("size", [5, 300, 40_000])
@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.7},
        {"top_k": 3},
        {"top_p": 0.1},
        {"top_p": 0.99},
        {"min_p": 0.2},
        {"temperature": 1.7, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=str,
)
def test_a_distribution_is_that_of_transformers_processors(fields: dict[str, Any], size: int) -> None:
    kinds = {
        "temperature": oracle.TemperatureLogitsWarper,
        "top_k": oracle.TopKLogitsWarper,
        "top_p": oracle.TopPLogitsWarper,
        "min_p": oracle.MinPLogitsWarper,
    }
    processors = LogitsProcessorList([kind(fields[name]) for name, kind in kinds.items() if name in fields])
    for seed, left_out in enumerate((0, 1, size // 3, size - 3)):
        scores = logits_of(seed, size)
        scores[:left_out] = -np.inf  # as by a grammar
        expected = processors(torch.tensor([[1]]), torch.from_numpy(scores)[None]).softmax(-1)[0].numpy()
        tokens, shares = distribution(scores, Sampling(do_sample=True, **{"top_k": 0, **fields}))
        assert np.array_equal(tokens, expected.nonzero()[0])
        np.testing.assert_allclose(shares, expected[tokens], rtol=1e-4)


def test_a_seed_makes_draws_reproducible_and_none_makes_them_differ() -> None:
    logits = logits_of(0, 1000)

    def drawn(seed: int | None) -> list[int]:
        choose = TokenChooser(Sampling(do_sample=True, top_k=0, temperature=3.0, seed=seed), [1], frozenset())
        return [choose(logits).token for _ in range(30)]

    assert drawn(7) == drawn(7)
    assert drawn(7) != drawn(8)
    assert drawn(None) != drawn(None)


def test_logits_that_are_no_numbers_are_not_drawn_from() -> None:
    logits = logits_of(0)
    logits[4] = np.nan
    choose = TokenChooser(Sampling(do_sample=True), [1], frozenset())
    with pytest.raises(ServingError, match="logits are not finite"):
        choose(logits)


@pytest.mark.parametrize("top", [0, 1, 5, 99])
def test_scores_are_log_probabilities(top: int) -> None:
    logits = np.stack([logits_of(seed) for seed in range(3)])
    expected = torch.from_numpy(logits).log_softmax(-1)
    for score, row, token in zip(token_scores(logits, [4, 0, 9], top), expected, [4, 0, 9], strict=True):
        best = row.topk(min(top, WORDS))
        assert score.token == token
        assert score.logprob == pytest.approx(float(row[token]), abs=1e-5)
        assert [index for index, _ in score.top] == best.indices.tolist()
        assert [value for _, value in score.top] == pytest.approx(best.values.tolist(), abs=1e-5)

"""Options of `generate`, rows side by side and one after the other: greedy as transformers, and the same draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from served_exports import END, decoders

from gralora_fx.errors import ServingError
from gralora_fx.run.generate.answer_options import Sampling
from gralora_fx.run.generate.prompt_answers import Scored
from gralora_fx.run.generate.token_choice import TokenChooser
from gralora_fx.run.model import OrtModel
from gralora_fx.serving import load

PROVIDERS: dict[str, Any] = {  # for the second no graph of rows is known to run
    "side by side": None,
    "one after the other": ["AzureExecutionProvider", "CPUExecutionProvider"],
}
pytestmark = pytest.mark.filterwarnings("ignore:AzureExecutionProvider takes no node of this model")
PROMPTS = [[5, 9, 12, 40, 3], [7, 31, 4], [60, 61, 62, 63, 64, 65, 66]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, OrtModel], dict[str | None, Any]]:
    paths, oracles = decoders(tmp_path_factory.mktemp("sampling"), "data")
    return {name: load(paths["data"], providers) for name, providers in PROVIDERS.items()}, oracles


@pytest.fixture(params=PROVIDERS)
def model(request: pytest.FixtureRequest, models: tuple[dict[str, OrtModel], Any]) -> OrtModel:
    return models[0][request.param]


def generated(oracle: Any, prompt: list[int], **options: Any) -> list[int]:
    """Return the new tokens of transformers' `generate`, without an end token."""
    ids = torch.tensor([prompt])
    ends = options.setdefault("eos_token_id", [END])
    new = oracle.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, **options)
    tokens: list[int] = new[0, len(prompt) :].tolist()
    return next((tokens[:index] for index, token in enumerate(tokens) if token in ends), tokens)


@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({"repetition_penalty": 1.5}, {}),
        ({"repetition_penalty": 0.5}, {}),
        ({"min_new_tokens": 9}, {}),
        ({"logit_bias": {20: 5.0, 21: -3}}, {"sequence_bias": {(20,): 5.0, (21,): -3.0}}),
        ({"eos_token_id": [2, 11, 45, 77, 30]}, {}),
        ({"repetition_penalty": 1.3, "min_new_tokens": 4, "logprobs": 0}, {}),
    ],
)
def test_greedy_answers_are_transformers(
    model: OrtModel, models: tuple[Any, dict[str | None, Any]], options: dict[str, Any], theirs: dict[str, Any]
) -> None:
    reference = {name: value for name, value in options.items() if name not in ("logit_bias", "logprobs")}
    for adapter, oracle in models[1].items():
        expected = [generated(oracle, prompt, max_new_tokens=14, **reference, **theirs) for prompt in PROMPTS]
        found = model.generate(PROMPTS, max_new_tokens=14, adapter=adapter, **options)
        assert [answer.content if isinstance(answer, Scored) else answer for answer in found] == expected


def test_both_decoders_draw_the_same(models: tuple[dict[str, OrtModel], Any]) -> None:
    by_rows, one_by_one = models[0].values()
    options = {"do_sample": True, "temperature": 1.4, "min_p": 0.01, "top_p": 0.95, "frequency_penalty": 0.5}
    options |= {"adapter": "wide", "max_new_tokens": 12}
    together = by_rows.generate(PROMPTS, seed=3, **options)
    assert one_by_one.generate(PROMPTS, seed=3, **options) == together
    for index, prompt in enumerate(PROMPTS):  # each draws by a seed of its own, whatever runs beside it
        assert by_rows.generate(prompt, seed=3 + index, **options) == together[index]


def test_every_prompt_has_its_adapter(models: tuple[dict[str, OrtModel], dict[Any, Any]]) -> None:
    names = [None, "small", "wide"]
    pairs = zip(names, PROMPTS, strict=True)
    expected = [generated(models[1][name], prompt, max_new_tokens=20) for name, prompt in pairs]
    for model in models[0].values():
        assert model.generate(PROMPTS, max_new_tokens=20, adapter=names) == expected
        with pytest.raises(ServingError, match="adapter has 2 names for 3 rows"):
            model.generate(PROMPTS, adapter=["wide", "small"])


def test_long_prompts_are_read_in_chunks(
    models: tuple[dict[str, OrtModel], dict[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gralora_fx.run.generate.prompt_answers._CHUNK_OF_MANY", 4)
    prompts = [[5 + index % 7 for index in range(17)], [9, 8, 7], [30] * 8]
    expected = [generated(models[1]["small"], prompt, max_new_tokens=6) for prompt in prompts]
    for model in models[0].values():
        assert model.generate(prompts, adapter="small", max_new_tokens=6) == expected


def test_texts_streams_and_stop_strings(models: tuple[dict[str, OrtModel], Any]) -> None:
    by_rows, one_by_one = models[0].values()
    options: dict[str, Any] = {"max_new_tokens": 12, "adapter": "wide"}
    texts = ["Hello", "The capital"]
    whole = by_rows.generate(texts, **options)
    assert whole == one_by_one.generate(texts, **options)
    pieces = list(by_rows.generate(texts, stream=True, **options))
    assert ["".join(piece[row] for piece in pieces) for row in (0, 1)] == whole
    assert by_rows.generate("Hello", stop=whole[0][3:5], **options) == whole[0][: whole[0].index(whole[0][3:5])]


def test_scores_are_the_models_own(model: OrtModel, models: tuple[Any, dict[str | None, Any]]) -> None:
    """Before penalties and temperature; streamed or not."""
    options: dict[str, Any] = {"do_sample": True, "temperature": 1.7, "seed": 5, "repetition_penalty": 1.5}
    options |= {"max_new_tokens": 7, "adapter": "small", "logprobs": 4}
    answer = model.generate(PROMPTS[0], **options)
    with torch.no_grad():
        logits = models[1]["small"](input_ids=torch.tensor([PROMPTS[0] + answer.content])).logits[0]
    rows = logits.log_softmax(-1)[len(PROMPTS[0]) - 1 : -1]
    assert [score.token for score in answer.scores] == answer.content
    for score, row in zip(answer.scores, rows, strict=True):
        assert score.logprob == pytest.approx(float(row[score.token]), abs=1e-4)
        assert [value for _, value in score.top] == pytest.approx(row.topk(4).values.tolist(), abs=1e-4)
    pieces = list(model.generate(PROMPTS[0], stream=True, **options))
    assert [token for piece in pieces for token in piece.content] == answer.content
    assert [score for piece in pieces for score in piece.scores] == answer.scores


def test_penalties_for_what_an_answer_holds() -> None:
    """As OpenAI defines them; the prompt's own tokens do not count."""
    logits = np.array([0.0, 3.0, 2.9, 2.0], dtype=np.float32)
    sampling = Sampling(presence_penalty=0.5, frequency_penalty=0.25)
    choose = TokenChooser(sampling, [1, 1, 1], frozenset())
    counts, expected = np.zeros(4), []
    for _ in range(9):
        expected.append(int((logits - 0.25 * counts - 0.5 * (counts > 0)).argmax()))
        counts[expected[-1]] += 1
    assert [choose(logits).token for _ in range(9)] == expected
    assert len(set(expected)) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_p": 0.1}, "min_p has no effect where the likeliest token is taken"),
        ({"do_sample": True, "min_p": 2}, r"min_p must be in \[0, 1\], but got 2"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0, but got 0; take 1 for none"),
        ({"repetition_penalty": 1e-166}, "repetition_penalty must be 1e-06 or more, but got 1e-166; take 1 for none"),
        ({"do_sample": True, "temperature": 1e-300}, "temperature must be 1e-06 or more, but got 1e-300"),
        ({"presence_penalty": "x"}, "presence_penalty must be a number, but got 'x'; take 0 for none"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty must be a number"),
        ({"logit_bias": [5]}, r"logit_bias must be a number for each token id, but got \[5\]"),
        ({"logit_bias": {5: None}}, "logit_bias must hold numbers, but got None"),
        ({"logit_bias": {"5": 1}}, "a token id of logit_bias must be a whole number from 0 on, but got '5'"),
        ({"logit_bias": {101: 1}}, "logit_bias names token 101, outside the vocabulary of 101 tokens"),
        ({"eos_token_id": "x"}, "eos_token_id must be a token id or a list of them, but got 'x'"),
        ({"eos_token_id": [2, -1]}, "eos_token_id must be a whole number from 0 on, but got -1"),
        ({"eos_token_id": [2, 101]}, "the tokens that end the answer hold 101"),
        ({"min_new_tokens": 5, "max_new_tokens": 4}, "min_new_tokens=5 is above max_new_tokens=4; give less"),
        ({"logprobs": -1}, "logprobs must be a whole number from 0 on, but got -1"),
        ({"beams": 2}, "unknown option beams; there are stop, stream, adapter, max_new_tokens, .*logprobs"),
    ],
)
def test_bad_options(model: OrtModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ServingError, match=message):
        model.generate([5], **options)


def test_no_end_tokens(models: tuple[dict[str, OrtModel], dict[str | None, Any]]) -> None:
    for model in models[0].values():
        free = model.generate([[1, 2, END, 5], [8], [9, 9]], eos_token_id=[], max_new_tokens=30)
        assert [len(answer) for answer in free] == [30] * 3

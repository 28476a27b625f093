"""Speculation by n-grams: answers are those without it, whatever a request asks for and whatever runs beside it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from served_exports import CACHED, END, adapted, chat_tokenizer
from starlette.testclient import TestClient
from traces import fresh_trace

from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.errors import ServingError
from gralora_fx.exporters import export_onnx
from gralora_fx.features.speculation.speculation import LONGEST, NGrams, Speculation, StepCosts
from gralora_fx.run.generate.answer_row import AnswerRow
from gralora_fx.service.app import create_app
from gralora_fx.serving import OrtModel, load

# a tiny random model repeats itself before long, if its likeliest token is taken
PROMPTS = [[5, 9, 12, 40, 3, 5, 9, 12, 40, 3, 5, 9], [17, 4, 71, 8, 17, 4, 71], [3, 88, 61, 3, 88]]
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "greedy": {},
    "drawn": {"do_sample": True, "seed": 7, "temperature": 0.02, "top_p": 0.9},
    "penalties": {"presence_penalty": 0.2, "frequency_penalty": 0.1, "repetition_penalty": 1.05},
    "log-probabilities": {"logprobs": 2},
    "least tokens": {"min_new_tokens": 30},
    "an end token": {"eos_token_id": [12, 40]},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> OrtModel:
    """Two adapters over one base, in whose answers everything that is proposed is verified."""
    folder = tmp_path_factory.mktemp("speculation")
    gralora, _ = adapted("llama", folder, CACHED, eos_token_id=END, bos_token_id=1, pad_token_id=0)
    export_onnx(gralora, folder / "onnx", adapters="data", verify=False, tokenizer=chat_tokenizer())
    return load(folder / "onnx", threads=1)


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets every step propose, whatever it costs here; has how many tokens were proposed."""
    monkeypatch.setattr(StepCosts, "knows", lambda *_: True)
    monkeypatch.setattr(StepCosts, "__call__", lambda *_: 1.0)
    monkeypatch.setattr(StepCosts, "largest", property(lambda _: 64))
    drafts: list[int] = []
    propose = AnswerRow.propose

    def counting(row: AnswerRow, count: int) -> int:
        drafts.append(propose(row, count))
        return drafts[-1]

    monkeypatch.setattr(AnswerRow, "propose", counting)
    return drafts


@pytest.mark.quick
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("adapter", [None, "wide"])
def test_answers_are_those_without(model: OrtModel, name: str, adapter: str | None, counted: list[int]) -> None:
    options = {"max_new_tokens": 48, "adapter": adapter, **OPTIONS[name]}
    for prompt in PROMPTS:
        plain = model.generate(prompt, prompt_lookup_num_tokens=0, **options)
        assert not counted
        assert model.generate(prompt, **options) == plain
        pieces = list(model.generate(prompt, stream=True, **options))
        counted.clear()
        contents = [piece.content for piece in pieces] if "logprobs" in options else pieces
        assert [*itertools.chain(*contents)] == (plain.content if "logprobs" in options else plain)


def test_proposals_are_accepted_several_in_a_step(model: OrtModel, counted: list[int]) -> None:
    pieces = list(model.generate(PROMPTS[0], stream=True, max_new_tokens=48, min_new_tokens=48))
    assert max(map(len, pieces)) > 4
    assert sum(map(len, pieces)) == 48
    assert sum(counted) >= 48 - len(pieces)


def test_rows_with_different_adapters_in_one_step(model: OrtModel, counted: list[int]) -> None:
    adapters = ["wide", None, "small"]
    options: Any = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": True, "seed": 3, "temperature": 0.02}
    together = model.generate(PROMPTS, adapter=adapters, **options)
    assert sum(counted) > 20
    assert together == model.generate(PROMPTS, adapter=adapters, prompt_lookup_num_tokens=0, **options)


def test_answers_in_a_form(model: OrtModel, counted: list[int]) -> None:
    form: Any = {"regex": "(ab?c ){4,40}", "max_new_tokens": 60}
    texts = ["ab", "c ab"]
    for extra in ({}, {"logprobs": 1}, {"do_sample": True, "seed": 5}):
        plain = model.generate(texts, prompt_lookup_num_tokens=0, **form, **extra)
        assert not counted
        assert model.generate(texts, **form, **extra) == plain
        assert sum(counted) > 0
        counted.clear()


@pytest.mark.parametrize("options", [{"precision": "fp16"}, {"quantize": "int4"}, {"logits": "all"}])
def test_every_kind_of_decoder(options: Mapping[str, Any], tmp_path: Path, counted: list[int]) -> None:
    export_onnx(fresh_trace("llama", task=CACHED), tmp_path / "onnx", verify=False, **options)
    opened = load(tmp_path / "onnx", threads=1)
    plain = opened.generate(PROMPTS, max_new_tokens=40, prompt_lookup_num_tokens=0)
    assert opened.generate(PROMPTS, max_new_tokens=40) == plain
    assert sum(counted) > 0


@pytest.mark.parametrize("wrong", [-1, True, "4"])
def test_a_wrong_number_is_refused(model: OrtModel, wrong: Any) -> None:
    with pytest.raises(ServingError, match="prompt_lookup_num_tokens must be a whole number from 0 on"):
        model.generate(PROMPTS[0], prompt_lookup_num_tokens=wrong)


def naive(tokens: Sequence[int]) -> int | None:
    """Draft what followed the last time that the last three tokens occurred."""
    for end in range(len(tokens) - 1, 2, -1):
        if list(tokens[end - 3 : end]) == list(tokens[-3:]):
            return tokens[end]
    return None


def test_what_followed_last_time_is_proposed() -> None:
    text = NGrams([1, 2, 3, 4, 5, 1, 2, 3])
    assert (text.matched, text.proposal(3)) == (3, [4, 5, 1])
    assert text.add(4)
    assert (text.matched, text.proposal(2)) == (4, [5, 1])
    assert not text.add(9)
    assert (text.matched, text.proposal(2)) == (0, [])
    tokens = [1, 2, 3, 4, 5, 1, 2, 3, 4, 9]
    for token in [7, 7, 7, 7, 1, 2, 3, 4, 9, 7, 7] * 3:
        text.add(token)
        tokens.append(token)
        assert bool(text.matched) == (naive(tokens) is not None)
    assert text.matched <= LONGEST
    assert NGrams([6, 6, 6, 6]).proposal(5) == [6] * 5  # what repeats goes on


class Clock:
    """A decoder whose steps of a size take what they are said to; its rows accept a share of what is proposed."""

    def __init__(self, cost: Any, accepts: Any) -> None:
        self.cost, self.accepts, self.speculation = cost, accepts, Speculation()
        self.seconds = 0.0

    def answer(self, length: int, rows: int = 1) -> float:
        """Compare the times of answers with drafts and without; each repeats its prompt, or seems to."""
        answers = [_Answer(self.accepts, length) for _ in range(rows)]
        self.seconds, plain = 0.0, 0.0
        while going := [answer for answer in answers if answer.left > 0]:
            drafted = self.speculation.propose(going, 64, 16)  # type: ignore[arg-type]
            size = len(going) + drafted
            self.seconds += self.cost(size)
            plain_step = self.cost(len(going))
            self.speculation.ran(size, drafted, self.cost(size))
            for answer in going:
                gained = answer.verify(self.speculation)
                plain += (1 + gained) * plain_step / len(going) * 1.0
                self.speculation.settle(answer, gained)  # type: ignore[arg-type]
        return self.seconds / plain


class _Answer:
    """An answer that repeats itself, as far as it is told to."""

    def __init__(self, accepts: Any, length: int) -> None:
        self.accepts, self.left, self.matched, self.text = accepts, length, LONGEST, NGrams([])
        self.unread, self.count = (1,), 0

    @property
    def most(self) -> int:
        return self.left - 1

    def propose(self, count: int) -> int:
        self.count = count
        return count

    def verify(self, speculation: Speculation) -> int:
        gained = 0
        while True:
            hit = self.accepts()
            speculation.saw(self.matched, hit)
            if not hit or gained == self.count:
                break
            gained += 1
        self.left, self.count = self.left - 1 - gained, 0
        return gained


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, counted: list[int]) -> None:
    """Lets steps cost what they do."""
    monkeypatch.undo()


@pytest.mark.usefixtures("measured")
def test_drafts_are_as_long_as_pays() -> None:
    always = itertools.repeat(True).__next__
    cheap = Clock(lambda size: 1 + 0.05 * size, always)
    assert cheap.answer(400) < 0.2
    dear = Clock(lambda size: size, always)  # where tokens cost the same together, none is proposed after some trials
    assert dear.answer(400) < 1.05
    assert not dear.speculation.propose([_Answer(always, 9)], 64, 16)  # type: ignore[list-item]


@pytest.mark.usefixtures("measured")
def test_what_does_not_pay_costs_next_to_nothing_and_is_tried_again() -> None:
    hits = itertools.cycle([False] * 9 + [True]).__next__
    clock = Clock(lambda size: 1 + 0.3 * (size - 1), hits)
    assert clock.answer(1000) < 1.03
    clock.accepts = itertools.repeat(True).__next__
    clock.answer(100)
    assert clock.answer(400) < 0.7


@pytest.mark.usefixtures("measured")
def test_rows_beside_others_that_repeat_themselves_are_not_held_up() -> None:
    never = itertools.repeat(False).__next__
    speculation = Speculation()
    speculation.saw(LONGEST, True)
    for _ in range(4):
        speculation.ran(2, 0, 1.0)
        speculation.ran(6, 0, 2.0)
    repeats, other = _Answer(itertools.repeat(True).__next__, 10**6), _Answer(never, 10**6)
    other.matched = 0
    steps, seconds = 1000, 0.0
    for _ in range(steps):
        drafted = speculation.propose([repeats, other], 64, 4)  # type: ignore[list-item]
        seconds += 1 + drafted / 4
        speculation.ran(2 + drafted, drafted, 1 + drafted / 4)
        speculation.settle(repeats, repeats.verify(speculation))  # type: ignore[arg-type]
        other.verify(speculation)
        speculation.settle(other, 0)  # type: ignore[arg-type]
    assert 1.0 < seconds / steps < 1.03


def test_the_service_counts_what_it_proposes(model: OrtModel, counted: list[int]) -> None:
    request = {"model": "wide", "prompt": PROMPTS[0], "temperature": 0, "max_tokens": 40, "ignore_eos": True, "n": 2}
    answers, metrics = [], []
    for most in (0, None, 3):
        counted.clear()
        app = create_app(ServiceSettings(model.directory, max_batch=4, speculative_tokens=most))
        with TestClient(app) as client:
            answers.append(client.post("/v1/completions", json=request).json()["choices"])
            metrics.append(client.get("/metrics").text)
        assert max(counted, default=0) <= (16 if most is None else most)
    assert answers[0] == answers[1] == answers[2]
    assert "draft_tokens" not in metrics[0]
    values = dict(
        line.split()
        for line in metrics[1].splitlines()
        if "_tokens_total " in line and line[0] != "#" and "{" not in line
    )
    assert float(values["gralora_fx_draft_tokens_total"]) >= float(values["gralora_fx_accepted_tokens_total"]) > 0
    assert values["vllm:spec_decode_num_draft_tokens_total"] == values["gralora_fx_draft_tokens_total"]
    assert values["vllm:spec_decode_num_accepted_tokens_total"] == values["gralora_fx_accepted_tokens_total"]


def test_a_decoder_that_cannot_verify_says_so(
    model: OrtModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened = OrtModel.decoder

    def unable(self: OrtModel, **sizes: Any) -> Any:
        decoder = opened(self, **sizes)
        decoder.verify_problem = "its rows run one after the other"
        return decoder

    monkeypatch.setattr(OrtModel, "decoder", unable)
    with pytest.raises(ServingError, match="speculative_tokens has no effect: its rows run one after the other"):
        create_app(ServiceSettings(model.directory, speculative_tokens=4))
    with caplog.at_level("INFO"), TestClient(create_app(ServiceSettings(model.directory))) as client:
        request = {"model": "wide", "prompt": PROMPTS[0], "temperature": 0, "max_tokens": 20}
        assert client.post("/v1/completions", json=request).status_code == 200
        assert "draft_tokens" not in client.get("/metrics").text
    assert "no speculation: its rows run one after the other" in caplog.text


def test_an_output_layer_with_adapters_is_not_speculated_upon(tmp_path: Path) -> None:
    """Its products depend on the adapter of each row, not on the tokens alone."""
    gralora, _ = adapted("llama", tmp_path, CACHED, ["lm_head", "q_proj"], vocab_size=102)
    export_onnx(gralora, tmp_path / "onnx", adapters="data", verify=False)
    opened = load(tmp_path / "onnx", threads=1)
    decoder = opened.decoder(rows=1, capacity=24)
    assert decoder.verify_problem == "the graph of its rows gives logits after the last token of each alone"
    assert len(opened.generate(PROMPTS[0], adapter="wide", max_new_tokens=9)) == 9

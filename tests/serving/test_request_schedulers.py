"""Schedulers: who runs together, who waits, and that one request does not disturb another."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from served_exports import chat_tokenizer, decoders, greedy
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gralora_fx.errors import ServingError
from gralora_fx.run.engine.limits import end_tokens
from gralora_fx.run.generate.answer_options import AnswerOptions, Sampling
from gralora_fx.run.generate.completion import TextRequest
from gralora_fx.run.generate.request_errors import QueueFullError, RunError, StoppedError
from gralora_fx.run.generate.token_choice import TokenChooser
from gralora_fx.service.scheduling.continuous import ContinuousScheduler
from gralora_fx.service.scheduling.row_batches import RowBatches, RowJob
from gralora_fx.serving import Decoder, load

Exported = tuple[Path, dict[str | None, Any]]


class Recorder:
    """Keeps what schedulers tell."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.prompt = self.new = self.waits = self.begun = self.failures = self.asked = self.found = 0
        self.proposed = self.accepted = 0

    def waited(self, seconds: float) -> None:
        assert seconds >= 0
        self.waits += 1

    def began(self, seconds: float) -> None:
        assert seconds >= 0
        self.begun += 1

    def ran(self, seconds: float, rows: int) -> None:
        assert seconds >= 0
        self.rows.append(rows)

    def read(self, tokens: int) -> None:
        self.prompt += tokens

    def looked_up(self, tokens: int, found: int) -> None:
        self.asked += tokens
        self.found += found

    def generated(self, tokens: int) -> None:
        self.new += tokens

    def drafted(self, proposed: int, accepted: int) -> None:
        self.proposed += proposed
        self.accepted += accepted

    def failed(self) -> None:
        self.failures += 1


class Caller:
    """Receives the pieces of one request."""

    def __init__(self) -> None:
        self.events: queue.Queue[Any] = queue.Queue()

    def text(self) -> str:
        """Return the whole answer."""
        pieces = [self.events.get(timeout=20)]
        while not isinstance(pieces[-1], RunError) and pieces[-1].ending is None:
            pieces.append(self.events.get(timeout=20))
        if isinstance(pieces[-1], RunError):
            raise pieces[-1]
        return "".join(piece.text for piece in pieces)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    paths, oracles = decoders(tmp_path_factory.mktemp("scheduled"), "data")
    return paths["data"], oracles


def scheduler_of(path: Path, *, rows: int = 2, chunk: int = 4, max_queue: int = 8) -> tuple[Any, Decoder, Any]:
    decoder, recorder = load(path).decoder(rows=rows, chunk=chunk), Recorder()
    scheduler = ContinuousScheduler(decoder, chat_tokenizer(), recorder, max_queue=max_queue)
    return scheduler, decoder, recorder


def request(prompt: Sequence[int], adapter: str | None = None, count: int = 6, **sampling: Any) -> TextRequest:
    return TextRequest(tuple(prompt), count, AnswerOptions(Sampling(**sampling)), adapter=adapter)


def prompts(count: int) -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(3, 97, size).tolist() for size in generator.integers(1, 30, count)]


def test_requests_join_and_leave_between_steps(exported: Exported) -> None:
    path, oracles = exported
    scheduler, decoder, recorder = scheduler_of(path)
    asked = list(zip(prompts(9), [*oracles] * 3, range(3, 12), strict=True))
    callers = [Caller() for _ in asked]
    scheduler.submit([(request(*fields), caller.events.put) for fields, caller in zip(asked, callers, strict=True)])
    scheduler.start()
    texts = [caller.text() for caller in callers]
    scheduler.stop()
    tokens = [greedy(oracles[adapter], prompt, count) for prompt, adapter, count in asked]
    assert texts == [chat_tokenizer().decode(ids, skip_special_tokens=True) for ids in tokens]
    assert decoder.free == 2
    assert set(recorder.rows) == {1, 2}
    assert (recorder.waits, recorder.begun, recorder.new) == (9, 9, sum(map(len, tokens)))
    assert recorder.prompt == sum(len(prompt) for prompt, _, _ in asked)


def test_a_defect_in_a_step_ends_its_requests_and_nothing_else(
    exported: Exported, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler, decoder, recorder = scheduler_of(exported[0])
    ran = recorder.ran
    monkeypatch.setattr(recorder, "ran", lambda *_: 1 / 0)
    first = Caller()
    scheduler.submit([(request([5, 6, 7]), first.events.put)])
    scheduler.start()
    with pytest.raises(RunError, match="log says why"):
        first.text()
    assert "a step ended halfway" in caplog.text
    monkeypatch.setattr(recorder, "ran", ran)
    second = Caller()
    scheduler.submit([(request([5, 6, 7]), second.events.put)])
    assert second.text()
    scheduler.stop()
    assert (decoder.free, recorder.failures) == (2, 1)


def test_a_long_prompt_is_read_in_chunks_beside_an_answer(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, decoder, _ = scheduler_of(exported[0])
    steps: list[list[int]] = []
    step = decoder.step
    monkeypatch.setattr(
        decoder, "step", lambda t, *last: (steps.append(sorted(map(len, t.values()))), step(t, *last))[1]
    )
    callers = [Caller(), Caller()]
    asked = [request([5, 6], count=12), request([7] * 14, count=1)]
    scheduler.submit([(fields, caller.events.put) for fields, caller in zip(asked, callers, strict=True)])
    scheduler.start()
    _ = [caller.text() for caller in callers]
    scheduler.stop()
    assert steps[0] == [2]  # the rest of the budget is too small for the second prompt, which has the next ones
    assert steps[1:5] == [[1, 4]] * 3 + [[1, 2]]
    assert steps[5:] == [[1]] * (len(steps) - 5)


def test_a_long_prompt_for_which_no_answer_waits_is_read_at_once(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler, decoder, _ = scheduler_of(exported[0], rows=3)
    steps: list[list[int]] = []
    step = decoder.step
    monkeypatch.setattr(
        decoder, "step", lambda t, *last: (steps.append(sorted(map(len, t.values()))), step(t, *last))[1]
    )
    callers = [Caller() for _ in range(3)]
    asked = [request([7] * 3, count=1), request([7] * 14, count=1), request([5, 6], count=1)]
    scheduler.submit([(fields, caller.events.put) for fields, caller in zip(asked, callers, strict=True)])
    scheduler.start()
    _ = [caller.text() for caller in callers]
    scheduler.stop()
    assert steps == [[3], [14], [2]]


def test_short_prompts_share_a_step(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, decoder, _ = scheduler_of(exported[0], rows=3)
    steps: list[list[int]] = []
    step = decoder.step
    monkeypatch.setattr(
        decoder, "step", lambda t, *last: (steps.append(sorted(map(len, t.values()))), step(t, *last))[1]
    )
    callers = [Caller() for _ in range(3)]
    asked = [request([5, 6], count=1), request([7] * 3, count=1), request([8, 9], count=1)]
    scheduler.submit([(fields, caller.events.put) for fields, caller in zip(asked, callers, strict=True)])
    scheduler.start()
    _ = [caller.text() for caller in callers]
    scheduler.stop()
    assert steps == [[2, 2], [3]]


def test_a_request_that_is_given_up_leaves_its_row_and_its_mates(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, oracles = exported
    scheduler, decoder, _ = scheduler_of(path, max_queue=1)
    permits, step = threading.Semaphore(0), decoder.step
    monkeypatch.setattr(decoder, "step", lambda *given: (permits.acquire(), step(*given))[1])
    callers = [Caller() for _ in range(3)]
    first, mate, waiting = scheduler.submit(
        [(request([5 + index] * 3, "wide", 9), caller.events.put) for index, caller in enumerate(callers)]
    )
    with pytest.raises(QueueFullError, match="3 requests run or wait, and there is room for 3"):
        scheduler.submit([(request([5]), Caller().events.put)])
    waiting.cancel()
    waiting = scheduler.submit([(request([7] * 3, "wide", 9), callers[2].events.put)])[0]  # in its place
    assert scheduler.in_flight == 3
    scheduler.start()
    permits.release(2)
    callers[0].events.get(timeout=20)
    first.cancel()
    permits.release(100)
    for index in (1, 2):
        ids = greedy(oracles["wide"], [5 + index] * 3, 9)
        assert callers[index].text() == chat_tokenizer().decode(ids, skip_special_tokens=True)
    scheduler.stop()
    assert (first.is_done, mate.is_done, waiting.is_done, decoder.free) == (False, True, True, 2)


def test_stopping_answers_what_was_taken(exported: Exported) -> None:
    scheduler, _, _ = scheduler_of(exported[0], rows=1)
    callers = [Caller() for _ in range(4)]
    scheduler.submit([(request([9, 8], count=3), caller.events.put) for caller in callers])
    scheduler.start()
    scheduler.stop()
    assert len({caller.text() for caller in callers}) == 1
    with pytest.raises(StoppedError, match="is stopping"):
        scheduler.submit([(request([9]), Caller().events.put)])


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 3},
        {"top_p": 0.4},
        {"min_p": 0.2},
        {"temperature": 1.7, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    ],
)
def test_draws_have_the_distribution_of_transformers_processors(fields: dict[str, Any]) -> None:
    logits = np.random.default_rng(1).normal(size=50).astype(np.float32) * 3
    defaults = {"top_k": 0, **fields}
    choose = TokenChooser(Sampling(do_sample=True, seed=4, **defaults), [1], frozenset())
    drawn = [choose(logits).token for _ in range(3000)]
    kinds = {"temperature": TemperatureLogitsWarper, "top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper}
    kinds["min_p"] = MinPLogitsWarper
    processors = LogitsProcessorList([kind(fields[name]) for name, kind in kinds.items() if name in fields])
    shares = processors(torch.tensor([[1]]), torch.from_numpy(logits)[None]).softmax(-1)[0].numpy()
    counts = np.bincount(drawn, minlength=50)
    assert (np.abs(counts - 3000 * shares) <= 5 * np.sqrt(3000 * shares * (1 - shares)) + 1e-3).all()
    again = TokenChooser(Sampling(do_sample=True, seed=4, **defaults), [1], frozenset())
    assert drawn[:300] == [again(logits).token for _ in range(300)]
    assert TokenChooser(Sampling(), [1], frozenset())(logits).token == int(logits.argmax())


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        ({"eos_token_id": [2, 5]}, {"eos_token_id": 3}, {2, 5}),
        ({}, {"eos_token_id": 0}, {0}),
        (None, {"text_config": {"eos_token_id": 7}}, {7}),
        (None, {}, set()),
    ],
)
def test_end_tokens(tmp_path: Path, generation: Any, config: dict[str, Any], ends: set[int]) -> None:
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(str(generation).replace("'", '"'))
    assert end_tokens(tmp_path, config) == ends
    with pytest.raises(ServingError, match="not an id of a token"):
        end_tokens(tmp_path / "none", {"eos_token_id": "x"})


def run_held(batches: RowBatches, started: threading.Event, jobs: list[RowJob]) -> None:
    """Submit a job that runs at once, and others that wait meanwhile."""
    batches.start()
    batches.put(jobs[:1])
    assert started.wait(20)
    for job in jobs[1:]:
        batches.put([job])


def test_rows_near_in_length_run_together_and_none_starves() -> None:
    started, held = threading.Event(), threading.Event()
    runs: list[list[Any]] = []

    def run(jobs: Sequence[RowJob]) -> list[Any]:
        payloads = [job.payload for job in jobs]
        runs.append(payloads)
        started.set()
        assert held.wait(20)
        return payloads

    batches = RowBatches(run, Recorder(), max_batch=3, max_queue=20)
    lengths = [1, 90, 5, 80, 6, 100, 4, 5, 70]
    jobs = [RowJob("x", 1, length, length) for length in lengths]
    run_held(batches, started, jobs)
    held.set()
    batches.stop()
    assert runs == [[1], [90, 80, 100], [5, 5, 6], [4, 70]]
    assert [job.result.result() for job in jobs] == lengths


def test_rows_of_one_key_run_together_and_a_wrong_one_fails_alone() -> None:
    started, held = threading.Event(), threading.Event()
    runs: list[list[Any]] = []

    def run(jobs: Sequence[RowJob]) -> list[Any]:
        payloads = [job.payload for job in jobs]
        runs.append(payloads)
        started.set()
        assert held.wait(20)
        if "wrong" in payloads:
            raise ServingError("wrong")
        if "broken" in payloads:
            raise ValueError("secret")
        return [payload.upper() for payload in payloads]

    recorder = Recorder()
    batches = RowBatches(run, recorder, max_batch=3, max_queue=9)
    names = ["first", "a", "other", "wrong", "b", "c", "broken", "gone"]
    jobs = [RowJob("x" if name != "other" else "y", 1, name) for name in names]
    run_held(batches, started, jobs)
    assert jobs[-1].result.cancel()
    with pytest.raises(QueueFullError, match="7 rows run or wait, and there is room for 12"):
        batches.put([RowJob("x", 6, "big")])
    with pytest.raises(ServingError, match="13 rows are given, and there is room for 12"):
        batches.put([RowJob("x", 13, "big")])
    held.set()
    batches.stop()
    assert runs == [
        ["first"],
        ["a", "wrong", "b"],
        ["a"],
        ["wrong"],
        ["b"],
        ["other"],
        ["c", "broken"],
        ["c"],
        ["broken"],
    ]
    assert [jobs[index].result.result() for index in (0, 1, 2, 4, 5)] == ["FIRST", "A", "OTHER", "B", "C"]
    with pytest.raises(ServingError, match=r"^wrong$"):
        jobs[3].result.result()
    with pytest.raises(RunError, match="log says why"):
        jobs[6].result.result()
    with pytest.raises(StoppedError):
        batches.put([RowJob("x", 1, "late")])


def test_jobs_are_counted_while_others_come_and_go() -> None:
    jobs = RowBatches(lambda _: [], Recorder(), max_batch=4, max_queue=1_000_000)
    stopped = threading.Event()
    errors: list[RuntimeError] = []

    def count() -> None:
        try:
            while not stopped.is_set():
                assert jobs.in_flight >= 0
        except RuntimeError as error:
            errors.append(error)

    counter = threading.Thread(target=count)
    counter.start()
    for _ in range(200):
        jobs.put([RowJob("x", 1, None)] * 50)
    stopped.set()
    counter.join()
    assert errors == []
    assert jobs.in_flight == 10_000

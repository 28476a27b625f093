"""The prefix cache: first tokens, a chat of ten turns, the cost of copies, and answers compared with cold ones.

Times are of SmolLM2-135M with a GraLoRA adapter folded in, float32 and int4, and of a random Mamba2 of 130M's widths,
on two threads: prompts with 1,000 cached tokens or none go through the service's scheduler. A thousand random
    interleavings of requests go to a tiny Llama with eight adapters, which are replaced meanwhile, and to a tiny
    Falcon-H1.
"""

from __future__ import annotations

import queue
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from benchmarks import hybrids, smollm2
from benchmarks.harness import Claim, Ratio, Report, Table, progress
from gralora_fx import trace
from gralora_fx.base.sources.model_files import EXPORT_FILE
from gralora_fx.exporters import export_onnx
from gralora_fx.run.generate.answer_options import AnswerOptions, Sampling
from gralora_fx.run.generate.completion import TextRequest
from gralora_fx.service.scheduling.continuous import ContinuousScheduler
from gralora_fx.service.scheduling.queue import Observer
from gralora_fx.serving import Decoder, OrtModel, load

RUNS, TINY, TESTS = Path("runs/generation"), Path("runs/prefix_cache"), Path(__file__).parents[1] / "tests"
THREADS, CHUNK, LIMIT = 2, 64, 2**29
SHARED, OWN = 1000, 16  # a prompt's tokens: shared with others, and its own
TURNS, SAID, ANSWERED = 10, 40, 24  # of a chat: turns, and tokens per user message and answer
STEPS, PROMPT = 128, 100  # steps of decoding rows, and tokens in their caches
COLD, WARM, WITHOUT, WITH = "cold", "1,000 tokens known", "without a prefix cache", "with one"


def run(iterations: int = 7, interleavings: int = 1000) -> Report:
    """Measure `iterations` prompts of each side, a chat, steps, copies and random interleavings."""
    report = Report("prefix_cache", "prefix cache: SmolLM2-135M, and a tiny Llama with eight adapters")
    for precision, directory in chain(smollm2.exports(RUNS), _mamba2()):
        model = load(directory, threads=THREADS)
        _compare_first_tokens(report, model, precision, iterations)
        _count_a_chat(report, model, precision)
        _time_steps(report, model, precision)
    _compare_answers(report, interleavings)
    return report


def _mamba2() -> Iterator[tuple[str, Path]]:
    directory = TINY / "mamba2"
    if not (directory / EXPORT_FILE).is_file():
        progress("export, Mamba2")
        tokenizer = AutoTokenizer.from_pretrained(RUNS / "base")
        traced = trace(hybrids.mamba2(), task="text-generation-with-past")
        export_onnx(traced, directory, verify=False, tokenizer=tokenizer)
    yield "fp32, Mamba2", directory


class _Service(Observer):
    """A running scheduler with a prefix cache, and the prompt tokens that it has read.

    Attributes:
        decoder: Its rows.
        prompt_tokens: Number of prompt tokens read.
    """

    def __init__(self, model: OrtModel) -> None:
        self.decoder = model.decoder(rows=2, capacity=2048, chunk=CHUNK, prefix_cache=LIMIT)
        self.prompt_tokens = 0
        self._scheduler = ContinuousScheduler(self.decoder, model.tokenizer, self, max_queue=4)
        self._scheduler.start()

    def read(self, tokens: int) -> None:
        """As in `Observer`."""
        self.prompt_tokens += tokens

    def answer(self, prompt: Sequence[int], count: int) -> tuple[float, list[int], int]:
        """Return the seconds to the first token, the answer, and the number of cached prompt tokens."""
        pieces: queue.Queue[Any] = queue.Queue()
        request = TextRequest(tuple(prompt), count, AnswerOptions(Sampling(eos_token_id=[])))
        started = time.perf_counter()
        (job,) = self._scheduler.submit([(request, lambda piece: pieces.put((time.perf_counter(), piece)))])
        at, piece = pieces.get()
        while piece.ending is None:
            piece = pieces.get()[1]
        time.sleep(0.05)  # so that the row is closed
        return (job.times.answering or at) - started, job.answer.ids, job.cached

    def stop(self) -> None:
        """End."""
        self._scheduler.stop()


def _compare_first_tokens(report: Report, model: OrtModel, precision: str, iterations: int) -> None:
    numbers, service = np.random.default_rng(0), _Service(model)
    seconds: dict[str, list[float]] = {COLD: [], WARM: []}
    most = 0
    assert service.decoder.prefix_cache is not None
    for iteration in range(-1, iterations):
        progress(f"{precision}, prompt {iteration + 2} of {iterations + 1}")
        shared = numbers.integers(10, 40000, SHARED).tolist()
        for side in seconds:
            if side == WARM and service.decoder.prefix_cache.keeps_states:
                service.answer([*shared, 5, 6, 7, 8], 1)  # leaves a snapshot where it diverges from the first
            prompt = shared + numbers.integers(10, 40000, OWN).tolist()
            first, _, known = service.answer(prompt, 1)
            assert known == (0 if side == COLD else SHARED)
            if iteration >= 0:
                seconds[side].append(first)
        most = max(most, service.decoder.prefix_cache.size)
    service.stop()
    rows: list[Mapping[str, Any]] = [
        {"prompt": side, "first token, ms": 1e3 * statistics.median(times)} for side, times in seconds.items()
    ]
    report.tables.append(Table(f"{precision}: a prompt of {SHARED + OWN} tokens", rows))
    ratio = Ratio.between(seconds[WARM], seconds[COLD]).of_medians
    report.claims.append(Claim(f"{precision}, first token with {SHARED} known tokens over cold", ratio, at_most=0.15))
    report.claims.append(Claim(f"{precision}, memory of the cache over its bound", most / LIMIT, at_most=1.0))


def _count_a_chat(report: Report, model: OrtModel, precision: str) -> None:
    numbers, service = np.random.default_rng(1), _Service(model)
    text: list[int] = []
    rows: list[Mapping[str, Any]] = []
    decoded = 0
    for turn in range(TURNS):
        progress(f"{precision}, turn {turn + 1} of {TURNS}")
        text += numbers.integers(10, 40000, SAID).tolist()
        before = service.prompt_tokens
        first, answer, known = service.answer(text, ANSWERED)
        read = service.prompt_tokens - before
        rows.append({"turn": turn + 1, "prompt": len(text), "cached": known, "read": read, "first, ms": 1e3 * first})
        decoded += len(answer) - 1  # the last is chosen, and read by the next turn
        prompt, text = len(text), text + answer
    service.stop()
    report.tables.append(Table(f"{precision}: a chat of {TURNS} turns", rows))
    of_prompts = service.prompt_tokens / prompt
    report.claims.append(
        Claim(f"{precision}, tokens of prompts that are read over the last prompt's", of_prompts, at_most=1.0)
    )
    if precision.startswith("fp32"):  # in other precisions an answer is read again, as a part of the next prompt
        once = (service.prompt_tokens + decoded) / (len(text) - 1)
        report.claims.append(Claim(f"{precision}, all tokens that are read over those of the chat", once, at_most=1.0))


def _time_steps(report: Report, model: OrtModel, precision: str) -> None:
    rows: list[Mapping[str, Any]] = []
    for count in (1, 8):
        progress(f"{precision}, steps of {count} rows")
        sides = {WITHOUT: _Rows(model, count, None), WITH: _Rows(model, count, LIMIT)}
        totals: dict[str, list[float]] = {side: [] for side in sides}
        for step in range(STEPS):
            for side in list(sides)[:: 1 if step % 2 else -1]:
                totals[side].append(sides[side].step())
        sums = {side: sum(sorted(times)[: -STEPS // 20]) for side, times in totals.items()}  # without the worst
        stores = [sides[WITH].store() for _ in range(3)]
        fills = [sides[WITH].fill() for _ in range(3)]
        row = {"rows": count, **{f"a step {side}, ms": 1e3 * statistics.median(t) for side, t in totals.items()}}
        tokens = PROMPT + STEPS
        row |= {f"{tokens} tokens in, ms": 1e3 * min(stores), f"{tokens} tokens out, ms": 1e3 * min(fills)}
        rows.append(row)
        median = Ratio.between(totals[WITH], totals[WITHOUT]).median_of_pairs
        report.claims.append(
            Claim(f"{precision}, {count} rows: a step with a cache over one without", median, at_most=1.02)
        )
        mean = statistics.mean(totals[WITH]) / statistics.mean(totals[WITHOUT])
        trimmed = sums[WITH] / sums[WITHOUT]
        report.notes.append(
            f"{precision}, {count} rows: {STEPS} steps with a cache take {mean:.3f} of those without (copies of blocks "
            f"included; {trimmed:.3f} without the slowest twentieth)"
        )
    report.tables.append(Table(f"{precision}: steps of rows that decode, and copies into and out of the cache", rows))


class _Rows:
    """Rows that have read a prompt each, and decode."""

    def __init__(self, model: OrtModel, count: int, limit: int | None) -> None:
        numbers = np.random.default_rng(2)
        self._decoder: Decoder = model.decoder(
            rows=count + 1, capacity=PROMPT + STEPS + 8, chunk=PROMPT, prefix_cache=limit
        )
        self._texts = [numbers.integers(10, 40000, PROMPT).tolist() for _ in range(count)]
        self._rows = [self._decoder.open() for _ in range(count)]
        self._decoder.step(dict(zip(self._rows, self._texts, strict=True)))

    def step(self) -> float:
        """Return the seconds of a step."""
        tokens = {row: [7 + len(text) % 1000] for row, text in zip(self._rows, self._texts, strict=True)}
        started = time.perf_counter()
        self._decoder.step(tokens)
        seconds = time.perf_counter() - started
        for text, read in zip(self._texts, tokens.values(), strict=True):
            text += read
        return seconds

    def store(self) -> float:
        """Return the seconds to store all that a row has read in an empty cache."""
        cache, shared = self._decoder.prefix_cache, self._decoder._shared
        assert cache is not None
        assert shared is not None
        tensors = shared._tensors(self._rows[0])
        root = (None, f"timed {time.perf_counter()}")
        started = time.perf_counter()
        cache.store(root, self._texts[0], tensors, shared._states(self._rows[0]))
        return time.perf_counter() - started

    def fill(self) -> float:
        """Return the seconds to fill a new row with all that another has read."""
        cache, shared = self._decoder.prefix_cache, self._decoder._shared
        assert cache is not None
        assert shared is not None
        states = shared._states(self._rows[0])
        cache.store((None, None), self._texts[0], shared._tensors(self._rows[0]), states)
        row = self._decoder.open()
        started = time.perf_counter()
        known = self._decoder.fill(row, [*self._texts[0], 1, 2])
        seconds = time.perf_counter() - started
        assert known == len(self._texts[0])
        self._decoder.close(row)
        return seconds


def _compare_answers(report: Report, count: int) -> None:
    sys.path.append(str(TESTS))  # whose helpers import each other by their names
    from tests.prefix_interleavings import Interleavings, made, made_hybrid

    for name, make in {"Llama": made, "Falcon-H1": made_hybrid}.items():
        progress(f"a tiny {name} and sixteen versions of its eight adapters")
        (TINY / name).mkdir(parents=True, exist_ok=True)
        interleave(report, name, Interleavings(*make(TINY / name)), count)


def interleave(report: Report, name: str, found: Any, count: int) -> None:
    """Run interleavings of `tests/prefix_interleavings.py`; report their answers and the memory of the cache."""
    for done in range(count):
        if done % 100 == 0:
            progress(f"{name}, interleaving {done + 1} of {count}")
        found.run()
    row = {
        "interleavings": count,
        "answers": found.answers,
        "tokens taken over": found.counts.found,
        "read": found.counts.read_tokens,
        "adapters replaced": found.reloads,
        "given up": found.given_up,
        "evictions": found.cache.evictions,
        "most bytes": found.most,
        "bound": found.cache.limit,
    }
    report.tables.append(Table(f"{name}: random interleavings of 8 adapters", [row]))
    what = f"{name}, interleavings"
    report.claims.append(Claim(f"{what}, answers that differ from the cold one", float(found.wrong), at_most=0.0))
    memory = found.most / found.cache.limit
    report.claims.append(Claim(f"{what}, memory of the cache over its bound", memory, at_most=1.0))

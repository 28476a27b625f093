"""`gralora-fx serve` with its defaults: memory at each stage, start-up time, and the cost of growing caches per token.

SmolLM2-135M in int4. The service is a separate process; its memory is its RSS. Tokens are timed in this process: rows
with growing buffers, compared with rows whose buffers are numpy zeros, allocated whole in huge pages.
"""

from __future__ import annotations

import json
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock
from urllib.request import Request, urlopen

import numpy as np
import psutil

from benchmarks import smollm2
from benchmarks.harness import Case, Claim, Report, Table, measure, progress
from gralora_fx.base.sources.model_files import EXPORT_FILE
from gralora_fx.core.loading.bases import load_traced
from gralora_fx.exporters import export_onnx
from gralora_fx.run.engine import cache_buffers
from gralora_fx.run.engine.decoder import Decoder
from gralora_fx.run.engine.limits import part_length
from gralora_fx.serving import OrtModel, load

RUNS = Path("runs/service_memory")
THREADS, MB = 2, 10**6
SHORT, AT_ONCE, NEW = 67, 16, 64  # tokens per prompt, requests, and tokens per answer
LONG, LONG_ROWS, LONG_NEW = 1000, 4, 160
SETTLED = 2.5  # seconds after which an idle service has returned memory
OVERHEAD, SPARE, SLOWER = 300, 1.1, 1.02  # bounds: MB beside the weights, ratio to the rows' caches, ratio per token
ROOM, TOKEN = 16 * 8192, 2 * 30 * 3 * 64 * 4  # capacity of all rows in tokens, and cache bytes per token
CONTEXTS, ROWS = (128, 1000), (1, 8, 16)
GROWING, FIXED = "growing", "fixed, huge pages"


def run(iterations: int = 40, starts: int = 3) -> Report:
    """Measure a service, its time to start in `starts` starts, and `iterations` tokens of each kind."""
    report = Report("service-memory", "gralora-fx serve with its defaults: SmolLM2-135M in int4")
    path = _export()
    seconds: list[tuple[float, float]] = []
    for start in range(starts):
        progress(f"start {start + 1} of {starts}")
        with _served(path) as service:
            seconds.append((service.seconds, service.cpu_seconds))
            if start == 0:
                _measure_memory(report, service, path)
    started, cpu = (statistics.median(each) for each in zip(*seconds, strict=True))
    report.tables.append(Table("seconds until the service is ready", [{"seconds": started, "of processors": cpu}]))
    _measure_tokens(report, load(path, threads=THREADS), iterations)
    return report


def _export() -> Path:
    """Make the export, once."""
    path = RUNS / "int4"
    if not (path / EXPORT_FILE).is_file():
        base = smollm2.base(RUNS / "base")
        progress("export")
        traced = load_traced(str(base), None, "text-generation-with-past")
        export_onnx(traced, path, quantize="int4", tokenizer=base, verify=False, overwrite=True)
    return path


def _measure_memory(report: Report, service: _Service, path: Path) -> None:
    weights = sum(file.stat().st_size for file in path.glob("model.onnx*")) / MB
    numbers = random.Random(0)
    time.sleep(SETTLED)
    ready = service.memory()
    progress(f"{AT_ONCE} requests at once")
    short = service.most(numbers, AT_ONCE, SHORT, NEW)
    time.sleep(SETTLED)
    idle = service.memory()
    progress(f"{LONG_ROWS} rows of {LONG} tokens")
    long = service.most(numbers, LONG_ROWS, LONG, LONG_NEW)
    stages = {
        "ready": ready,
        f"{AT_ONCE} requests at once": short,
        "idle after them": idle,
        f"{LONG_ROWS} rows of {LONG} tokens": long,
    }
    shown = [{"": name, **vars(stage)} for name, stage in stages.items()]
    report.tables.append(Table(f"MB of the service; the weights are {weights:.0f}", shown))
    over = (long.rss - long.prefix_cache - (idle.rss - idle.prefix_cache)) / long.rows_hold
    report.claims += [
        Claim(f"idle after {AT_ONCE} requests at once, MB over the weights", idle.rss - weights, at_most=OVERHEAD),
        Claim(f"{LONG_ROWS} rows of {LONG} tokens, over what they hold", over, at_most=SPARE),
    ]


@dataclass(frozen=True)
class _Memory:
    """A service's memory in MB."""

    rss: float  # its resident set
    prefix_cache: float  # the prefix cache's part of it
    rows_hold: float  # keys and values of the tokens in the rows' caches


@dataclass(frozen=True)
class _Service:
    """A running service."""

    url: str  # its address
    process: psutil.Process  # its process
    seconds: float  # wall-clock seconds of its start
    cpu_seconds: float  # CPU seconds of its start

    def memory(self) -> _Memory:
        """Return its memory now."""
        with urlopen(f"{self.url}/metrics") as answer:
            text = answer.read().decode()

        def of(name: str) -> float:
            found = re.search(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
            assert found is not None
            return float(found[1])

        rows_hold = of("vllm:kv_cache_usage_perc") * ROOM * TOKEN / MB
        return _Memory(self.process.memory_info().rss / MB, of("gralora_fx_prefix_cache_bytes") / MB, rows_hold)

    def most(self, numbers: random.Random, count: int, length: int, new: int) -> _Memory:
        """Return its memory while it answers concurrent random prompts, when their rows hold most."""
        prompts = [[numbers.randrange(10, 40000) for _ in range(length)] for _ in range(count)]
        found = [self.memory()]
        with ThreadPoolExecutor(count) as pool:
            answers = [pool.submit(self._answer, prompt, new) for prompt in prompts]
            while not all(answer.done() for answer in answers):
                found.append(self.memory())
                time.sleep(0.1)
        for answer in answers:
            answer.result()
        return max(found, key=lambda memory: memory.rows_hold)

    def _answer(self, prompt: Sequence[int], new: int) -> None:
        body = {"model": "int4", "prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True}
        headers = {"Content-Type": "application/json"}
        with urlopen(Request(f"{self.url}/v1/completions", json.dumps(body).encode(), headers)) as answer:
            answer.read()


@contextmanager
def _served(path: Path) -> Iterator[_Service]:
    """Run a service over an export with its defaults within the block."""
    command = [sys.executable, "-m", "gralora_fx.cli", "serve", "--onnx", str(path), "--port", "0"]
    started = time.perf_counter()
    with subprocess.Popen([*command, "--threads", str(THREADS)], stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            found = next(
                match for line in process.stderr if (match := re.search(r"running on (http://\S+?);?\s", line))
            )
            seconds, own = time.perf_counter() - started, psutil.Process(process.pid)
            threading.Thread(target=process.stderr.read, daemon=True).start()
            yield _Service(found[1], own, seconds, sum(own.cpu_times()[:2]))
        finally:
            process.terminate()


def _measure_tokens(report: Report, model: OrtModel, iterations: int) -> None:
    for context in CONTEXTS:
        for count in ROWS:
            progress(f"a token of {count} rows behind {context} others")
            with mock.patch.object(cache_buffers, "PagedBytes", _FixedBytes):
                fixed = _Rows(model, count, context)
            growing = _Rows(model, count, context)
            cases = [Case.of(GROWING, growing.step), Case.of(FIXED, fixed.step)]
            times = measure(cases, iterations=iterations)
            rows = [times.row(GROWING, FIXED), times.row(FIXED)]
            report.tables.append(Table(f"a token of {count} rows behind {context} others", rows))
            ratio = times.ratio(GROWING, FIXED).median_of_pairs
            what = f"a token of {count} rows behind {context}, growing buffers over fixed ones"
            report.claims.append(Claim(what, ratio, at_most=SLOWER))


class _FixedBytes:
    """Zeros in the pages that numpy requests, never released."""

    def __init__(self, count: int) -> None:
        self.array = np.zeros(count, np.uint8)

    def take(self, start: int, stop: int) -> None:
        """Do nothing."""

    def give_back(self, start: int, stop: int) -> None:
        """Do nothing."""


class _Rows:
    """Decoding rows that have each read a prompt."""

    def __init__(self, model: OrtModel, count: int, context: int) -> None:
        numbers = np.random.default_rng(0)
        self._decoder: Decoder = model.decoder(rows=count)
        self._rows = [self._decoder.open() for _ in range(count)]
        for row in self._rows:
            prompt = numbers.integers(10, 40000, context).tolist()
            self._decoder.fill(row, prompt)  # records the tokens to read
            while prompt:
                part = part_length(len(prompt), self._decoder.chunk)
                self._decoder.step({row: prompt[:part]})
                prompt = prompt[part:]

    def step(self) -> None:
        """Read a token in every row."""
        self._decoder.step({row: [7] for row in self._rows})

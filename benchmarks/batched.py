"""Eight rows with an adapter each in one run, compared with eight runs and a switch between them.

SmolLM2-135M with GraLoRA adapters on all seven projections: `model_rows.onnx` and `model.onnx` of one export. Every row
has read its own prompt and decodes its next token. Then a chunk of a long prompt joins seven decoding rows.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks import smollm2
from benchmarks.harness import Case, Claim, Report, Table, measure, progress
from gralora_fx import GraloraConfig, rewrite, trace
from gralora_fx.exporters import export_onnx
from gralora_fx.format.adapter_inputs import ADAPTER_IDS
from gralora_fx.format.export_directory import PAST_SEQLENS, QUERY_SEQLENS, ROWS_NAME
from gralora_fx.format.manifest import read_manifest
from gralora_fx.run.engine.adapters import Adapters
from gralora_fx.run.engine.cache_buffers import BufferedSteps, CacheBuffers
from gralora_fx.run.sessions.ort_values import as_tensor, empty_values, run_values
from gralora_fx.run.sessions.session import Runtime, open_session, quiet_options
from gralora_fx.run.sessions.session_views import as_past, with_adapter

RUNS = Path("runs/batched")
ROWS, PROMPT, CHUNK, THREADS = 8, 32, 64, 2
LEAST = {
    32: 3,
    8: 4,
}  # times the throughput; of rank 32, adapters are half as many bytes as the base, read in both cases
NAMES = [f"adapter_{index}" for index in range(ROWS)]
TOGETHER, SINGLE = "one run", "eight single runs"
DECODING, ALONE, JOINED = "seven rows decode", "the chunk alone", "the chunk joins them"


def run(iterations: int = 15, ranks: tuple[int, ...] = (32, 8)) -> Report:
    """Time `iterations` runs of each case for each rank: 32, 8 or both."""
    report = Report("batched", f"{ROWS} rows with {ROWS} adapters: SmolLM2-135M, GraLoRA k=2 on seven projections")
    base = smollm2.base(RUNS / "base")
    for rank in ranks:
        progress(f"exports with adapters of r={rank}")
        _compare(report, _export(base, rank), rank, iterations)
        gc.collect()
    return report


def _export(base: Path, rank: int) -> Path:
    """Make an export with the adapters, once."""
    path = RUNS / f"data_{rank}"
    if path.is_dir():
        return path
    traced = trace(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval(), task="text-generation-with-past"
    )
    config = GraloraConfig(r=rank, alpha=2, target_modules=smollm2.PROJECTIONS, init_weights=False)
    torch.manual_seed(0)
    model = rewrite(traced, config, adapter_name=NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, config)
    model.set_adapter(NAMES)
    export_onnx(model, path, adapters="data", verify=False, overwrite=True)
    return path


def _compare(report: Report, path: Path, rank: int, iterations: int) -> None:
    generator = np.random.default_rng(0)
    prompts = generator.integers(3, 1000, (ROWS, PROMPT))
    singles, rows = _Singles(path, prompts), _Rows(path, prompts)
    ids = generator.integers(3, 1000, (ROWS, 1))
    expected, actual = singles.decode(ids), rows.step(ids, np.ones(ROWS, dtype=np.int64))
    error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(actual, expected, strict=True))
    progress(f"decoding with r={rank}")
    times = measure(
        [
            Case.of(SINGLE, lambda: singles.decode(ids)),
            Case.of(TOGETHER, lambda: rows.step(ids, np.ones(ROWS, dtype=np.int64))),
        ],
        iterations=iterations,
    )
    report.tables.append(Table(f"a token of {ROWS} rows, r={rank}", [times.row(n, SINGLE) for n in (SINGLE, TOGETHER)]))
    report.claims.append(
        Claim(
            f"throughput of one run over eight, r={rank}",
            1 / times.ratio(TOGETHER, SINGLE).median_of_pairs,
            at_least=LEAST[rank],
        )
    )
    report.claims.append(Claim(f"largest difference of logits, r={rank}", error, at_most=1e-4))
    decoding = np.array([0, *[1] * (ROWS - 1)])
    chunk = np.array([CHUNK, *[0] * (ROWS - 1)])
    wide = generator.integers(3, 1000, (ROWS, CHUNK))
    times = measure(
        [
            Case.of(DECODING, lambda: rows.step(ids, decoding)),
            Case.of(ALONE, lambda: rows.step(wide, chunk)),
            Case.of(JOINED, lambda: rows.step(wide, decoding + chunk)),
        ],
        iterations=iterations,
    )
    report.tables.append(
        Table(f"a chunk of {CHUNK} tokens, r={rank}", [times.row(n) for n in (DECODING, ALONE, JOINED)])
    )
    delays = [
        (joined - decode) / alone
        for joined, decode, alone in zip(*(times.seconds[n] for n in (JOINED, DECODING, ALONE)), strict=True)
    ]
    report.claims.append(
        Claim(f"delay of decoding rows over the time of the chunk, r={rank}", float(np.median(delays)), at_most=1)
    )


class _Singles:
    """`model.onnx`, with a cache for each row."""

    def __init__(self, path: Path, prompts: np.ndarray[Any, Any]) -> None:
        session = open_session(path, Runtime(session_options=quiet_options(THREADS)))
        adapters = Adapters(path, read_manifest(path))
        self.sessions = [with_adapter(session, adapters.tensors_for(name, session)) for name in NAMES]
        self.pasts = [empty_values(session, 1) for _ in NAMES]
        self.length = 0
        self.pasts = [as_past(self._run(index, ids[None])) for index, ids in enumerate(prompts)]
        self.length = prompts.shape[1]

    def decode(self, ids: np.ndarray[Any, Any]) -> list[torch.Tensor]:
        """Return the logits of a token of each row; the caches stay as they are."""
        return [as_tensor(self._run(index, row[None])["logits"])[0, -1] for index, row in enumerate(ids)]

    def _run(self, index: int, ids: np.ndarray[Any, Any]) -> dict[str, Any]:
        positions = torch.arange(self.length, self.length + ids.shape[1])[None]
        feed = {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.ones(1, self.length + ids.shape[1], dtype=torch.long),
            "position_ids": positions,
        }
        return run_values(self.sessions[index], {**feed, **self.pasts[index]}, "a step")


class _Rows:
    """`model_rows.onnx` with a row for each adapter."""

    def __init__(self, path: Path, prompts: np.ndarray[Any, Any]) -> None:
        loaded = Adapters(path, read_manifest(path))
        self.stack = loaded.stack_of([loaded[name] for name in NAMES])
        self.ids = np.array([self.stack.ids[loaded[name]] for name in NAMES], dtype=np.int64)
        session = open_session(path, Runtime(session_options=quiet_options(THREADS)), name=ROWS_NAME)
        self.steps = BufferedSteps(session, CacheBuffers(session, ROWS, 4 * PROMPT + 2 * CHUNK))
        self.past = np.zeros(ROWS, dtype=np.int32)
        self.step(prompts, np.full(ROWS, prompts.shape[1]))
        self.past += prompts.shape[1]

    def step(self, ids: np.ndarray[Any, Any], counts: np.ndarray[Any, Any]) -> torch.Tensor:
        """Return the logits of each row; rows do not advance, so the next step overwrites this one."""
        feed = {"input_ids": ids, QUERY_SEQLENS: counts.astype(np.int32), PAST_SEQLENS: self.past}
        return self.steps({**feed, ADAPTER_IDS: self.ids}, self.stack.values)[:, -1]

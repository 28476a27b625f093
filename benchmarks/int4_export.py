"""CPU time of an int4 export of SmolLM2-135M by stage, without verification, and the quality of its tokens.

CPU seconds of all threads are counted, so that other load matters little; spinning threads count too, so one thread
(`--threads 1`) separates the stages best.
"""

from __future__ import annotations

import functools
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.few_bits_quality import TEXTS, held_out, permuted_model
from benchmarks.harness import Claim, Report, Table, progress
from gralora_fx import TracedModel
from gralora_fx.exporters import export_onnx, onnx
from gralora_fx.exporters.quantize import calibration, choice, round_in_order
from gralora_fx.exporters.verify.greedy_tokens import DecoderSteps
from gralora_fx.exporters.verify.quality_figures import kl_divergence
from gralora_fx.run.sessions.session import open_session

OUTPUT = Path("runs/int4_export")
STAGES = (
    (calibration, "drawn_to_choose", "the model draws texts"),
    (calibration, "measure_sensitivities", "it is run forward and backward"),
    (choice, "_candidate", "bits are chosen"),
    (choice, "round_in_order", "it is run layer by layer"),
    (round_in_order.Moments, "add", "products of inputs"),
    (round_in_order._Layer, "round", "rounding to 4 bits"),
    (onnx, "save_models", "rounding to 8 bits, packing, writing"),
)
REST = "conversion and the rest"


def run() -> Report:
    """Measure the CPU time of each stage, and how close the tokens are to float32's."""
    report = Report("int4_export", "int4 export of SmolLM2-135M without verification")
    source, tokenizer, traced = permuted_model()
    rows = held_out(tokenizer, traced)
    with torch.no_grad():
        expected = [source(ids, use_cache=False).logits[0] for ids in rows]
    spent = {quantize: _spent(traced, quantize) for quantize in (None, "int4")}
    total, without = (sum(seconds.values()) for seconds in (spent["int4"], spent[None]))
    stages = [
        {"stage": stage, "CPU s": seconds, "share %": 100 * seconds / total}
        for stage, seconds in sorted(spent["int4"].items(), key=lambda item: -item[1])
    ]
    title = f"{total:.1f} CPU seconds in all; an export in float32 takes {without:.1f}"
    report.tables.append(Table(title, stages))
    found = _compared(rows, expected)
    report.tables.append(Table(f"{sum(map(len, expected))} positions of {TEXTS} held-out texts", [found]))
    report.claims.append(Claim("float32's token, %", found["same token %"], at_least=75))
    shutil.rmtree(OUTPUT, ignore_errors=True)
    return report


def _spent(traced: TracedModel, quantize: Any) -> dict[str, float]:
    """Return the CPU seconds of each stage of an export, without those of nested stages."""
    progress(f"export, {quantize or 'float32'}")
    with _watched_stages() as spent:
        begin = time.process_time()
        export_onnx(traced, OUTPUT, quantize=quantize, logits="all", verify=False, overwrite=True)
        spent[REST] = time.process_time() - begin - sum(spent.values())
    return spent


@contextmanager
def _watched_stages() -> Iterator[dict[str, float]]:
    spent: dict[str, float] = defaultdict(float)
    within = [0.0]  # for each stage entered, CPU seconds of nested stages

    def watched(function: Callable[..., Any], label: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.process_time()
            within.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                taken = time.process_time() - begin
                spent[label] += taken - within.pop()
                within[-1] += taken

        return call

    with ExitStack() as stack:
        for owner, name, label in STAGES:
            stack.enter_context(mock.patch.object(owner, name, watched(getattr(owner, name), label)))
        yield spent


def _compared(rows: list[Tensor], expected: list[Tensor]) -> dict[str, Any]:
    session = open_session(OUTPUT)
    actual = [DecoderSteps(session, 1)(ids, torch.ones_like(ids))[0] for ids in rows]
    pairs = list(zip(expected, actual, strict=True))
    same = torch.cat([one.argmax(-1) == other.argmax(-1) for one, other in pairs]).float()
    divergences = [kl_divergence(one, other) for one, other in pairs]
    of_texts = torch.stack([divergence.mean() for divergence in divergences])
    return {
        "same token %": 100 * float(same.mean()),
        "KL, its standard error": f"{of_texts.mean():.4f} ± {of_texts.std() / len(of_texts) ** 0.5:.4f}",
        "size, MB": (OUTPUT / "model.onnx_data").stat().st_size / 1e6,
    }

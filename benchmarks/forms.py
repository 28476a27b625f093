"""GraLoRA's blocks or the equivalent plain LoRA: the cost of each form of adapters as data in a decoder.

Two layers of SmolLM2-135M's and of Llama-3.2-1B's widths with a GraLoRA adapter on all seven projections, float32 and
int4. Both forms are exported and stepped in turns on two threads: one row decodes, eight rows decode with an adapter
each, and one row reads a prompt. `gralora_fx.exporters.kinds.data_sites.takes_blocks` chooses an export's form; here
both are made, and its choice is compared with the better one.
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import Case, Claim, Report, Table, Timings, measure, progress
from gralora_fx import GraloraConfig, TracedModel, rewrite, trace
from gralora_fx.core.model.gralora_model import GraloraModel
from gralora_fx.exporters import export_onnx
from gralora_fx.exporters.kinds.data_sites import takes_blocks
from gralora_fx.serving import Decoder, load

RUNS = Path("runs/forms")
ROWS, PAST, PROMPT, THREADS = 8, 64, 256, 2
SIZES: Mapping[str, Mapping[str, int]] = {
    "SmolLM2-135M": {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3},
    "Llama-3.2-1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
BLOCKS, LORA = "blocks", "LoRA"
STEPS = ("one row decodes", "eight rows decode", f"{PROMPT} tokens are read")
# allowed ratio of the chosen form to the better one, which differs by step, machine and noise
MOST = 1.15


def in_form(form: str) -> AbstractContextManager[Any]:
    """Use a form for exports within the block, whatever the rule chooses: `BLOCKS` or `LORA`."""
    return mock.patch("gralora_fx.exporters.kinds.data_sites.takes_blocks", return_value=form == BLOCKS)


@dataclasses.dataclass(frozen=True)
class _Point:
    widths: str
    quantize: str | None
    k: int
    r: int

    def __str__(self) -> str:
        return f"{self.widths}, {self.quantize or 'fp32'}, k={self.k}, r={self.r}"


def run(iterations: int = 15, points: Callable[[str], bool] = lambda name: True) -> Report:
    """Time `iterations` steps of each kind in both forms, at all `points` or those named."""
    report = Report("forms", "adapters as data: GraLoRA's blocks beside plain LoRA, two layers of a decoder")
    rows: list[Mapping[str, Any]] = []
    for widths in SIZES:
        config = LlamaConfig(**SIZES[widths], num_hidden_layers=2, vocab_size=512, max_position_embeddings=1024)
        torch.manual_seed(0)
        traced = trace(LlamaForCausalLM(config).eval(), task="text-generation-with-past")
        for quantize, k, r in itertools.product((None, "int4"), (2, 4), (8, 32, 64)):
            point = _Point(widths, quantize, k, r)
            if points(str(point)):
                progress(str(point))
                rows += _compare(report, traced, point, iterations)
    report.tables.append(Table(f"a step, {THREADS} threads", rows))
    return report


def _compare(report: Report, traced: TracedModel, point: _Point, iterations: int) -> list[Mapping[str, Any]]:
    config = GraloraConfig(r=point.r, gralora_k=point.k, target_modules="all-linear", init_weights=False)
    model = rewrite(traced, config, adapter_name="a0")
    for index in range(1, ROWS):
        model.add_adapter(f"a{index}", config)
    model.set_adapter(list(model.configs))
    is_quantized = point.quantize is not None
    chosen = BLOCKS if takes_blocks(model, is_quantized=is_quantized) else LORA
    steps = {form: _Steps(model, point.quantize, form) for form in (BLOCKS, LORA)}
    rows = []
    for name in STEPS:
        times = measure([Case.of(form, steps[form].named(name)) for form in steps], iterations=iterations)
        rows.append(_row(point, name, times, chosen, {form: step.megabytes for form, step in steps.items()}))
        worst = times.ratio(chosen, times.best([BLOCKS, LORA])).median_of_pairs
        report.claims.append(Claim(f"{point}, {name}: chosen over the better form", worst, at_most=MOST))
    return rows


def _row(point: _Point, name: str, times: Timings, chosen: str, megabytes: Mapping[str, float]) -> Mapping[str, Any]:
    columns = {f"{form}, ms": 1e3 * times.median(form) for form in (BLOCKS, LORA)}
    sizes = {f"{form}, MB of 8": megabytes[form] for form in (BLOCKS, LORA)}
    ratio = times.ratio(LORA, BLOCKS).median_of_pairs
    return {"": str(point), "step": name, **columns, "LoRA / blocks": ratio, **sizes, "chosen": chosen}


class _Steps:
    """A decoder with eight adapters in one form."""

    def __init__(self, model: GraloraModel, quantize: str | None, form: str) -> None:
        path = RUNS / "export"
        shutil.rmtree(path, ignore_errors=True)
        with in_form(form):
            export_onnx(model, path, adapters="data", quantize=quantize, verify=False)  # type: ignore[arg-type]
        served = load(path, threads=THREADS)
        names = [f"a{index}" for index in range(ROWS)]
        self.megabytes = sum(v.nbytes for name in names for v in served.adapters[name].tensors.values()) / 1e6
        self._many = self._opened(served.decoder(rows=ROWS, capacity=512, chunk=PROMPT), names)
        self._one = self._opened(served.decoder(rows=1, capacity=1000, chunk=PROMPT), names[:1])
        self._prompts = served.decoder(rows=1, capacity=512, chunk=PROMPT)
        self._prompt = np.random.default_rng(0).integers(3, 500, PROMPT).tolist()
        shutil.rmtree(path)  # it is open

    @staticmethod
    def _opened(decoder: Decoder, names: list[str]) -> tuple[Decoder, list[int]]:
        rows = [decoder.open(name) for name in names]
        decoder.step({row: list(range(3, 3 + PAST)) for row in rows})
        return decoder, rows

    def named(self, step: str) -> Callable[[], object]:
        """Return a step by name."""
        return {STEPS[0]: self._decode_one, STEPS[1]: self._decode_many, STEPS[2]: self._read}[step]

    def _decode_one(self) -> object:
        decoder, rows = self._one
        return decoder.step({rows[0]: [7]})

    def _decode_many(self) -> object:
        decoder, rows = self._many
        return decoder.step({row: [7] for row in rows})

    def _read(self) -> None:
        row = self._prompts.open("a0")
        self._prompts.step({row: self._prompt})
        self._prompts.close(row)

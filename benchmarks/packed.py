"""A training step over a base in NF4 with gradient checkpointing, compared with PEFT over bitsandbytes (QLoRA)."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from benchmarks import smollm2
from benchmarks.checkpointing import BATCH, LENGTH, RANK, RUNS, SIZES, K, kept, step
from benchmarks.harness import Case, Claim, Report, Table, measure, progress
from gralora_fx import GraloraConfig, LoraConfig, rewrite, trace
from gralora_fx.loading import load_model

_LORA: dict[str, Any] = {"r": RANK, "target_modules": smollm2.PROJECTIONS}


def run(iterations: int = 5) -> Report:
    """Compare whole steps: their time, and the memory that they allocate and keep beside the model."""
    report = Report(
        "packed",
        f"packed: a step of SmolLM2-135M in NF4, checkpoints, {BATCH}x{LENGTH}, seven projections, r={RANK} k={K}",
    )
    progress("packed, SmolLM2")
    torch.manual_seed(0)
    base = smollm2.base(RUNS / "base")
    traced = trace(load_model(base, base_quantization="nf4", packed=True), task="text-generation")
    models: dict[str, Any] = {
        "PEFT GraLoRA": peft.get_peft_model(_by_bitsandbytes(base), peft.GraloraConfig(**SIZES)),
        "ours GraLoRA": rewrite(traced, GraloraConfig(**SIZES)),
        "PEFT LoRA": peft.get_peft_model(_by_bitsandbytes(base), peft.LoraConfig(**_LORA)),
        "ours LoRA": rewrite(traced, LoraConfig(**_LORA)),
    }
    ids = torch.randint(traced.config.vocab_size, (BATCH, LENGTH))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for model in models.values():
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    memory = {name: (_peak(model, inputs, ids), kept(model, inputs)) for name, model in models.items()}
    cases = [Case.of(name, lambda model=model: step(model, inputs, ids)) for name, model in models.items()]
    timings = measure(cases, iterations=iterations, warmup=1)
    rows = []
    for name, (peak, held) in memory.items():
        theirs = name.replace("ours", "PEFT")
        row = {**timings.row(name, theirs), "peak MB": peak / 1e6, "/ PEFT's": peak / memory[theirs][0]}
        rows.append(row | {"kept MB": held / 1e6, "kept / PEFT's": held / memory[theirs][1]})
        if name != theirs:
            ratio = timings.ratio(name, theirs).median_of_pairs
            report.claims.append(Claim(f"{name}: time over PEFT's", ratio, at_most=1.0))
            report.claims.append(Claim(f"{name}: peak memory over PEFT's", peak / memory[theirs][0], at_most=1.0))
    report.tables.append(
        Table("one step: time, the most memory it takes, and what the forward pass keeps, all beside the model", rows)
    )
    return report


def _by_bitsandbytes(base: Path) -> Any:
    """Return the base with bitsandbytes' four-bit layers, prepared as PEFT requires."""
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=how, dtype=torch.float32)
    return peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})


def _peak(model: Any, inputs: dict[str, Tensor], ids: Tensor) -> int:
    """Return the process's peak memory during a step beyond that before it, in bytes (Linux only)."""
    step(model, inputs, ids)
    model.zero_grad(set_to_none=True)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # return freed memory, so that it counts again
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = _held("VmRSS")
    step(model, inputs, ids)
    return _held("VmHWM") - before


def _held(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))

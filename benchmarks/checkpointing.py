"""A training step of SmolLM2-135M with and without gradient checkpointing, and PEFT's; and blocks as modules."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks import smollm2
from benchmarks.harness import Case, Claim, Report, Table, measure, progress
from benchmarks.models import small_llama
from gralora_fx import GraloraConfig, rewrite, trace

RUNS = Path("runs/checkpointing")
BATCH, LENGTH, RANK, K = 2, 256, 64, 4
SIZES: dict[str, Any] = {"r": RANK, "gralora_k": K, "target_modules": smollm2.PROJECTIONS}


def run(iterations: int = 5) -> Report:
    """Compare whole steps (forward and backward), memory kept for the backward pass, and the forward pass alone."""
    report = Report(
        "checkpointing",
        f"checkpointing: a step of SmolLM2-135M, batch {BATCH}x{LENGTH}, seven projections, r={RANK} k={K}, fp32",
    )
    progress("checkpointing, SmolLM2")
    torch.manual_seed(0)
    source = AutoModelForCausalLM.from_pretrained(smollm2.base(RUNS / "base"), dtype=torch.float32).train()
    ids = torch.randint(source.config.vocab_size, (BATCH, LENGTH))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    traced, config = trace(source, task="text-generation"), GraloraConfig(**SIZES)
    models: dict[str, Any] = {
        "PEFT": peft.get_peft_model(copy.deepcopy(source), peft.GraloraConfig(**SIZES)),
        "ours": rewrite(traced, config),
        "PEFT, checkpoints": peft.get_peft_model(copy.deepcopy(source), peft.GraloraConfig(**SIZES)),
        "ours, checkpoints": rewrite(traced, config),
    }
    for name, model in models.items():
        model.train()
        if "checkpoints" in name:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
    held = {name: kept(model, inputs) for name, model in models.items()}
    cases = [Case.of(name, lambda model=model: step(model, inputs, ids)) for name, model in models.items()]
    timings = measure(cases, iterations=iterations, warmup=1)
    rows = [
        {
            **timings.row(name, name.replace("ours", "PEFT")),
            "kept MB": held[name] / 1e6,
            "/ PEFT's": _over(held, name),
        }
        for name in models
    ]
    report.tables.append(
        Table("one step: time, and what the forward pass keeps for the backward pass, parameters apart", rows)
    )
    ours = models["ours"]
    flat, running = ours.graph_module, ours._state.current.running
    forward = measure(
        [
            Case.of("flat graph", lambda: _forward(flat, inputs)),
            Case.of("blocks", lambda: _forward(running, inputs)),
        ],
        iterations=4 * iterations,
    )
    report.tables.append(Table("forward alone", [forward.row(name, "flat graph") for name in ("flat graph", "blocks")]))
    report.tables.append(Table("torch.compile of a Llama of 12 layers, until the first step is done", _compilations()))
    for name, limit, memory in (("ours", 0.85, 1.0), ("ours, checkpoints", 0.9, 1.0)):
        ratio = timings.ratio(name, name.replace("ours", "PEFT")).median_of_pairs
        report.claims.append(Claim(f"{name}: time over PEFT's", ratio, at_most=limit))
        report.claims.append(
            Claim(f"{name}: memory kept for the backward pass over PEFT's", _over(held, name), at_most=memory)
        )
    ratio = forward.ratio("blocks", "flat graph").median_of_pairs
    report.claims.append(Claim("forward through blocks over the flat graph", ratio, at_most=1.02))
    return report


def _compilations() -> list[dict[str, Any]]:
    """Return a table of the CPU seconds of a compiled model's first step, whole and by block."""
    ids = torch.randint(1024, (2, 16))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    rows = []
    for name in ("whole", "by block"):
        model: Any = rewrite(trace(small_llama()), GraloraConfig(r=8, target_modules="all-linear")).train()
        compiled, options = model, {"backend": "aot_eager", "dynamic": True}
        if name == "whole":
            compiled = torch.compile(model, **options)
        else:
            for block in model.blocks.values():
                block.compile(**options)
        torch._dynamo.reset()
        begin = time.process_time()
        step(compiled, inputs, ids)
        rows.append({"case": name, "processor s": time.process_time() - begin})
    return rows


def step(model: nn.Module, inputs: Mapping[str, Tensor], ids: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    logits = model(**inputs, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()


def kept(model: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """Return the bytes that autograd keeps between forward and backward, each storage once, without parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(**inputs, use_cache=False).logits
    found = sum(size for address, size in storages.items() if address not in own)
    logits.sum().backward()
    return found


def _forward(graph_module: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        graph_module(**inputs)


def _over(held: Mapping[str, int], name: str) -> float:
    return held[name] / held[name.replace("ours", "PEFT")]

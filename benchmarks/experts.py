"""Mixtures of experts: a prompt and a token of an export beside transformers, and beside the products it had before.

The models are Mixtrals with random weights: eight wide experts of which a token has two, as Mixtral, and 64 narrow ones
of which it has eight, as newer models. "Products" is a trace without the operator of experts: tokens sorted by expert,
and a product for each expert of the layer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import DynamicCache, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from benchmarks.harness import Case, Claim, Report, Table, measure, progress
from gralora_fx import trace
from gralora_fx.exporters import export_onnx
from gralora_fx.exporters.verification.greedy_tokens import DecoderSteps
from gralora_fx.runtime.session import Runtime, open_session, quiet_options
from gralora_fx.tracing.patches import expert_layers

TASK = "text-generation-with-past"
PROMPT, VOCABULARY = 256, 1000
KINDS: dict[str, dict[str, int]] = {
    "2 of 8 experts": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 1024},
    "8 of 64 experts": {"num_local_experts": 64, "num_experts_per_tok": 8, "intermediate_size": 128},
}
PLAIN, LOOP = "transformers, its default", "transformers, eager"
PRODUCTS, OURS, INT8, INT4 = "products", "fp32", "int8", "int4"


def run(iterations: int = 9) -> Report:
    """Measure both kinds of mixtures."""
    report = Report("experts", f"experts: a prompt of {PROMPT} tokens, and a token after it; times in ms")
    for name, sizes in KINDS.items():
        progress(f"experts, {name}: exports")
        model = _model(sizes)
        with tempfile.TemporaryDirectory(prefix="gralora-experts-") as scratch:
            steps = {
                PLAIN: _transformers(model, "grouped_mm"),
                LOOP: _transformers(model, "eager"),
                **_exports(model, Path(scratch)),
            }
            progress(f"experts, {name}: times")
            for what, is_token in (("a prompt", False), ("a token", True)):
                cases = [Case.of(label, _timed(step, is_token)) for label, step in steps.items()]
                timings = measure(cases, iterations=iterations)
                report.tables.append(Table(f"{name}: {what}", [timings.row(label, LOOP) for label in steps]))
                before = timings.ratio(OURS, PRODUCTS).median_of_pairs
                report.claims.append(Claim(f"{name}: {what} in fp32, over the products of before", before, at_most=1.0))
                loop = timings.ratio(OURS, LOOP).median_of_pairs
                report.claims.append(Claim(f"{name}: {what} in fp32, over transformers' eager", loop, at_most=1.0))
    return report


def _model(sizes: dict[str, int]) -> PreTrainedModel:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        **sizes,
    )
    return MixtralForCausalLM(config).eval()


def _exports(model: PreTrainedModel, root: Path) -> dict[str, Callable[[], Callable[[Tensor], object]]]:
    """Steps of each export: a call of a function begins a sequence, and a call of what it gives reads tokens."""
    with patch.object(expert_layers, "gate_of", lambda _: None):
        before = trace(model, task=TASK)
    traced = trace(model, task=TASK)
    options: dict[str, tuple[Any, dict[str, Any]]] = {
        PRODUCTS: (before, {}),
        OURS: (traced, {}),
        INT8: (traced, {"quantize": "int8"}),
        INT4: (traced, {"quantize": "int4"}),
    }
    steps = {}
    for name, (source, option) in options.items():
        export_onnx(source, root / name, verify=False, **option)
        session = open_session(root / name, Runtime(session_options=quiet_options(torch.get_num_threads())))
        steps[name] = _session_steps(session)
    return steps


def _session_steps(session: Any) -> Callable[[], Callable[[Tensor], object]]:
    def begin() -> Callable[[Tensor], object]:
        step, seen = DecoderSteps(session, 1), [0]

        def read(ids: Tensor) -> object:
            seen[0] += ids.shape[1]
            return step(ids, torch.ones(1, seen[0], dtype=torch.long))

        return read

    return begin


def _transformers(model: PreTrainedModel, implementation: str) -> Callable[[], Callable[[Tensor], object]]:
    def begin() -> Callable[[Tensor], object]:
        cache = DynamicCache()

        @torch.no_grad()
        def read(ids: Tensor) -> object:
            model.set_experts_implementation(implementation)
            return model(ids, past_key_values=cache, logits_to_keep=1).logits

        return read

    return begin


def _timed(begin: Callable[[], Callable[[Tensor], object]], is_token: bool) -> Callable[[], object]:
    """What is timed: a prompt from nothing, or the next token of a sequence."""
    prompt = torch.randint(VOCABULARY, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    if not is_token:
        return lambda: begin()(prompt)
    read = begin()
    read(prompt)
    return lambda: read(prompt[:, :1])

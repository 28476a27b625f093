"""Mixtures of experts: a prompt and a token of an export, compared with transformers and with separate products.

The models are Mixtrals with random weights: eight wide experts, two per token, as in Mixtral, and 64 narrow ones, eight
    per token, as in newer models. "Products" is a trace without the operator for experts: tokens sorted by expert, and
    a product for each expert. "fp32" is the export as this project opens it, "fp32, MoE" as other programs do.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import onnxruntime
import torch
from torch import Tensor
from transformers import DynamicCache, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from benchmarks.harness import Case, Claim, Report, Table, measure, progress
from benchmarks.streaming import GIB, peak_memory, write_shards
from gralora_fx import trace
from gralora_fx.exporters import export_onnx
from gralora_fx.exporters.verify.greedy_tokens import DecoderSteps
from gralora_fx.features.experts import interface
from gralora_fx.format.export_directory import MODEL_NAME
from gralora_fx.run.sessions.session import Runtime, open_session, yielding_options

TASK = "text-generation-with-past"
PROMPT, VOCABULARY = 256, 1000
KINDS: dict[str, dict[str, int]] = {
    "2 of 8 experts": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 1024},
    "8 of 64 experts": {"num_local_experts": 64, "num_experts_per_tok": 8, "intermediate_size": 128},
}
STREAMED = {"hidden_size": 2048, "intermediate_size": 7168, "num_local_experts": 8, "num_attention_heads": 16}
STREAMS: dict[str, dict[str, str]] = {"fp32": {}, "fp16": {"precision": "fp16"}, "int4": {"quantize": "int4"}}
PLAIN, LOOP = "transformers, its default", "transformers, eager"
PRODUCTS, OURS, OPERATOR, INT8, INT4 = "products", "fp32", "fp32, MoE", "int8", "int4"


def run(iterations: int = 9) -> Report:
    """Measure both kinds of mixtures, and the memory of a streamed export of eight experts."""
    report = Report("experts", f"experts: a prompt of {PROMPT} tokens, and a token after it; times in ms")
    _stream(report)
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


def _stream(report: Report) -> None:
    """Measure peak memory of streamed exports, each in its own process, from files with a matrix for each expert."""
    hidden, width = STREAMED["hidden_size"], STREAMED["intermediate_size"]
    matrix = 4 * 2 * width * hidden
    with tempfile.TemporaryDirectory(prefix="gralora-experts-") as scratch:
        progress("experts, writing a model")
        base = Path(scratch) / "base"
        count = _write(base)
        rows = []
        for name, options in STREAMS.items():
            progress(f"experts, streamed {name}")
            code = "from benchmarks.experts import export_streamed; export_streamed()"
            arguments = [str(base), str(Path(scratch) / "onnx"), json.dumps(options)]
            done = subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True)
            peak = json.loads(done.stdout.splitlines()[-1])
            rows.append({"export": name, "peak GB": peak / 1e9})
            bound = (matrix + GIB) / 1e9
            report.claims.append(Claim(f"GB of memory of a streamed export to {name}", peak / 1e9, at_most=bound))
    title = (
        f"streamed: {count / 1e9:.2f} B parameters in bfloat16, a matrix of an expert is {matrix / 1e9:.2f} GB in fp32"
    )
    report.tables.append(Table(title, rows))


def export_streamed() -> None:
    """Run a streamed export and print its peak memory in bytes; called in the other process."""
    from gralora_fx.core.loading.models import load_streamed

    base, output, options = sys.argv[1:]
    export_onnx(trace(load_streamed(base, TASK), task=TASK), output, verify=False, **json.loads(options))
    print(json.dumps(peak_memory()))


def _write(directory: Path) -> int:
    """Write a model of random bfloat16 values as transformers saves one; the result is its number of parameters."""
    config = MixtralConfig(vocab_size=VOCABULARY, num_hidden_layers=2, **STREAMED, architectures=["MixtralForCausalLM"])
    directory.mkdir()
    config.save_pretrained(directory)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in MixtralForCausalLM(config).named_parameters()}
    groups = []
    for name, shape in shapes.items():
        parts = {name: shape}
        layer, experts, kind = name.partition(".mlp.experts.")
        if experts:
            kinds = ("w1", "w3") if kind == "gate_up_proj" else ("w2",)
            parts = {
                f"{layer}.block_sparse_moe.experts.{index}.{part}.weight": (shape[1] // len(kinds), shape[2])
                for index in range(shape[0])
                for part in kinds
            }
        groups.append({key.replace(".mlp.gate.", ".block_sparse_moe.gate."): size for key, size in parts.items()})
    return write_shards(directory, groups)


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
    """Return for each export a function that begins a sequence; it returns a function that reads tokens."""
    with patch.object(interface, "gate_of", lambda _: None):
        before = trace(model, task=TASK)
    traced = trace(model, task=TASK)
    options: dict[str, tuple[Any, dict[str, Any]]] = {
        PRODUCTS: (before, {}),
        OURS: (traced, {}),
        INT8: (traced, {"quantize": "int8"}),
        INT4: (traced, {"quantize": "int4"}),
    }
    steps, threads = {}, torch.get_num_threads()
    for name, (source, option) in options.items():
        export_onnx(source, root / name, verify=False, **option)
        steps[name] = _session_steps(open_session(root / name, Runtime(session_options=yielding_options(threads))))
    own = onnxruntime.InferenceSession(root / OURS / MODEL_NAME, yielding_options(threads))
    return {**steps, OPERATOR: _session_steps(own)}


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
    """Return the timed case: a prompt from an empty cache, or the next token of a sequence."""
    prompt = torch.randint(VOCABULARY, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    if not is_token:
        return lambda: begin()(prompt)
    read = begin()
    read(prompt)
    return lambda: read(prompt[:, :1])

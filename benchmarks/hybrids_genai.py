"""Qwen3.5 and LFM2, compared with graphs of onnxruntime-genai's builder: a prompt and a token, float32 and int4.

Random weights at the widths of LFM2-350M and Qwen3.5-0.8B, with fewer layers and a smaller vocabulary.
onnxruntime-genai runs both graphs, in turns, in one process, with the same threads, reloaded for every prompt, of which
the second run counts. In int4 genai's builder gives every matrix four bits; ours is measured with four, and with its
default, a mean of 4.5.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from transformers import (
    AutoTokenizer,
    Lfm2Config,
    Lfm2ForCausalLM,
    PreTrainedModel,
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
)

from benchmarks import smollm2
from benchmarks.genai import build, open_model, run_process, token_times
from benchmarks.harness import Claim, Ratio, Report, Table, progress
from gralora_fx.base.sources.model_files import EXPORT_FILE

RUNS = Path("runs/hybrids_genai")
OURS, OURS_4, GENAI = "ours", "ours, bits=4", "genai's builder"
THREADS, CONTEXT, STEPS, LAYERS, VOCABULARY = 2, 1000, 32, 8, 49152
_SHARED = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def compare(report: Report, iterations: int = 6) -> None:
    """Measure both models in both precisions, over `iterations` prompts per graph; report tables and claims."""
    for name, make in (("LFM2", _lfm2), ("Qwen3.5", _qwen3_5)):
        ours, theirs = make(RUNS / name)
        for precision in ("fp32", "int4"):
            options = [] if precision == "fp32" else ["--quantize", precision]
            graphs = {OURS: _export(ours, RUNS / name / f"ours_{precision}", options)}
            if precision == "int4":
                graphs[OURS_4] = _export(ours, RUNS / name / "ours_4", [*options, "--bits", "4"])
            graphs[GENAI] = _built(theirs, RUNS / name / f"genai_{precision}", precision)
            _compare_speed(report, f"{name}, {precision}", graphs, iterations)


def _lfm2(directory: Path) -> tuple[Path, Path]:
    """Save LFM2 at the widths of LFM2-350M; both builders read one checkpoint."""
    path = directory / "model"
    if not (path / "config.json").is_file():
        layers = ["full_attention" if layer in (2, 5) else "conv" for layer in range(LAYERS)]
        sizes = {"hidden_size": 1024, "intermediate_size": 4608, "num_attention_heads": 16, "num_key_value_heads": 8}
        kinds = {"num_hidden_layers": LAYERS, "layer_types": layers, "block_auto_adjust_ff_dim": False}
        torch.manual_seed(0)
        _save(Lfm2ForCausalLM(Lfm2Config(**_SHARED, **sizes, **kinds, conv_L_cache=3)), path)
    return path, path


def _qwen3_5(directory: Path) -> tuple[Path, Path]:
    """Save Qwen3.5 at its 0.8B model's widths: the text model, and one with a small vision tower, as genai needs it."""
    text, whole = directory / "text", directory / "whole"
    if not (whole / "config.json").is_file():
        sizes = {"hidden_size": 1024, "intermediate_size": 3584, "num_attention_heads": 8, "num_key_value_heads": 2}
        vision = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 1024}
        fields = {**_SHARED, **sizes, "num_hidden_layers": LAYERS, "head_dim": 256, "linear_num_value_heads": 16}
        torch.manual_seed(0)
        model = Qwen3_5ForConditionalGeneration(
            Qwen3_5Config(text_config=fields, vision_config=vision, tie_word_embeddings=True)
        )
        part = Qwen3_5ForCausalLM(model.config.text_config)
        part.model.load_state_dict(model.model.language_model.state_dict())
        _save(part, text)
        _save(model, whole)
    return text, whole


def _save(model: PreTrainedModel, directory: Path) -> None:
    AutoTokenizer.from_pretrained(smollm2.base(RUNS / "base")).save_pretrained(directory)
    model.save_pretrained(directory)  # last, as a sign that the directory is complete


def _export(model: Path, output: Path, options: Sequence[str]) -> Path:
    if not (output / EXPORT_FILE).is_file():
        progress(f"export of {output}")
        command = ["export", "--model", model, "--task", "text-generation-with-past", "--output", output, "--no-verify"]
        run_process(["-m", "gralora_fx.cli", *command, *options], output)
    return output


def _built(model: Path, output: Path, precision: str) -> Path:
    if not (output / "genai_config.json").is_file():
        build(model, output, precision, RUNS / "cache")
        _first_grid(output / "model.onnx")
    return output


def _first_grid(file: Path) -> None:
    """Feed rotary embeddings the first of three equal rows of positions, in place.

    The CPU kernel of onnxruntime 1.32 refuses all three, so the builder's Qwen3.5 does not run there unchanged.
    """
    model = ir.load(file)
    positions = next((value for value in model.graph.inputs if value.name == "position_ids"), None)
    if positions is None or positions.shape is None or len(positions.shape) != 3:
        return
    readers = list(positions.uses())
    index = ir.node("Constant", [], {"value_int": 0})
    first = ir.node("Gather", [positions, index.outputs[0]], {"axis": 0})
    for usage in readers:
        usage.node.replace_input_with(usage.idx, first.outputs[0])
    model.graph.insert_before(model.graph[0], [index, first])
    ir.save(model, file)


def _compare_speed(report: Report, title: str, graphs: Mapping[str, Path], iterations: int) -> None:
    prompt: dict[str, list[float]] = {name: [] for name in graphs}
    token: dict[str, list[float]] = {name: [] for name in graphs}
    numbers = np.random.default_rng(0)
    for iteration in range(-1, iterations):
        progress(f"{title}, prompt {iteration + 2} of {iterations + 1}")
        ids = numbers.integers(10, VOCABULARY - 10, (1, CONTEXT)).astype(np.int32)
        for name in list(graphs)[:: 1 if iteration % 2 else -1]:
            model = open_model(graphs[name], THREADS)
            token_times(model, ids, 1)  # the first use of memory is slower
            times = token_times(model, ids, STEPS)
            if iteration >= 0:
                prompt[name].append(times[0])
                token[name].append(statistics.median(times[1:]))
    rows: list[Mapping[str, Any]] = []
    for what, times_of in ((f"prompt of {CONTEXT}", prompt), ("token", token)):
        rows += [
            {"what": what, "graph": name, "ms": 1e3 * statistics.median(series)} for name, series in times_of.items()
        ]
        for name in (name for name in graphs if name != GENAI):
            ratio = Ratio.between(times_of[name], times_of[GENAI])
            text = f"{title}, {name}, {what} over genai's graph (pairwise {ratio.median_of_pairs:.2f})"
            report.claims.append(Claim(text, ratio.of_medians, at_most=1.0))
    report.tables.append(Table(f"{title}: {CONTEXT} tokens, then {STEPS} more, {THREADS} threads", rows))

"""Decoders with a state, compared with transformers' eager code and onnxruntime-genai: a prompt, and a token after it.

Mamba2 at 130M's widths, with random weights, which do not change the time. Both sides run in one process, in turns, on
two threads. Times by operator come from ONNX Runtime's own profile; the floor is the matrix products alone.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from transformers import Mamba2Config, Mamba2ForCausalLM, PreTrainedModel

from benchmarks import hybrids_genai
from benchmarks.harness import Case, Claim, Report, Table, measure, progress
from gralora_fx import trace
from gralora_fx.exporters import export_onnx

THREADS, PROMPT = 2, 1000
OURS, EAGER = "ours", "transformers' eager"
PRODUCTS = ("MatMul", "FusedMatMul", "Gemm", "MatMulNBits")
_PAST, _PRESENT = "past_key_values.", "present."


def run(iterations: int = 5) -> Report:
    """Time `iterations` prompts and tokens of each side."""
    report = Report("hybrids", "decoders with a state: Mamba2 at 130M's widths, random weights")
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as folder:
        model = mamba2()
        progress("hybrids, export")
        export_onnx(trace(model, task="text-generation-with-past"), Path(folder) / "onnx", verify=False)
        compare(report, "Mamba2", model, Path(folder) / "onnx" / "model.onnx", iterations)
    hybrids_genai.compare(report)
    return report


def mamba2() -> Mamba2ForCausalLM:
    """Return a random model of the widths of `state-spaces/mamba2-130m`."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 768, "num_hidden_layers": 24, "num_heads": 24, "head_dim": 64, "state_size": 128}
    return Mamba2ForCausalLM(Mamba2Config(**sizes, n_groups=1, vocab_size=50288)).eval()


def compare(report: Report, name: str, model: PreTrainedModel, path: Path, iterations: int) -> None:
    """Time a prompt in one call and a token after it, on both sides; report tables, claims and ours by operator."""
    session = _opened(path)
    ids = np.random.default_rng(0).integers(10, model.config.vocab_size, (1, PROMPT + 1))
    eager, ours = _eager_steps(model, ids), _session_steps(session, ids)
    for what, bound, place in (("a prompt of 1,000 in one call", 0.3, 0), ("a token", 0.5, 1)):
        progress(f"hybrids, {name}, {what}")
        cases = [Case.of(OURS, ours[place]), Case.of(EAGER, eager[place])]
        timings = measure(cases, iterations=iterations if place == 0 else 8 * iterations)
        report.tables.append(
            Table(f"{name}: {what}, {THREADS} threads", [timings.row(n, EAGER) for n in (OURS, EAGER)])
        )
        ratio = timings.ratio(OURS, EAGER).median_of_pairs
        report.claims.append(Claim(f"{name}, {what}, over {EAGER}", ratio, at_most=bound))
    kinds = [_profile(path, ids, place) for place in (0, 1)]
    rows = [
        {"operator": kind, "prompt ms": kinds[0][kind], "token ms": kinds[1][kind]}
        for kind, _ in kinds[0].most_common(12)
    ]
    report.tables.append(Table(f"{name}: what ours is made of", rows))
    floors = [sum(kind[product] for product in PRODUCTS) for kind in kinds]
    totals = [sum(kind.values()) for kind in kinds]
    report.notes.append(
        f"{name}, floor, matrix products alone: {floors[0]:.0f} of {totals[0]:.0f} ms of the prompt, "
        f"{floors[1]:.1f} of {totals[1]:.1f} ms of the token"
    )


def _eager_steps(model: PreTrainedModel, ids: np.ndarray[Any, Any]) -> tuple[Callable[[], object], ...]:
    """Return functions that run a prompt, and a token after it, in transformers."""
    prompt, token = torch.from_numpy(ids[:, :-1]), torch.from_numpy(ids[:, -1:])
    with torch.no_grad():
        cache = model(prompt, use_cache=True, logits_to_keep=1).cache

    def step(**inputs: Any) -> object:
        with torch.no_grad():
            return model(**inputs, use_cache=True, logits_to_keep=1).logits

    return lambda: step(input_ids=prompt), lambda: step(input_ids=token, cache=cache)


def _session_steps(
    session: onnxruntime.InferenceSession, ids: np.ndarray[Any, Any]
) -> tuple[Callable[[], object], ...]:
    """Return functions that run a prompt, and a token after it, in ONNX Runtime, which keeps the states."""
    names = [output.name for output in session.get_outputs()]
    empty = {
        value.name: np.zeros(
            [size if isinstance(size, int) else int("batch" in size) for size in value.shape], "float32"
        )
        for value in session.get_inputs()
        if value.name.startswith(_PAST)
    }

    def step(ids: np.ndarray[Any, Any], past: Mapping[str, Any], total: int) -> dict[str, Any]:
        feeds = {"input_ids": ids, "attention_mask": np.ones((1, total), np.int64)}
        feeds = {value.name: _value(feeds[value.name]) for value in session.get_inputs() if value.name in feeds}
        results = session.run_with_ort_values(names, feeds | dict(past))
        return dict(zip(names, results, strict=True))

    start = {name: _value(array) for name, array in empty.items()}
    first = step(ids[:, :-1], start, PROMPT)
    kept = {name.replace(_PRESENT, _PAST): value for name, value in first.items() if name.startswith(_PRESENT)}
    return lambda: step(ids[:, :-1], start, PROMPT), lambda: step(ids[:, -1:], kept, PROMPT + 1)


def _value(array: np.ndarray[Any, Any]) -> onnxruntime.OrtValue:
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def _opened(path: Path, profile: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = THREADS, 3
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _profile(path: Path, ids: np.ndarray[Any, Any], place: int, runs: int = 3) -> Counter[str]:
    """Return the milliseconds of each kind of operator in one run."""
    with tempfile.TemporaryDirectory() as folder:
        session = _opened(path, Path(folder) / "profile")
        step = _session_steps(session, ids)[place]
        for _ in range(runs):
            step()
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    times: dict[str, list[float]] = {}
    kinds: dict[str, str] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times.setdefault(event["name"], []).append(event["dur"] / 1e3)
            kinds[event["name"]] = event["args"]["op_name"]
    total: Counter[str] = Counter()
    for name, durations in times.items():
        total[kinds[name]] += sum(durations[-runs:]) / runs
    return total

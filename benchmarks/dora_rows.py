"""Eight rows with a DoRA adapter each, compared with eight with LoRA of the same rank, in float, int8 and int4.

SmolLM2-135M with adapters on all seven projections. LoRA's rows run in an export that takes LoRA only, and in one that
takes both. Then the cost of loading a directory that PEFT saved, and a thousand interleavings of random requests to a
tiny Llama, for the base and for plain, activated and DoRA adapters.
"""

from __future__ import annotations

import gc
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks import smollm2
from benchmarks.activated import ROWS, THREADS, TokenSteps
from benchmarks.harness import Case, Claim, Report, Table, measure, progress
from benchmarks.prefix_cache import TESTS, interleave
from gralora_fx import DoraConfig, LoraConfig, TracedModel, rewrite, trace
from gralora_fx.base.sources.model_files import EXPORT_FILE
from gralora_fx.exporters import export_adapter, export_onnx
from gralora_fx.exporters.adapter_export import adapter_in_memory
from gralora_fx.format.manifest import read_manifest
from gralora_fx.run.sessions.session import yielding_options
from gralora_fx.serving import load

RUNS = Path("runs/dora_rows")
WEIGHTS: dict[str, dict[str, Any]] = {"float32": {}, "int8": {"quantize": "int8"}, "int4": {"quantize": "int4"}}
LORA, BESIDE, DORA = "LoRA", "LoRA, in an export that takes DoRA", "DoRA"
FIELDS: dict[str, Any] = {"r": 8, "lora_alpha": 2, "target_modules": smollm2.PROJECTIONS, "init_lora_weights": False}


def run(iterations: int = 25, interleavings: int = 1000) -> Report:
    """Time `iterations` runs of each kind of step, loads, and random interleavings of requests."""
    report = Report("dora-rows", f"{ROWS} rows with DoRA beside LoRA: SmolLM2-135M, r={FIELDS['r']}")
    base = smollm2.base(RUNS / "base")
    loads = []
    for name, options in WEIGHTS.items():
        plain, both = (_export(base, f"{kind}_{name}", options) for kind in ("lora", "dora"))
        progress(f"steps of eight rows, {name}")
        # threads stop when a step ends; otherwise one session's would take cores from the next
        loaded = [load(path, session_options=yielding_options(THREADS)) for path in (plain, both)]
        steps = {LORA: (loaded[0], "lora"), BESIDE: (loaded[1], "lora"), DORA: (loaded[1], "dora")}
        cases = [Case.of(step, TokenSteps(*where)) for step, where in steps.items()]
        times = measure(cases, iterations=iterations)
        report.tables.append(Table(f"a token of {ROWS} rows, {name}", [times.row(step, LORA) for step in steps]))
        ratio = times.ratio(DORA, LORA).median_of_pairs
        report.claims.append(Claim(f"a step with DoRA over one with LoRA, {name}", ratio, at_most=1.1))
        loads.append({"weights": name} | {kind: _seconds(both, kind) for kind in ("lora", "dora")})
        del loaded, steps, cases
        gc.collect()
    report.tables.append(Table("seconds to convert an adapter of PEFT's", loads))
    sys.path.append(str(TESTS))  # whose helpers import each other by their names
    from tests.prefix_interleavings import Interleavings, made_mixed

    (RUNS / "mixed").mkdir(parents=True, exist_ok=True)
    interleave(report, "adapters of every method", Interleavings(*made_mixed(RUNS / "mixed")), interleavings)
    return report


def _export(base: Path, name: str, options: dict[str, Any]) -> Path:
    """Make an export with the adapters, once; both exports have the same LoRA adapters."""
    path = RUNS / name
    if (path / EXPORT_FILE).is_file():
        return path
    progress(f"export {name}")
    source = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    traced: TracedModel = trace(source, task="text-generation-with-past")
    torch.manual_seed(0)
    model = rewrite(traced, LoraConfig(**FIELDS), adapter_name="lora_0")
    for number in range(1, ROWS):
        model.add_adapter(f"lora_{number}", LoraConfig(**FIELDS))
    for number in range(ROWS if name.startswith("dora") else 0):
        model.add_adapter(f"dora_{number}", DoraConfig(**FIELDS))
        for factors in model.adapter(f"dora_{number}").factors.values():
            factors.magnitude.data.mul_(1 + 0.02 * torch.randn(factors.magnitude.shape))  # type: ignore[attr-defined]
    saved = path.with_name(f"saved_{name}")
    model.save_pretrained(saved, list(model.configs))
    model.set_adapter([adapter for adapter in model.configs if adapter.startswith("lora")])
    export_onnx(model, path, adapters="data", verify=False, overwrite=True, **options)
    for adapter in set(model.configs) - set(model.active_adapters):  # no two may be active at one layer
        export_adapter(saved / adapter, path, adapter)
    return path


def _seconds(path: Path, kind: str) -> float:
    """Return the seconds to convert an adapter as a service does when it loads one."""
    manifest = read_manifest(path)
    saved = path.with_name(f"saved_{path.name}") / f"{kind}_0"
    for _ in range(2):  # the first time imports what it needs
        started = time.perf_counter()
        adapter_in_memory(saved, path, "adapter", manifest)
    return time.perf_counter() - started

"""MiniLM and layers of BERT-base's and ViT-base's width on ONNX Runtime's CPU provider, compared with three peers.

The peers are transformers' exporter with its fusions for the CPU, the same exporter's graph optimized by onnxruntime's
transformers optimizer, and PyTorch itself. Every side runs in one process, in turns, with the same number of threads.
    Other rows: int8-dynamic over float32, and the time of an export in a process that has already exported another
    model, imports excluded.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnxruntime.transformers.optimizer import optimize_model
from transformers import BertConfig, BertModel, PreTrainedModel, ViTConfig, ViTModel
from transformers.exporters import OnnxConfig, OnnxExporter

from benchmarks.harness import Case, Claim, Report, Table, Timings, measure, progress
from benchmarks.models import minilm
from gralora_fx import GraloraConfig, GraloraModel, TracedModel, rewrite, trace
from gralora_fx.exporters import export_onnx

THREADS = 2
LAYERS = 4  # of the wide models, whose layers are all alike
OURS, EXPORTER, OPTIMIZER, EAGER = "ours", "transformers' exporter", "onnxruntime's optimizer", "torch"
INT8 = "ours, int8-dynamic"
EXPORT = """
import sys, tempfile, time, torch
from benchmarks.models import minilm
from gralora_fx import trace
from gralora_fx.exporters import export_onnx
import benchmarks.warm
model = minilm()
start = time.perf_counter()
with tempfile.TemporaryDirectory() as folder:
    export_onnx(trace(model, task="feature-extraction"), folder + "/onnx", verify=False)
    print(time.perf_counter() - start)
"""

Feed = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Shape:
    """The shape of one feed."""

    batch: int  # number of texts or images
    length: int  # tokens of the longest text; 0 for images
    padding: float = 0.0  # share of the tokens that are padding; the lengths are spread evenly

    def __str__(self) -> str:
        """Format it, as `16 x 128, 34 % padding`."""
        size = f"{self.batch} x {self.length}" if self.length else f"{self.batch} images"
        return size + (f", {self.padding:.0%} padding" if self.padding else "")

    def texts(self) -> Feed:
        """Return random ids with their mask and types."""
        ids = np.random.default_rng(0).integers(1000, 20_000, (self.batch, self.length))
        lengths = np.linspace(self.length * (1 - 2 * self.padding), self.length, self.batch).round()
        mask = (np.arange(self.length) < lengths[:, None]).astype(np.int64)
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}

    def images(self) -> Feed:
        """Return random pixels."""
        return {"pixel_values": np.random.default_rng(0).standard_normal((self.batch, 3, 224, 224), dtype=np.float32)}


ALONE, SHORT, FULL, PADDED = Shape(1, 128), Shape(1, 16), Shape(16, 128), Shape(16, 128, 1 / 3)
LARGEST = {SHORT: 0.95, ALONE: 0.95, FULL: 0.95, PADDED: 0.85}  # of the time of transformers' exporter


def run(iterations: int = 15) -> Report:
    """Measure every model and shape."""
    report = Report("encoding", f"encoders on the CPU provider, fp32, {THREADS} threads")
    torch.set_num_threads(THREADS)
    _time_exports(report)
    _compare(report, "MiniLM", minilm(), "feature-extraction", Shape.texts, LARGEST, iterations)
    wide: dict[Shape, float] = {FULL: 0.95}
    bert = BertModel(BertConfig(num_hidden_layers=LAYERS)).eval()
    _compare(report, f"BERT-base's width, {LAYERS} layers", bert, "feature-extraction", Shape.texts, wide, iterations)
    vit, images = ViTModel(ViTConfig(num_hidden_layers=LAYERS)).eval(), {Shape(8, 0): 0.95}
    _compare(report, f"ViT-base's width, {LAYERS} layers", vit, "feature-extraction", Shape.images, images, iterations)
    return report


def _compare(
    report: Report,
    label: str,
    model: PreTrainedModel,
    task: str,
    feed: Callable[[Shape], Feed],
    bounds: Mapping[Shape, float],
    iterations: int,
) -> None:
    """Add a model's tables and claims."""
    progress(f"encoding, {label}: export")
    with tempfile.TemporaryDirectory() as folder:
        sides = export_sides(model, task, {n: _tensors(v) for n, v in feed(Shape(2, 8, 0.3)).items()}, Path(folder))
        report.tables.append(operators_table(label, sides))
        runs = {name: _session_run(path) for name, path in sides.items()}
    runs[EAGER] = lambda inputs: model(**{name: torch.from_numpy(value) for name, value in inputs.items()})
    for shape, largest in bounds.items():
        progress(f"encoding, {label}, {shape}")
        inputs = feed(shape)
        turns = iterations * (1 if shape.batch > 1 else 4)
        timings = _measure(runs, inputs, turns)
        report.tables.append(Table(f"{label}, {shape}", [timings.row(name, EXPORTER) for name in runs]))
        for peer, bound in ((EXPORTER, largest), (OPTIMIZER, 1.0), *([(EAGER, 1.0)] if shape.padding else [])):
            ratio = timings.ratio(OURS, peer).median_of_pairs
            report.claims.append(Claim(f"{label}, {shape}: ours over {peer}", ratio, at_most=bound))
        if shape == FULL and INT8 in runs and label == "MiniLM":
            ratio = timings.ratio(INT8, OURS).median_of_pairs
            report.claims.append(Claim(f"{label}, {shape}: int8-dynamic over fp32", ratio, at_most=0.6))


def export_sides(model: PreTrainedModel, task: str, sample: dict[str, Any], folder: Path) -> dict[str, Path]:
    """Export a model on every side; return each path by side.

    `sample` is for transformers' exporter: two rows, one of them padded. Ours has a GraLoRA adapter folded in.
    """
    traced = trace(model, task=task)
    adapted = rewrite(traced, GraloraConfig(r=8, gralora_k=2, target_modules="all-linear", init_weights=False))
    paths = {OURS: _export(adapted, folder / "ours"), INT8: _export(traced, folder / "int8", quantize="int8-dynamic")}
    exported = OnnxExporter().export(model, sample, OnnxConfig(dynamic=True, ort_fusions="cpu"))
    exported.save_pretrained(folder / "exporter")
    bare = OnnxExporter().export(model, sample, OnnxConfig(dynamic=True))
    bare.save_pretrained(folder / "bare")
    config = model.config
    optimized = optimize_model(
        str(folder / "bare" / "model.onnx"),
        model_type="vit" if "pixel_values" in sample else "bert",
        num_heads=config.num_attention_heads,
        hidden_size=config.hidden_size,
        opt_level=1,
    )
    optimized.save_model_to_file(str(folder / "optimized.onnx"))
    return {**paths, EXPORTER: folder / "exporter" / "model.onnx", OPTIMIZER: folder / "optimized.onnx"}


def operators_table(label: str, sides: Mapping[str, Path]) -> Table:
    """Return a table of the operators in the graphs of all sides, as written."""
    rows = []
    for name, path in sides.items():
        graph = onnx.load(path, load_external_data=False).graph
        counts = Counter(node.op_type for node in graph.node)
        text = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
        rows.append({"graph": name, "nodes": len(graph.node), "operators": text})
    return Table(f"{label}: operators", rows)


def _export(model: TracedModel | GraloraModel, path: Path, **options: Any) -> Path:
    export_onnx(model, path, verify=False, **options)
    return path / "model.onnx"


def _tensors(value: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(value)


def _session_run(path: Path) -> Callable[[Feed], object]:
    """Run a model by a plain session with the benchmark's number of threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return lambda feed: session.run(None, {name: feed[name] for name in names})


def _measure(runs: Mapping[str, Callable[[Feed], object]], inputs: Feed, iterations: int) -> Timings:
    with torch.inference_mode():
        cases = [Case.of(name, lambda run=run: run(inputs)) for name, run in runs.items()]  # type: ignore[misc]
        return measure(cases, iterations=iterations)


def _time_exports(report: Report, times: int = 3) -> None:
    """Add the time from a model to its export, without verification and imports."""
    progress("encoding, export of MiniLM")
    seconds = []
    for _ in range(times):
        done = subprocess.run([sys.executable, "-c", EXPORT], capture_output=True, text=True, check=True)
        seconds.append(float(done.stdout.split()[-1]))
    report.tables.append(
        Table("export of MiniLM: trace to written, after another export", [{"seconds": round(s, 2)} for s in seconds])
    )
    report.claims.append(Claim("export of MiniLM in seconds, imports made", sorted(seconds)[times // 2], at_most=2.5))

"""Memory of an export streamed from safetensors files: a decoder and an encoder with an adapter.

One in int4 without an adapter chooses its bits, is compared with the model and tells its quality; its time stands
beside that of onnxruntime-genai's builder, which does none of these.

The models are a Llama of TinyLlama's shape and a wide RoBERTa with random weights, written shard by shard, so that this
process never holds them either. Each export runs in its own process, whose peak memory the system reports at its end.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedConfig

from benchmarks.harness import Claim, Report, Table, progress
from gralora_fx import GraloraConfig
from gralora_fx.core.methods.gralora import GraloraSizes
from gralora_fx.core.methods.registry import GRALORA

GIB = 2**30
TINY_LLAMA: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
ROBERTA: dict[str, Any] = {
    "vocab_size": 50265,
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 12,
    "num_attention_heads": 32,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "num_labels": 2,
}
RANK, BLOCKS = 32, 2
OPTIONS: dict[str, dict[str, Any]] = {
    "bf16 files to fp32": {"verify": False},
    "bf16 files to fp16": {"precision": "fp16", "verify": False},
    "bf16 files to int8": {"quantize": "int8", "verify": False},
}


@dataclass(frozen=True)
class Kind:
    """One model."""

    name: str
    model_class: str  # its class in transformers
    sizes: dict[str, Any]  # fields of its configuration
    task: str  # the task that it is exported for
    adapted: str  # A regular expression for the paths of its adapted layers

    def config(self) -> PreTrainedConfig:
        """Return its configuration."""
        config_class = getattr(transformers, self.model_class).config_class
        config: PreTrainedConfig = config_class(**self.sizes, architectures=[self.model_class])
        return config

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every parameter, without allocating the model."""
        with torch.device("meta"):
            model = getattr(transformers, self.model_class)(self.config())
        return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


LLAMA = Kind("Llama", "LlamaForCausalLM", TINY_LLAMA, "text-generation-with-past", r".*_proj")
ENCODER = Kind(
    "RoBERTa",
    "RobertaForSequenceClassification",
    ROBERTA,
    "text-classification",
    r".*layer\.\d+\.(attention\.self\.(query|key|value)|attention\.output\.dense|intermediate\.dense|output\.dense)",
)


def run() -> Report:
    """Export the models in several precisions and print the peak memory of each process."""
    report = Report("streaming", "streaming: exports of models of 1.1 B parameters with a GraLoRA adapter, r=32 k=2")
    whole, builder = _beside_genai()  # first, as it may miss a package
    for kind in (LLAMA, ENCODER):
        rows, count = _rows(kind)
        report.tables.append(Table(f"{kind.name}: {described(count)}", rows))
        peak = rows[0]["peak GB"]
        report.claims.append(Claim(f"peak memory of the streamed {kind.name} to fp32, in GB", peak, at_most=2.0))
    rows = [{"export": "int4, compared, its quality told", **whole}, {"export": "genai's builder, int4", "s": builder}]
    report.tables.append(Table("Llama without an adapter", rows))
    ratio = whole["s"] / builder
    claim = "peak memory of the streamed Llama to int4, compared, in GB"
    report.claims.append(Claim(claim, whole["peak GB"], at_most=3.0))
    report.claims.append(Claim("its time over that of genai's builder", ratio, at_most=4.0))
    report.notes.append("peak: largest resident set of the whole process, mapped files included; own: without them")
    report.notes.append("the largest tensor in float32: 0.26 GB of the Llama, 0.51 GB of the RoBERTa, its embeddings")
    return report


def described(count: int) -> str:
    """Describe a model of so many parameters, written by `write_model`."""
    return f"{count / 1e9:.2f} B parameters, {count * 2 / GIB:.2f} GiB of bfloat16 files"


def _rows(kind: Kind) -> tuple[list[dict[str, Any]], int]:
    with tempfile.TemporaryDirectory(prefix="gralora-streaming-") as scratch:
        root = Path(scratch)
        progress(f"streaming, writing the shards of {kind.name}")
        count = write_model(root / "base", kind)
        write_adapter(root / "adapter", kind)
        rows = []
        for name, options in OPTIONS.items():
            progress(f"streaming, {kind.name}, {name}")
            rows.append({"export": name, **measure_export(root, kind.task, options)})
    return rows, count


def _beside_genai() -> tuple[dict[str, float], float]:
    """Return an int4 export with all that it measures, and the seconds of onnxruntime-genai's builder."""
    from benchmarks import smollm2
    from benchmarks.genai import build, seconds_of

    with tempfile.TemporaryDirectory(prefix="gralora-streaming-") as scratch:
        root = Path(scratch)
        tokenizer = AutoTokenizer.from_pretrained(smollm2.base(root / "smollm2"))  # the builder needs one
        write_model(root / "base", LLAMA)
        tokenizer.save_pretrained(root / "base")
        progress("streaming, Llama, int4 compared")
        whole = measure_export(root, LLAMA.task, {"quantize": "int4"}, with_adapter=False)
        progress("streaming, Llama, genai's builder")
        return whole, seconds_of(lambda: build(root / "base", root / "genai", "int4", root / "cache"))


def measure_export(root: Path, task: str, options: dict[str, Any], *, with_adapter: bool = True) -> dict[str, float]:
    """Return peak memory and seconds of one export in its own process, and seconds of its stages."""
    adapter = str(root / "adapter") if with_adapter else ""
    arguments = [str(root / "base"), adapter, str(root / "onnx"), task, json.dumps(options)]
    begin = time.perf_counter()
    code = "from benchmarks.streaming import export; export()"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the export ended with {done.returncode}:\n{done.stderr[-4000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    seconds = time.perf_counter() - begin
    sizes = {f"{name} GB": result[name] / 1e9 for name in ("peak", "own", "imports")}
    stages = {f"{stage} s": spent for stage, spent in result["stages"].items() if spent >= 1}
    return {**sizes, "s": seconds, "CPU s": result["cpu"], **stages}


def export() -> None:
    """Run a streamed export and print its peak memory in bytes and its seconds; called in the other process."""
    from gralora_fx.core.loading.bases import load_traced
    from gralora_fx.exporters import export_onnx

    base, adapter, output, task, options = sys.argv[1:]
    imports, own = peak_memory(), [0]
    threading.Thread(target=_note_most, args=(own,), daemon=True).start()
    model = load_traced(base, adapter or None, task, stream=True)
    report = export_onnx(model, output, **json.loads(options))
    result = {"imports": imports, "peak": peak_memory(), "own": own[0], "cpu": time.process_time()}
    print(json.dumps({**result, "stages": report.seconds}))


def _note_most(own: list[int]) -> None:
    """Note the most memory that is not of files, ten times a second: the system keeps no such peak."""
    while True:
        own[0] = max(own[0], memory("RssAnon"))
        time.sleep(0.1)


def peak_memory() -> int:
    """Return this program's largest resident set in bytes; `ru_maxrss` would include its parent's."""
    return memory("VmHWM")


def memory(field: str) -> int:
    """Return a figure of this program's memory in bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024


def write_model(directory: Path, kind: Kind) -> int:
    """Write a model with random bfloat16 weights, one shard per layer; return its number of parameters."""
    config = kind.config()
    directory.mkdir(parents=True)
    config.save_pretrained(directory)
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, shape in kind.shapes().items():
        groups.setdefault(next((part for part in key.split(".") if part.isdigit()), "ends"), {})[key] = shape
    return write_shards(directory, groups.values())


def write_shards(directory: Path, groups: Iterable[Mapping[str, tuple[int, ...]]]) -> int:
    """Write random bfloat16 tensors and their index as transformers saves a model; return the number of values.

    `groups` has the shapes of each file's tensors by key.
    """
    generator, count = torch.Generator().manual_seed(0), 0
    places: dict[str, str] = {}
    for number, shapes in enumerate(groups):
        name = f"model-{number:05}.safetensors"
        tensors = {key: _values(shape, generator) for key, shape in shapes.items()}
        save_file(tensors, directory / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
        count += sum(tensor.numel() for tensor in tensors.values())
    index = {"metadata": {"total_size": 2 * count}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return count


def write_adapter(directory: Path, kind: Kind) -> None:
    """Write a PEFT-format adapter of random values on all linear layers of every block."""
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {}
    for key, shape in kind.shapes().items():
        path = key.removesuffix(".weight")
        if path != key and re.fullmatch(kind.adapted, path):
            shapes = GRALORA.shapes(shape[1], shape[0], GraloraSizes(RANK, BLOCKS))
            site = f"base_model.model.{path}"
            tensors |= {
                f"{site}.gralora_{name}": torch.randn(size, generator=generator) * 0.01 for name, size in shapes.items()
            }
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    GraloraConfig(r=RANK, gralora_k=BLOCKS, target_modules=kind.adapted).save_pretrained(directory)


def _values(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return (torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16)

"""What memory an export takes: streamed from safetensors files, of a model of 1.1 B parameters with an adapter.

The model is a Llama of TinyLlama's shape with random weights, written shard by shard, so that this process never holds
it either. Each export runs in a process of its own, whose peak is what the system says when it has ended.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from benchmarks.harness import Claim, Report, Table, progress
from gralora_fx import GraloraConfig
from gralora_fx.adapter import Rank, factor_shapes

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
RANK, BLOCKS = 32, 2
OPTIONS: dict[str, dict[str, Any]] = {
    "bf16 files to fp32": {},
    "bf16 files to fp16": {"precision": "fp16"},
    "bf16 files to int4": {"quantize": "int4"},
}


def run() -> Report:
    """Export the model in several precisions and print the peak memory of each process."""
    report = Report("streaming", "streaming: exports of a Llama of 1.1 B parameters with a GraLoRA adapter, r=32 k=2")
    with tempfile.TemporaryDirectory(prefix="gralora-streaming-") as scratch:
        root = Path(scratch)
        progress("streaming, writing the model's shards")
        count = write_model(root / "base", TINY_LLAMA)
        write_adapter(root / "adapter", TINY_LLAMA)
        rows = []
        for name, options in OPTIONS.items():
            progress(f"streaming, {name}")
            rows.append({"export": name, **measure_export(root, options)})
    report.tables.append(Table(f"{count / 1e9:.2f} B parameters, {count * 2 / GIB:.2f} GiB of bfloat16 files", rows))
    peak = rows[0]["peak GB"]
    report.claims.append(Claim("peak memory of the streamed export to fp32, in GB", peak, at_most=2.0))
    report.notes.append("peak: largest resident set of the whole process; without verification, which needs the model")
    return report


def measure_export(root: Path, options: dict[str, Any]) -> dict[str, float]:
    """Peak memory and seconds of one export in a process of its own."""
    arguments = [str(root / "base"), str(root / "adapter"), str(root / "onnx"), json.dumps(options)]
    begin = time.perf_counter()
    code = "from benchmarks.streaming import export; export()"
    done = subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return {"peak GB": found["peak"] / 1e9, "imports GB": found["imports"] / 1e9, "s": time.perf_counter() - begin}


def export() -> None:
    """What the other process runs: a streamed export, then its peak memory in bytes."""
    from gralora_fx.exporters import export_onnx
    from gralora_fx.loading import load_traced

    base, adapter, output, options = sys.argv[1:]
    imports = _peak()
    model = load_traced(base, adapter, "text-generation-with-past", stream=True)
    export_onnx(model, output, verify=False, **json.loads(options))
    print(json.dumps({"imports": imports, "peak": _peak()}))


def _peak() -> int:
    """The largest resident set of this program in bytes; `ru_maxrss` would count that of the process it came from."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def write_model(directory: Path, sizes: dict[str, Any]) -> int:
    """Write a Llama with random bfloat16 weights, one shard a layer; the result is its number of parameters."""
    config = LlamaConfig(**sizes, architectures=["LlamaForCausalLM"])
    directory.mkdir(parents=True)
    config.save_pretrained(directory)
    generator = torch.Generator().manual_seed(0)
    places: dict[str, str] = {}
    count = 0
    layers = range(config.num_hidden_layers)
    groups = [_ends(config), *(_layer(config, index) for index in layers)]
    for number, shapes in enumerate(groups):
        name = f"model-{number:05}.safetensors"
        tensors = {key: _values(shape, generator) for key, shape in shapes.items()}
        save_file(tensors, directory / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
        count += sum(tensor.numel() for tensor in tensors.values())
    index = {"metadata": {"total_size": 2 * count}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return count


def write_adapter(directory: Path, sizes: dict[str, Any]) -> None:
    """Write a PEFT-format adapter of random values on all seven projections of every layer."""
    config = LlamaConfig(**sizes)
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {}
    for index in range(config.num_hidden_layers):
        for key, shape in _layer(config, index).items():
            if key.endswith("_proj.weight"):
                shapes = factor_shapes(shape[1], shape[0], Rank(RANK, BLOCKS))
                site = f"base_model.model.{key.removesuffix('.weight')}"
                tensors |= {
                    f"{site}.gralora_{name}": torch.randn(size, generator=generator) * 0.01
                    for name, size in shapes.items()
                }
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    names = {key.split(".")[-2] for key in _layer(config, 0) if key.endswith("_proj.weight")}
    GraloraConfig(r=RANK, gralora_k=BLOCKS, target_modules=names, task_type="CAUSAL_LM").save_pretrained(directory)


def _ends(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    table = (config.vocab_size, config.hidden_size)
    return {"model.embed_tokens.weight": table, "lm_head.weight": table, "model.norm.weight": (config.hidden_size,)}


def _layer(config: LlamaConfig, index: int) -> dict[str, tuple[int, ...]]:
    width, inner = config.hidden_size, config.intermediate_size
    cached = width // config.num_attention_heads * config.num_key_value_heads
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (cached, width),
        "self_attn.v_proj": (cached, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    return {f"model.layers.{index}.{name}.weight": shape for name, shape in shapes.items()}


def _values(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return (torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16)

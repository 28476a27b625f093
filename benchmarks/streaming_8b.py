"""An int4 export of a model as large as Llama 3.1 8B, streamed: bits chosen, compared, quality told, in little memory.

The model has random bfloat16 weights of these shapes: 16 GB of files, beside 16 GB that the export writes. It takes an
hour or two on two cores. `GRALORA_LAYERS=2` has fewer layers: the embeddings and the head are what takes most memory.
Whether 8 GB are enough is told by a container that has no more (`docker run -m 8g`).
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import Claim, Report, Table, progress
from benchmarks.streaming import Kind, described, measure_export, write_model

LLAMA_8B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
}
LAYERS = int(os.environ.get("GRALORA_LAYERS", LLAMA_8B["num_hidden_layers"]))
SIZES = {**LLAMA_8B, "num_hidden_layers": LAYERS}
LLAMA = Kind("Llama 3.1 8B", "LlamaForCausalLM", SIZES, "text-generation-with-past", r".*_proj")


def run() -> Report:
    """Export the model and print memory, minutes, and the seconds of each stage."""
    report = Report("streaming-8b", "streaming: a random model of the shapes of Llama 3.1 8B to int4")
    with tempfile.TemporaryDirectory(prefix="gralora-streaming-") as scratch:
        root = Path(scratch)
        progress("streaming, writing the shards")
        count = write_model(root / "base", LLAMA)
        progress("streaming, the export")
        row = measure_export(root, LLAMA.task, {"quantize": "int4"}, with_adapter=False)
    report.tables.append(Table(described(count), [{"export": "int4, compared, its quality told", **row}]))
    report.claims.append(Claim("its own memory in GB", row["own GB"], at_most=8.0))
    report.claims.append(Claim("minutes", row["s"] / 60, at_most=90.0))
    report.notes.append("peak: largest resident set, with pages of files once a mapping; own: without them")
    return report

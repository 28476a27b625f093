"""An export whose cache is large enough to count its pages, and a row that reads a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefix_interleavings import SIZES
from served_exports import CACHED, adapted, chat_tokenizer

from gralora_fx.exporters import export_onnx
from gralora_fx.run.engine.limits import part_length

CONTEXT = 2048
TOKEN = 2 * 2 * 2 * 64 * 4  # bytes of keys and values: layers, key heads, size, float32


def export_wide_heads(folder: Path) -> Path:
    """Export a Llama with heads of 64 and adapters; of heads of 8 a page has a whole context."""
    model, _ = adapted("llama", folder, CACHED, **{**SIZES, "max_position_embeddings": CONTEXT, "head_dim": 64})
    export_onnx(model, folder / "onnx", adapters="data", verify=False, tokenizer=chat_tokenizer())
    return folder / "onnx"


def read_prompt(decoder: Any, row: int, count: int) -> Any:
    """Let a row read a prompt of so many tokens; return the logits after it."""
    prompt = [3 + token % 90 for token in range(count)]
    decoder.fill(row, prompt)
    logits = None
    while prompt:
        part = part_length(len(prompt), decoder.chunk)
        logits = decoder.step({row: prompt[:part]})[row].copy()
        prompt = prompt[part:]
    return logits

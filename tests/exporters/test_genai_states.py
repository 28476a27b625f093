"""onnxruntime-genai drives exports of decoders that keep states in place of keys and values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from genai_client import genai_tokens

from gralora_fx import trace
from gralora_fx.exporters import export_onnx
from tests.architectures.tiny_decoders import tiny_decoder

LFM2 = {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}


@pytest.mark.parametrize(
    ("name", "fields", "kind"),
    [("Lfm2ForCausalLM", LFM2, "lfm2"), ("Qwen3_5ForCausalLM", {}, "qwen3_5_text")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_greedy_tokens_are_transformers(name: str, fields: dict[str, Any], kind: str, tmp_path: Path) -> None:
    model = tiny_decoder(name, **fields)
    export_onnx(trace(model, task="text-generation-with-past"), tmp_path / "onnx", verify=False)
    written = json.loads((tmp_path / "onnx" / "genai_config.json").read_text())
    assert written["model"]["type"] == kind
    assert written["search"]["past_present_share_buffer"]
    ids = torch.randint(4, 90, (1, 9), generator=torch.Generator().manual_seed(0))
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)[0, 9:].tolist()
    assert genai_tokens(tmp_path / "onnx", ids[0].tolist(), 6) == expected

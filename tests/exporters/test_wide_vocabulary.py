"""A vocabulary of 262,144 tokens: a prompt has logits of its last position alone, whatever reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peak_memory import peak
from tiny_models import tiny_model

from gralora_fx import GraloraConfig, rewrite, trace
from gralora_fx.exporters import export_onnx
from gralora_fx.serving import load

VOCABULARY, PROMPT = 262_144, 2_000
LOGITS = 4 * VOCABULARY * PROMPT  # bytes, of all positions
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "max_position_embeddings": 4096,
    "initializer_range": 0.5,
    "eos_token_id": None,
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "adapters as data, of the head too"])
def test_no_path_computes_the_logits_of_a_whole_prompt(tied: bool, tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=tied, **SIZES)
    traced: Any = trace(model, task="text-generation-with-past")
    if not tied:
        traced = rewrite(traced, GraloraConfig(r=2, gralora_k=1, target_modules=["q_proj", "lm_head"]))
    export_onnx(traced, tmp_path / "onnx", adapters="merged" if tied else "data", verify=False)
    ids = torch.randint(3, VOCABULARY, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(input_ids=ids, logits_to_keep=1).logits[0, -1].numpy()
    served, prompt = load(tmp_path / "onnx"), ids[0].tolist()
    session, decoder = served.session, served.decoder(rows=3, capacity=PROMPT + 8)
    whole = {"input_ids": ids.numpy(), "attention_mask": np.ones((1, PROMPT), np.int64)}
    whole["position_ids"] = np.arange(PROMPT)[None]
    past = {v.name: np.zeros((1, 1, 0, 8), np.float32) for v in session.get_inputs() if v.name.startswith("past")}
    with peak() as most:
        answers = served.generate([prompt, prompt[:1000], prompt[:3]], max_new_tokens=2)
        (logits,) = session.run(["logits"], {**whole, **past})  # as other programs do
        rows = [decoder.open() for _ in range(3)]
        for start in range(0, PROMPT, 50):
            of_rows = decoder.step(dict.fromkeys(rows, prompt[start : start + 50]))
    assert most[0] < LOGITS / 10
    assert np.allclose(logits[0, -1], expected, atol=1e-4 * np.abs(expected).max())
    assert all(np.allclose(of_rows[row], expected, atol=1e-4 * np.abs(expected).max()) for row in rows)
    assert answers[0][0] == int(expected.argmax())

"""A context of 131,072 tokens: nothing of it is taken before it is used, and a long prompt takes its cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_once import made_once
from peak_memory import peak
from served_exports import chat_tokenizer
from starlette.testclient import TestClient
from tiny_models import tiny_model

from gralora_fx import trace
from gralora_fx.exporters import export_onnx
from gralora_fx.run.engine.cache_memory import NeverRoomError
from gralora_fx.serving import ServiceSettings, create_app, load

CONTEXT, PROMPT, ANSWER, ROWS = 131_072, 20_000, 4, 8
TOKEN = 2 * 64 * 4  # bytes of a token's keys and values: one head of 64 in float32
SLACK = 48 << 20  # bytes of a step, and of allocators
SIZES: dict[str, Any] = {
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,
    "eos_token_id": None,
    "bos_token_id": 1,
}
pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")


@pytest.fixture(scope="module")
def path() -> Path:
    def export(folder: Path) -> None:
        traced = trace(tiny_model("llama", **SIZES), task="text-generation-with-past")
        export_onnx(traced, folder / "onnx", verify=False, tokenizer=chat_tokenizer())

    return made_once("long-context", export) / "onnx"


def long_prompt() -> list[int]:
    tokens: list[int] = torch.randint(3, 100, (PROMPT,), generator=torch.Generator().manual_seed(3)).tolist()
    return tokens


def test_a_long_prompt_is_answered_as_by_transformers_in_the_memory_of_its_cache(path: Path) -> None:
    prompt = long_prompt()
    ids = torch.tensor([prompt])
    made = tiny_model("llama", **SIZES).generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER, do_sample=False
    )
    expected = made[0, PROMPT:].tolist()
    model = load(path)
    with peak() as most:
        decoder = model.decoder(rows=ROWS)  # 537 MB, if all of it were taken
    assert most[0] < SLACK / 4
    assert decoder.row_size(CONTEXT) >= CONTEXT * TOKEN
    with peak() as most:
        assert model.generate([prompt], max_new_tokens=ANSWER)[0] == expected
    assert most[0] < PROMPT * TOKEN + SLACK  # scores of all pairs of tokens would take 3.2 GB
    settings = ServiceSettings(path, max_memory="32MiB", prefix_cache="none")
    with TestClient(create_app(settings)) as http:
        asked = {"model": "onnx", "prompt": prompt, "max_tokens": ANSWER, "temperature": 0}
        choice = http.post("/v1/completions", json=asked).json()["choices"][0]
        assert choice["text"] == chat_tokenizer().decode(expected)
        refused = http.post("/v1/completions", json={**asked, "prompt": 120 * prompt[:1000]})
    assert refused.status_code == 503
    assert "and max_memory has room for 32.0 MiB; ask for fewer tokens" in refused.json()["error"]["message"]


def test_what_a_whole_context_takes_is_refused_by_its_size(path: Path) -> None:
    decoder = load(path).decoder(rows=ROWS, max_memory=32 << 20)
    with pytest.raises(NeverRoomError, match=r"may take 64\.\d MiB, and max_memory has room for 32\.0 MiB"):
        decoder.check_room(CONTEXT)
    assert decoder.room(1) > 60_000


def test_a_rows_cache_grows_in_place(path: Path) -> None:
    """Nothing that a row has read is moved when it reads more."""
    decoder: Any = load(path).decoder(rows=2, capacity=4096)
    row = decoder.open()
    decoder.step({row: long_prompt()[:64]})
    before = {name: array[:, :64].copy() for name, array in decoder.cached(row).items()}
    places = {name: array.ctypes.data for name, array in decoder.cached(row).items()}
    for start in range(64, 2048, 64):
        decoder.step({row: long_prompt()[start : start + 64]})
    after = decoder.cached(row)
    assert {name: array.ctypes.data for name, array in after.items()} == places
    assert all(np.array_equal(after[name][:, :64], kept) for name, kept in before.items())

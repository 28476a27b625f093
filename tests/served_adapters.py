"""A service whose adapters come and go, and what its answers should be."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from peft_oracle import peft_model
from prometheus_client.parser import text_string_to_metric_families
from served_exports import LLAMA, chat_tokenizer, greedy
from starlette.testclient import TestClient
from tiny_models import tiny_model

COUNT = 8  # tokens of an answer


def lora(name: str = "llama", seed: int = 5, **sizes: Any) -> Any:
    """PEFT's plain LoRA over a tiny model."""
    fields = {"r": 3, "lora_alpha": 48, "target_modules": "all-linear"}
    return peft_model(tiny_model(name, **(sizes or LLAMA)), seed, method="LORA", **fields)


def load(client: TestClient, name: str, path: str, **fields: Any) -> Any:
    """Return the response to a load."""
    return client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path, **fields})


def unload(client: TestClient, name: str) -> Any:
    """Return the response to an unload."""
    return client.post("/v1/unload_lora_adapter", json={"lora_name": name})


def loaded(client: TestClient, name: str, path: str, **fields: Any) -> None:
    """Load an adapter."""
    response = load(client, name, path, **fields)
    assert (response.status_code, response.text) == (200, f"Success: LoRA adapter '{name}' added successfully.")


def complete(client: TestClient, model: str, prompt: str) -> str:
    """Return a greedy answer."""
    body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": COUNT}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def expected(oracle: Any, prompt: str) -> str:
    """Return the answer of transformers and PEFT."""
    tokenizer = chat_tokenizer()
    return str(tokenizer.decode(greedy(oracle, tokenizer(prompt)["input_ids"], COUNT), skip_special_tokens=True))


def metric(client: TestClient, name: str, **labels: str) -> float:
    """Return a value of `/metrics`."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    (value,) = [s.value for family in families for s in family.samples if s.name == name and s.labels == labels]
    return float(value)


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until something is so."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def settle(client: Any) -> None:
    """Wait until versions that nobody needs are freed."""
    client.app.state.engine.models.change(int).result(20)

"""A trace in one thread leaves what other threads compute alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor

from gralora_fx import trace

TASK = "text-generation-with-past"
RUNS = 200  # at least; each begins while the other thread is tracing


@pytest.mark.parametrize("kind", ["traced", "another model of the architecture"])
def test_a_decoder_computes_its_values_while_another_thread_traces(kind: str) -> None:
    other: Any = tiny_model("llama").eval()
    model: Any = trace(other, task=TASK) if kind == "traced" else other
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        runs: list[Tensor] = []
        with ThreadPoolExecutor(1) as pool:
            while len(runs) < RUNS:
                tracing = pool.submit(trace, tiny_model("llama"), task=TASK)
                while not tracing.done():
                    runs.append(model(input_ids=ids).logits)
                traced = tracing.result()
    assert not any(run.isnan().any() for run in runs)
    assert max(float((run - expected).abs().max()) for run in runs) < 1e-5
    assert traced(input_ids=ids).logits.shape == expected.shape

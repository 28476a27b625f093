"""A trace in one thread leaves what other threads compute alone."""

from __future__ import annotations

import logging
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gralora_fx import LoraConfig, rewrite, trace

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


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return -gradients[0]


def test_a_trace_changes_nothing_that_another_thread_sees(caplog: pytest.LogCaptureFixture) -> None:
    streams = sys.stdout, sys.stderr
    log, seen = logging.getLogger("another.thread"), 0
    with ThreadPoolExecutor(1) as pool:
        for name, task in (("llama", TASK), ("bert", "feature-extraction")):
            tracing = pool.submit(trace, tiny_model(name), task=task)
            while not tracing.done():
                seen += 1
                assert (sys.stdout, sys.stderr, logging.root.manager.disable) == (*streams, 0)
                log.warning("logged")
                with pytest.warns(UserWarning, match="warned"):
                    warnings.warn("warned", UserWarning, stacklevel=1)
                with torch.inference_mode():
                    assert torch.ones(1).is_inference()
                x = torch.ones(2, requires_grad=True)
                hooked = Reversed.apply(2 * x)
                hooked.register_hook(lambda gradient: 3 * gradient)
                checkpoint(torch.sin, hooked, use_reentrant=True).sum().backward()
                torch.testing.assert_close(x.grad, -6 * torch.cos(2 * torch.ones(2)))
            tracing.result()
    assert seen
    assert sum(record.message == "logged" for record in caplog.records) == seen


def test_two_threads_trace_at_once() -> None:
    x = torch.randn(2, 5, 16)
    models = [nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(5), nn.Linear(16, 16)) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        traces = list(pool.map(lambda model: trace(model, (x,)), models))
    for model, traced in zip(models, traces, strict=True):
        torch.testing.assert_close(traced.eval()(x), model.eval()(x))
        rewritten = rewrite(traced, LoraConfig(r=4, target_modules="all-linear"))
        rewritten.train()(x).sum().backward()


def test_what_was_patched_for_a_trace_is_as_before() -> None:
    owners = (torch.autograd.Function, Tensor, torch.inference_mode, logging.Logger, nn.functional, torch)
    before = [dict(vars(owner)) for owner in owners]
    trace(tiny_model("llama"), task=TASK)
    assert [dict(vars(owner)) for owner in owners[:5]] == before[:5]
    assert vars(torch)["cat"] is before[5]["cat"]

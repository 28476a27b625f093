"""Linear attention: its chunks compute what its definition does step by step, and what ONNX Runtime's operator does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gralora_fx.features.states.operators import LinearAttention

RULES = {
    "linear": {"decay": 0, "beta": False},
    "gated": {"decay": 1, "beta": False},
    "gated by key": {"decay": 6, "beta": False},
    "gated by key, of numbers": {"decay": 6, "beta": False, "value": 1},
    "delta": {"decay": 0, "beta": True},
    "gated delta": {"decay": 1, "beta": True},
    "gated delta by key": {"decay": 6, "beta": True},
}
each_rule = pytest.mark.parametrize("rule", RULES)


def arguments(rule: str, length: int, *, queries: int = 4, keys: int = 4, strength: float = 1.0) -> dict[str, Any]:
    """Two rows of four states with 6 keys and 5 values or one, in float64."""
    torch.manual_seed(0)
    decay, beta, size = RULES[rule]["decay"], RULES[rule]["beta"], RULES[rule].get("value", 5)
    decays = (6,) if decay == 6 else ()
    wide = {"dtype": torch.float64}
    return {
        "query": torch.randn(2, length, queries, 6, **wide),
        "key": nn.functional.normalize(torch.randn(2, length, keys, 6, **wide), dim=-1),
        "value": torch.randn(2, length, 4, size, **wide),
        "decay": -strength * torch.rand(2, length, 4, *decays, **wide) if decay else None,
        "beta": torch.rand(2, length, 4, **wide) if beta else None,
        "state": torch.randn(2, 4, 6, size, **wide),
        "scale": 0.5,
    }


def step_by_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the definition."""
    heads, results = value.shape[2], []
    key = key.repeat_interleave(heads // key.shape[2], 2)
    query = query.repeat_interleave(max(1, heads // query.shape[2]), 2)
    for place in range(query.shape[1]):
        if decay is not None:
            state = state * decay[:, place].reshape(2, heads, -1, 1).exp()
        new = value[:, place]
        if beta is not None:
            new = beta[:, place].unsqueeze(-1) * (new - torch.einsum("bhkv,bhk->bhv", state, key[:, place]))
        state = state + torch.einsum("bhk,bhv->bhkv", key[:, place], new)
        read = state.repeat_interleave(query.shape[2] // heads, 1)
        results.append(scale * torch.einsum("bhkv,bhk->bhv", read, query[:, place]))
    return torch.stack(results, 1), state


@each_rule
@pytest.mark.parametrize("length", [1, 16, 70, 130])
@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (2, 2), (8, 4), (4, 1)])
def test_the_chunks_compute_the_definition(rule: str, length: int, queries: int, keys: int) -> None:
    given = arguments(rule, length, queries=queries, keys=keys)
    torch.testing.assert_close(LinearAttention.compute_with_state(**given), step_by_step(**given))


@each_rule
def test_a_strong_decay_overflows_nothing(rule: str) -> None:
    given = arguments(rule, 130, strength=1e4)
    torch.testing.assert_close(LinearAttention.compute_with_state(**given), step_by_step(**given))


@each_rule
def test_gradients_are_those_of_the_definition(rule: str) -> None:
    given = arguments(rule, 70)
    tensors = [value.requires_grad_() for value in given.values() if isinstance(value, Tensor)]
    of_both = [
        torch.autograd.grad(y.square().sum() + state.square().sum(), tensors)
        for y, state in (LinearAttention.compute_with_state(**given), step_by_step(**given))
    ]
    torch.testing.assert_close(*of_both)


@pytest.mark.quick
@each_rule
def test_positions_of_zeros_leave_the_state(rule: str) -> None:
    given = arguments(rule, 3)
    zeros = {name: torch.zeros_like(given[name]) for name in ("key", "decay", "beta") if given[name] is not None}
    _, state = LinearAttention.compute_with_state(**(given | zeros))
    assert torch.equal(state, given["state"])


def test_a_state_that_is_not_given_is_zeros_in_float32() -> None:
    given = {name: value.half() for name, value in arguments("gated", 5).items() if isinstance(value, Tensor)}
    given |= {"beta": None, "state": None, "scale": 1.0}
    y, state = LinearAttention.compute_with_state(**given)
    assert (y.dtype, state.dtype) == (torch.float16, torch.float32)


def test_what_is_forgotten_is_zero_rather_than_a_denormal_number() -> None:
    """Processors take long for denormal numbers, of which a state that decays fast would be full."""
    one = torch.ones(1, 50, 1, 1)
    value = torch.where(torch.arange(50).view(1, 50, 1, 1) == 0, one, 0 * one)  # written at the first position alone
    y, _ = LinearAttention.compute_with_state(
        query=one, key=one, value=value, decay=-2 * one.squeeze(-1), beta=None, state=None, scale=1.0
    )
    decays = torch.arange(0.0, -100, -2)
    torch.testing.assert_close(y.flatten()[:36], decays[:36].exp())
    assert decays[36:].exp().all()  # denormal numbers
    assert not y.flatten()[36:].any()

"""Tracing of transformers' experts: one operator per layer, recognised by what their code computes.

transformers calls the experts of a model by one interface, and each class says how its parameters are stored. The
function between the two products is a method of its own; its parameters are measured on a few inputs and checked on
many.

Some models loop over the experts in use, which depend on the data. Loops whose code is known become the same operator.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gralora_fx.core.tracing.known_code import Recognised
from gralora_fx.features.experts.gate import ACTIVATIONS, HALVES, INTERLEAVED, NO_GATE, ExpertGate
from gralora_fx.features.experts.operators import Experts, between

_LOOP = "eager"
_PRODUCTS = "grouped_mm"  # transformers' own default for most models
_DIGITS = 6
_FAR = 1e6


@contextmanager
def experts_as_operators(model: nn.Module) -> Iterator[None]:
    """Replace every module of experts that the operator can express by `gralora::experts` while the block runs.

    The others use grouped products if transformers has that implementation for them: a loop runs over the experts that
    some token uses, which a graph cannot know.
    """
    with ExitStack() as changed:
        for part in model.modules():
            if isinstance(part, PreTrainedModel) and _loops(part):
                part.set_experts_implementation(_PRODUCTS)
                changed.callback(part.set_experts_implementation, _LOOP)
            gate = gate_of(part)
            if gate is not None:
                changed.enter_context(patch.object(part, "forward", functools.partial(_compute, part, gate)))
        yield


def _loops(model: PreTrainedModel) -> bool:
    """Return whether a model's experts run in a loop, and may use another implementation."""
    return bool(model._can_set_experts_implementation()) and model.get_experts_implementation()[""] == _LOOP


def _compute(
    module: Any, gate: ExpertGate, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Call the operator with the arguments of transformers' interface of experts."""
    return Experts.compute(
        hidden=hidden_states,
        index=top_k_index,
        weights=top_k_weights,
        up=module.gate_up_proj if module.has_gate else module.up_proj,
        down=module.down_proj,
        up_bias=(module.gate_up_proj_bias if module.has_gate else module.up_proj_bias) if module.has_bias else None,
        down_bias=module.down_proj_bias if module.has_bias else None,
        is_transposed=module.is_transposed,
        **vars(gate),
    )


def gate_of(module: Any) -> ExpertGate | None:
    """Return the gate of a module of experts; None if the operator cannot express it."""
    if not callable(getattr(module, "_apply_gate", None)) or not hasattr(module, "has_gate"):
        return None
    weights = [getattr(module, name, None) for name in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")]
    is_plain = all(isinstance(w, Tensor) and w.ndim == 3 and w.is_floating_point() and w.itemsize > 1 for w in weights)
    if not is_plain or module.has_post_expert_norm or module._is_expert_parallel:
        return None
    try:
        with torch.no_grad():
            return _measured(module._apply_gate) if module.has_gate else ungated(module.act_fn)
    except (TypeError, ValueError, RuntimeError):  # its signature or result differs
        return None


def ungated(function: Callable[[Tensor], Tensor]) -> ExpertGate | None:
    """Return the gate of experts without a linear part, by their activation; None if the operator lacks it."""
    x = torch.linspace(-9, 9, 73, dtype=torch.float64)
    return next((gate for gate in _gates(NO_GATE) if torch.allclose(function(x), between(gate, x), 1e-5, 1e-6)), None)


def _measured(function: Callable[[Tensor], Tensor]) -> ExpertGate | None:
    """Return the gate that a function computes, in either layout, by evaluating it; None if there is none."""
    for layout in (HALVES, INTERLEAVED):

        def at(gate: float, linear: float, layout: str = layout) -> float:
            """Evaluate the function at one gate and one linear part, next to zeros."""
            numbers = [gate, 0.0, linear, 0.0] if layout == HALVES else [gate, linear, 0.0, 0.0]
            return float(function(torch.tensor([numbers], dtype=torch.float64))[0, 0])

        nothing = at(0.5, 0)
        activated = at(0.5, 1) - nothing  # the activation of 0.5
        if not 0 < activated <= 0.5:
            continue
        bound = (at(0.5, _FAR) - nothing) / activated
        gates = list(
            _gates(
                layout,
                alpha=round(2 * math.log(activated / (0.5 - activated)), _DIGITS) if activated < 0.5 else 1.0,
                offset=round(nothing / activated, _DIGITS),
                limit=round(bound, _DIGITS) if bound < _FAR / 2 else 0.0,
            )
        )
        x = 3 * max(4.0, gates[0].limit) * torch.linspace(-1, 1, 64, dtype=torch.float64)
        both = torch.cartesian_prod(x, x)  # every gate with every linear part
        x = both.T.reshape(1, -1) if layout == HALVES else both.reshape(1, -1)
        expected = function(x)
        found = next((gate for gate in gates if torch.allclose(expected, between(gate, x), 1e-5, 1e-6)), None)
        if found is not None:
            return found
    return None


def _gates(layout: str, alpha: float = 1.0, offset: float = 0.0, limit: float = 0.0) -> Iterator[ExpertGate]:
    for activation in ACTIVATIONS:
        yield ExpertGate(activation, layout, alpha if activation == "silu" else 1.0, offset, limit)


@contextmanager
def looped_experts_as_operators(model: nn.Module, table: Sequence[Recognised]) -> Iterator[None]:
    """Replace a model's known loop over experts by `gralora::experts` while the block runs."""
    with ExitStack() as changed:
        for part in model.modules():
            for code in table:
                if code.replaces_in(part):
                    compute = code.load()
                    gate = ungated(_ACTIVATIONS[compute](part))
                    if gate is not None:
                        changed.enter_context(patch.object(part, "forward", functools.partial(compute, part, gate)))
        yield


def _halves(hidden: Tensor, index: Tensor, weights: Tensor, up: Tensor, down: Tensor, gate: ExpertGate) -> Tensor:
    """Call the operator: gates in the first half of `up`, `down` as `[experts, size, width]`."""
    return Experts.compute(
        hidden=hidden,
        index=index,
        weights=weights,
        up=up,
        down=down,
        up_bias=None,
        down_bias=None,
        is_transposed=False,
        **vars(replace(gate, layout=HALVES)),
    )


def dbrx(module: Any, gate: ExpertGate, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute DBRX's experts, whose matrices are concatenated along the rows."""
    parts = (module.mlp.w1, module.mlp.v1, module.mlp.w2)
    w1, v1, w2 = (part.view(module.num_experts, module.ffn_hidden_size, -1) for part in parts)
    x = hidden_states.reshape(-1, module.hidden_size)
    up, down = torch.cat([w1, v1], dim=1), w2.transpose(1, 2)
    return _halves(x, top_k_index, top_k_weights, up, down, gate).view(hidden_states.shape)


def longcat(module: Any, gate: ExpertGate, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute LongCat's experts, some of which are the identity and have no matrices."""
    count = module.num_routed_experts
    is_own = top_k_index < count
    weights, kept = top_k_weights * is_own, (top_k_weights * ~is_own).sum(-1, keepdim=True)
    index = torch.where(is_own, top_k_index, 0)
    up, down = module.gate_up_proj[:count], module.down_proj
    y: Tensor = hidden_states * kept.to(hidden_states.dtype)
    return y + _halves(hidden_states, index, weights.to(hidden_states.dtype), up, down, gate)


# the experts' activation, by function
_ACTIVATIONS: Mapping[Callable[..., Any], Callable[[Any], Any]] = {
    dbrx: lambda experts: experts.mlp.activation_fn,
    longcat: lambda experts: experts.act_fn,
}

"""Experts that a model computes in a loop of its own, not through transformers' interface: one operator a layer.

The loop asks which experts some token has, a value that a graph does not know.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from gralora_fx.core.tracing.patches.recognised import Recognised
from gralora_fx.features.experts.gate import HALVES, ExpertGate
from gralora_fx.features.experts.interface import ungated
from gralora_fx.features.experts.operators import Experts


@contextmanager
def looped_experts_as_operators(model: nn.Module, table: Sequence[Recognised]) -> Iterator[None]:
    """Let a model whose loop is known call `gralora::experts` within the block."""
    with ExitStack() as changed:
        for part in model.modules():
            for code in table:
                if code.replaces_in(part):
                    compute = code.load()
                    gate = ungated(_ACTIVATIONS[compute](part))
                    if gate is not None:
                        changed.enter_context(patch.object(part, "forward", functools.partial(compute, part, gate)))
        yield


def _compute(hidden: Tensor, index: Tensor, weights: Tensor, up: Tensor, down: Tensor, gate: ExpertGate) -> Tensor:
    """The experts of each token: gates in the first half of `up`, `down` as `[experts, size, width]`."""
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
    """DBRX's, whose matrices are those of all experts one below the other."""
    parts = (module.mlp.w1, module.mlp.v1, module.mlp.w2)
    w1, v1, w2 = (part.view(module.num_experts, module.ffn_hidden_size, -1) for part in parts)
    x = hidden_states.reshape(-1, module.hidden_size)
    up, down = torch.cat([w1, v1], dim=1), w2.transpose(1, 2)
    return _compute(x, top_k_index, top_k_weights, up, down, gate).view(hidden_states.shape)


def longcat(module: Any, gate: ExpertGate, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """LongCat's, some of which give a token as it is and have no matrices."""
    count = module.num_routed_experts
    is_own = top_k_index < count
    weights, kept = top_k_weights * is_own, (top_k_weights * ~is_own).sum(-1, keepdim=True)
    index = torch.where(is_own, top_k_index, 0)
    up, down = module.gate_up_proj[:count], module.down_proj
    y: Tensor = hidden_states * kept.to(hidden_states.dtype)
    return y + _compute(hidden_states, index, weights.to(hidden_states.dtype), up, down, gate)


# the activation of the experts of each
_ACTIVATIONS: Mapping[Callable[..., Any], Callable[[Any], Any]] = {
    dbrx: lambda experts: experts.mlp.activation_fn,
    longcat: lambda experts: experts.act_fn,
}

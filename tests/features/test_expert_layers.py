"""Experts of transformers' models, told by what their code computes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Config, DeepseekV4Experts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHConfig, NemotronHExperts

from gralora_fx.features.experts.blocks import StackedTogether
from gralora_fx.features.experts.gate import ExpertGate
from gralora_fx.features.experts.interface import experts_as_operators, gate_of

pytestmark = pytest.mark.quick


def experts(kind: Any, config: Any, **fields: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 6, "moe_intermediate_size": 6, "num_local_experts": 4}
    known = {name: value for name, value in {**sizes, "n_routed_experts": 4}.items() if hasattr(config(), name)}
    made = config(**known, **fields)
    made._experts_implementation = "eager"
    module = kind(made)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


KINDS = {
    "mixtral": (lambda: experts(MixtralExperts, MixtralConfig), ExpertGate("silu", "halves")),
    "mixtral with gelu": (
        lambda: experts(MixtralExperts, MixtralConfig, hidden_act="gelu"),
        ExpertGate("gelu", "halves"),
    ),
    "gpt-oss": (
        lambda: experts(GptOssExperts, GptOssConfig),
        ExpertGate("silu", "interleaved", alpha=1.702, offset=1.0, limit=7.0),
    ),
    "deepseek v4": (lambda: experts(DeepseekV4Experts, DeepseekV4Config), ExpertGate("silu", "halves", limit=10.0)),
    "nemotron-h": (lambda: experts(NemotronHExperts, NemotronHConfig), ExpertGate("relu2", "none")),
}


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_the_gate_is_measured_and_the_operator_gives_what_the_loop_does(name: str) -> None:
    make, gate = KINDS[name]
    module = make()
    assert gate_of(module) == gate
    x, weights = torch.randn(7, module.down_proj.shape[1 if not module.is_transposed else 2]), torch.randn(7, 2)
    index = torch.stack([torch.randperm(4)[:2] for _ in range(7)])
    expected = module(x, index, weights)
    with experts_as_operators(module):
        torch.testing.assert_close(module(x, index, weights), expected)
    assert "forward" not in vars(module)


def test_other_gates_are_left_as_they_are() -> None:
    class Cubed(MixtralExperts):
        def _apply_gate(self, gate_up: Tensor) -> Tensor:
            gate, up = gate_up.chunk(2, dim=-1)
            return gate**3 * up

    assert gate_of(experts(Cubed, MixtralConfig)) is None
    module = experts(MixtralExperts, MixtralConfig)
    module.has_post_expert_norm = True
    assert gate_of(module) is None
    assert gate_of(nn.Linear(2, 2)) is None


def test_stacks_that_are_computed_together_keep_those_alone_that_are_not_being_written() -> None:
    computed = []

    def entries() -> Iterator[list[Any]]:
        for entry in range(3):
            computed.append(entry)
            yield [np.full((2, 2), entry), np.full(2, 10 + entry)]

    stacks = StackedTogether(entries)
    first = stacks.entries(0)
    assert (next(first).tolist(), computed) == ([[0, 0], [0, 0]], [0])
    assert [array.tolist() for array in first] == [[[1, 1], [1, 1]], [[2, 2], [2, 2]]]
    assert [array.tolist() for array in stacks.entries(1)] == [[10, 10], [11, 11], [12, 12]]
    assert computed == [0, 1, 2]
    assert [array.tolist() for array in stacks.entries(1)] == [[10, 10], [11, 11], [12, 12]]  # read again: again
    assert computed == 2 * [0, 1, 2]

"""State space layers as operators: transformers' results where those are right, and the same however a text is cut."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    BambaConfig,
    FalconH1Config,
    FalconMambaConfig,
    JambaConfig,
    Mamba2Config,
    MambaConfig,
    PreTrainedConfig,
    ZambaConfig,
)
from transformers.cache_utils import LinearAttentionLayer

from gralora_fx.core.tracing.known_code import replaced
from gralora_fx.features.states.recognised import GATED_NORMS, STATE_SPACES

WIDTH, LENGTH = 16, 11
_SIZES = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 8}
_HEADS = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 6}
_OF_TWO = {"num_heads": 4, "head_dim": 8, "n_groups": 2, "state_size": 6}
_RANKED = {"mamba_d_state": 6, "mamba_dt_rank": 3}
KINDS = ["linear_attention", "hybrid"] * 2
_ATTENTION = {"num_attention_heads": 2, "num_key_value_heads": 2}
LAYERS: dict[str, Callable[[], PreTrainedConfig]] = {
    "Mamba": lambda: MambaConfig(**_SIZES, state_size=6, time_step_rank=3),
    "Mamba with biases and another activation": lambda: MambaConfig(
        **_SIZES, state_size=6, time_step_rank=3, use_bias=True, hidden_act="gelu"
    ),
    "FalconMamba": lambda: FalconMambaConfig(**_SIZES, state_size=6, time_step_rank=3),
    "Jamba": lambda: JambaConfig(**_SIZES, **_RANKED, **_ATTENTION, num_experts=1),
    "Zamba": lambda: ZambaConfig(
        **_SIZES | {"num_hidden_layers": 4}, **_RANKED, **_ATTENTION, n_mamba_heads=2, layers_block_type=KINDS
    ),
    "Mamba2": lambda: Mamba2Config(**_SIZES, **_OF_TWO),
    "Mamba2 with limited time steps": lambda: Mamba2Config(**_SIZES, **_OF_TWO, time_step_limit=(0.2, 0.5)),
    "Bamba": lambda: BambaConfig(**_SIZES, **_HEADS, **_ATTENTION),
    "FalconH1": lambda: FalconH1Config(**_SIZES, **_HEADS, **_ATTENTION, mamba_d_ssm=32),
    "FalconH1 with a norm": lambda: FalconH1Config(
        **_SIZES, **_HEADS, **_ATTENTION, mamba_d_ssm=32, mamba_rms_norm=True
    ),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


class Cache:
    """A cache of one layer, as transformers' models call it."""

    def __init__(self) -> None:
        self.layers = [LinearAttentionLayer()]

    def get_conv_state(self, layer: int, state_idx: int) -> Tensor | None:
        return self.layers[layer].conv_states[state_idx]

    def get_recurrent_state(self, layer: int, state_idx: int) -> Tensor | None:
        return self.layers[layer].recurrent_states[state_idx]

    def is_recording_past(self, layer: int) -> bool:
        return False

    def update_conv_state(self, state: Tensor, layer: int, **options: Any) -> Tensor:
        return self.layers[layer].update_conv_state(state, **options)

    def update_recurrent_state(self, state: Tensor, layer_idx: int) -> Tensor:
        return self.layers[layer_idx].update_recurrent_state(state)

    @property
    def states(self) -> tuple[Tensor, Tensor]:
        layer = self.layers[0]
        return layer.conv_states[0], layer.recurrent_states[0]


def layer_and_text(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = AutoModel.from_config(LAYERS[name]()).eval()
    layer = next(part for part in model.modules() if any(code.replaces_in(part) for code in STATE_SPACES))
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.ndim != 1:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return layer, torch.randn(2, LENGTH, WIDTH)


def run(layer: nn.Module, *pieces: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Cache]:
    """Run a layer on a text in pieces; return its outputs and its cache afterwards."""
    cache = Cache()
    with torch.no_grad():
        results = [layer(piece, cache=cache, attention_mask=mask) for piece in pieces]
    return torch.cat(results, dim=1), cache


def replacing(layer: nn.Module) -> Any:
    return replaced(layer, (*STATE_SPACES, *GATED_NORMS))


@pytest.mark.quick
@each_layer
def test_a_prompt_and_single_tokens_after_it_are_transformers(name: str) -> None:
    layer, text = layer_and_text(name)
    pieces = [text[:, :-2], text[:, -2:-1], text[:, -1:]]
    expected, before = run(layer, *pieces)
    with replacing(layer):
        actual, after = run(layer, *pieces)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    for state, reference in zip(after.states, before.states, strict=True):
        torch.testing.assert_close(state, reference, atol=1e-5, rtol=1e-4)


@each_layer
def test_a_text_gives_the_same_however_it_is_cut(name: str) -> None:
    layer, text = layer_and_text(name)
    with replacing(layer):
        whole, at_once = run(layer, text)
        # a token by itself, after others, is one of an answer, whose time steps have no limits
        ends = (1, 8, LENGTH) if "limited" in name else (1, 8, 9, LENGTH)
        cut, in_pieces = run(layer, *(text[:, start:end] for start, end in pairwise((0, *ends))))
    torch.testing.assert_close(cut, whole, atol=1e-5, rtol=1e-4)
    for state, reference in zip(in_pieces.states, at_once.states, strict=True):
        torch.testing.assert_close(state, reference, atol=1e-5, rtol=1e-4)


@each_layer
def test_padding_before_a_text_leaves_its_states_as_they_are(name: str) -> None:
    layer, text = layer_and_text(name)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :4] = 0
    with replacing(layer):
        padded, together = run(layer, text, mask=mask)
        short, alone = run(layer, text[1:, 4:])
    torch.testing.assert_close(padded[1:, 4:], short, atol=1e-5, rtol=1e-4)
    for state, reference in zip(together.states, alone.states, strict=True):
        torch.testing.assert_close(state[1:], reference, atol=1e-6, rtol=1e-5)


@each_layer
def test_what_a_layer_learns_is_what_transformers_code_learns(name: str) -> None:
    layer, text = layer_and_text(name)
    gradients = []
    for context in (nullcontext(), replacing(layer)):
        layer.zero_grad()
        with context:
            layer(text).square().sum().backward()
        gradients.append({path: parameter.grad.clone() for path, parameter in layer.named_parameters()})
    for path, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][path], expected, atol=1e-4, rtol=1e-3, msg=path)

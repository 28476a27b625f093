"""Arguments of the one attention node: padding, windows, and masks of a model's own making."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fresh_process import fresh_process
from torch import Tensor, nn
from transformers.masking_utils import (
    blockwise_overlay,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    sliding_window_causal_mask_function,
)

from gralora_fx import trace
from gralora_fx.core.operators.attention import Attention, Mask, MaskOfBlocks, without_empty_blocks
from gralora_fx.core.tracing.decoder_operators import _blocks_beside, _is_same
from tests.architectures.tiny_decoders import tiny_decoder

TASK = "text-generation-with-past"


def attentions(name: str, **fields: Any) -> list[Attention]:
    graph = trace(tiny_decoder(name, **fields), task=TASK).graph_module.graph
    assert not list(Mask.all_in(graph))
    return [attention for _, attention in Attention.all_in(graph)]


@pytest.mark.parametrize(
    ("name", "fields"),
    [("Cohere2ForCausalLM", {}), ("Qwen2MoeForCausalLM", {"use_sliding_window": True})],  # whose layers tell no window
)
def test_all_layers_read_the_padding_mask_itself(name: str, fields: dict[str, bool]) -> None:
    kinds = ["sliding_attention", "full_attention"]
    layers = attentions(name, layer_types=kinds, sliding_window=4, **fields)
    assert [layer.window for layer in layers] == [4, 0]
    assert {str(layer.mask) for layer in layers} == {"attention_mask"}


def test_a_mask_of_chunks_is_made_by_the_model() -> None:
    masks = [layer.mask for layer in attentions("Llama4ForCausalLM")]
    ranks = [mask.meta["val"].ndim for mask in masks if mask is not None]
    assert sorted(ranks) == [2, 4, 4, 4]


def test_a_mask_of_blocks_that_there_are_none_of_is_plain() -> None:
    layers = attentions("Gemma4UnifiedForConditionalGeneration")
    assert {str(layer.mask) for layer in layers} == {"attention_mask"}


def test_a_mask_of_blocks_stays_where_the_inputs_tell_them() -> None:
    class Masked(nn.Module):
        def forward(self, blocks: Tensor, padding: Tensor) -> Tensor:
            plain = torch.ops.gralora.mask(padding, 3, 0, torch.float32)
            whole = plain.masked_fill(blocks.bool().unsqueeze(1).unsqueeze(1), 0.0)
            return torch.ops.gralora.mask_of_blocks(blocks, plain, whole)

    inputs = torch.tensor([[0, 0, 1, 1]]), torch.ones(1, 4)
    graph_module = torch.export.export(Masked(), inputs).module(check_guards=False)
    without_empty_blocks(graph_module.graph)
    graph_module.recompile()
    assert not list(MaskOfBlocks.all_in(graph_module.graph))
    torch.testing.assert_close(graph_module(*inputs), Masked()(*inputs))


def test_attention_that_does_not_go_through_the_interface_is_left_alone() -> None:
    model = tiny_decoder("BloomForCausalLM")
    before = model.config._attn_implementation
    graph = trace(model, task=TASK).graph_module.graph
    assert not list(Attention.all_in(graph))
    assert model.config._attn_implementation == before


def test_mask_functions_are_compared_by_what_they_do() -> None:
    assert _is_same(sliding_window_causal_mask_function(4), sliding_window_causal_mask_function(4))
    assert not _is_same(sliding_window_causal_mask_function(4), sliding_window_causal_mask_function(5))
    assert not _is_same(sliding_window_causal_mask_function(4), causal_mask_function)
    starts = torch.zeros(2, dtype=torch.long)
    blocks = torch.tensor([[-1, 0, 0]])
    shown = or_masks(causal_mask_function, blockwise_overlay(blocks))
    assert _blocks_beside(shown, causal_mask_function) is blocks
    assert _blocks_beside(shown, sliding_window_causal_mask_function(4)) is None
    assert _blocks_beside(causal_mask_function, causal_mask_function) is None
    assert not _is_same(chunked_causal_mask_function(4, starts), sliding_window_causal_mask_function(4))


def test_the_mask_that_a_model_adds_to_is_the_eager_one() -> None:
    padding = torch.tensor([[0, 1, 1, 1, 1]])
    additive: Tensor = torch.ops.gralora.mask(padding, 3, 2, torch.float32)
    seen = [[False, True, True, False, False], [False, False, True, True, False], [False, False, False, True, True]]
    assert torch.equal(additive[0, 0] == 0, torch.tensor(seen))
    assert bool((additive[0, 0][~torch.tensor(seen)] == torch.finfo(torch.float32).min).all())


def test_nothing_is_registered_with_transformers_before_a_decoder_is_traced() -> None:
    assert fresh_process().registered == []


@pytest.mark.parametrize("kind", ["encoder", "both"])
def test_a_causal_mask_of_torchs_transformer_holds_at_every_length(kind: str) -> None:
    """PyTorch looks into the mask for whether it is causal."""

    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 1)
            self.both = nn.Transformer(16, 2, 1, 1, 32, dropout=0, batch_first=True)

        def forward(self, x: Tensor) -> Any:
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
            return self.encoder(x, mask=mask) if kind == "encoder" else self.both(x, x, tgt_mask=mask)

    source = Causal()
    traced = trace(source, (torch.randn(2, 5, 16),))
    assert traced.signature.limits == ()
    for length in (1, 8):
        x = torch.randn(3, length, 16)
        assert torch.allclose(traced(x), source(x), atol=1e-5)

"""Decoders whose indexer drops keys: the numbers of an export are the model's, of a prompt, of steps, with padding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from gralora_fx import trace
from gralora_fx.exporters import export_onnx
from gralora_fx.exporters.verify.greedy_tokens import DecoderSteps
from gralora_fx.run.sessions.session import open_session
from tests.architectures.tiny_decoders import tiny_decoder

CHOSEN, LENGTH, STEPS = 8, 24, 4
HEADS = 16  # of so many no two scores are zero, which they are where every head's product is negative
PADDING = (0, 5, 17)  # before each row; the last has fewer tokens than are chosen


@pytest.mark.quick
def test_keys_that_are_dropped_are_the_models(tmp_path: Path) -> None:
    fields = {"num_hidden_layers": 1, "mlp_layer_types": ["dense"], "layer_types": ["indexed_attention"]}
    name, heads = "DeepseekV32ForCausalLM", HEADS
    models = [tiny_decoder(name, index_topk=count, index_n_heads=heads, **fields) for count in (CHOSEN, 64)]
    export_onnx(trace(models[0], task="text-generation-with-past"), tmp_path / "export", logits="all")
    step = DecoderSteps(open_session(tmp_path / "export"), len(PADDING))
    ids = torch.randint(3, 90, (len(PADDING), LENGTH), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(LENGTH) >= torch.tensor(PADDING)[:, None]).long()
    new = ids
    for _ in range(1 + STEPS):
        actual = step(new, mask)
        expected, of_all_keys = (logits(model, ids, mask)[:, -new.shape[1] :] for model in models)
        is_read = mask[:, -new.shape[1] :].bool()
        assert (actual - expected)[is_read].abs().max() < 1e-5
        assert (of_all_keys - expected)[is_read].abs().max() > 0.01  # keys were dropped
        new = expected[:, -1:].argmax(-1)
        ids, mask = torch.cat([ids, new], dim=1), torch.cat([mask, torch.ones_like(new)], dim=1)


def logits(model: torch.nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """`[batch, length, vocabulary]` of the model itself, which reads everything at once."""
    with torch.no_grad():
        result: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return result

"""A hybrid most of whose sizes are equal, so that no shape tells what a tensor is: its traces are the model."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from traces import relative_error
from transformers import PreTrainedModel

from gralora_fx import trace
from gralora_fx.core.tracing.inputs.cache import tensors_of
from gralora_fx.core.tracing.inputs.cached_steps import cached_inputs
from gralora_fx.core.tracing.inputs.signature import own_inputs
from tests.architectures.tiny_decoders import tiny_decoder

CHUNK = 3  # as wide as its kernels, and as long as the step that a trace is made from
HEADS = 2  # as many as that step has rows, and as there are groups of states
SIZE = 16  # of heads and of states; heads together are as wide as the hidden states, and as the vocabulary is large


@functools.cache
def source() -> PreTrainedModel:
    attention = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": SIZE}
    states = {"mamba_num_heads": HEADS, "mamba_head_dim": SIZE, "ssm_state_size": SIZE, "n_groups": HEADS}
    widths = {"hidden_size": HEADS * SIZE, "vocab_size": HEADS * SIZE, "conv_kernel": CHUNK, "chunk_size": CHUNK}
    kinds = ["linear_attention", "full_attention"]
    model = tiny_decoder("NemotronHForCausalLM", **attention, **states, **widths, layers_block_type=kinds)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("dt_bias"):  # with the defaults, a state is next to nothing
                parameter.fill_(-1.0)
    return model


def masks() -> Iterator[Tensor]:
    """Masks of texts shorter than a chunk to several long, without padding, and with padding on either side."""
    for length in (1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK):
        for rows in (1, 3):
            yield torch.ones(rows, length, dtype=torch.long)
        for padded in (slice(0, length // 2), slice(length - length // 2, length)):
            mask = torch.ones(3, length, dtype=torch.long)
            mask[1, padded] = 0
            yield mask


def test_a_trace_without_a_cache_is_the_model() -> None:
    model, graph = source(), trace(source()).graph_module
    for mask in masks():
        ids = torch.randint(3, SIZE, mask.shape, generator=torch.Generator().manual_seed(mask.shape[1]))
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            actual = graph(input_ids=ids, attention_mask=mask)["logits"]
        assert relative_error(actual[mask.bool()], expected[mask.bool()]) < 1e-5, mask.tolist()


@pytest.mark.quick
def test_steps_of_a_trace_with_a_cache_are_the_models() -> None:
    model, traced = source(), trace(source(), task="text-generation-with-past")
    for batch, past, length in ((1, 0, 1), (2, 0, 2), (2, 2, 2), (2, 3, 1), (3, 3, 3), (16, 16, 16), (1, 5, 1)):
        inputs = cached_inputs(model, batch=batch, past=past, length=length)
        with torch.no_grad():
            expected, actual = model(**own_inputs(inputs), use_cache=True), traced(**own_inputs(inputs))
        assert relative_error(actual.logits, expected.logits) < 1e-5, (batch, past, length)
        for slot, tensor in tensors_of(actual.cache).items():
            last = tensors_of(expected.cache)[slot]
            assert relative_error(tensor, last[..., -tensor.shape[-1] :]) < 1e-5, (slot.place, batch, past, length)

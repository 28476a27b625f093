"""A decoder whose step is not a graph of new tokens and a cache is refused by name, with the reason and what to do."""

from __future__ import annotations

import pytest
import torch

from gralora_fx import trace
from gralora_fx.core.tracing.inputs.cached_steps import cached_inputs
from gralora_fx.errors import TraceError
from tests.architectures.tiny_decoders import tiny_decoder

pytestmark = pytest.mark.quick
STEP = "text-generation-with-past"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("CpmAntForCausalLM", "every step takes the whole text"),
        ("Gemma4AssistantForCausalLM", "it reads the keys and values of the model that it drafts for"),
        ("MusicgenForCausalLM", "several rows of sound codes"),
        ("OpenAIGPTLMHeadModel", "its forward takes no cache.*; task='text-generation' traces it without a cache"),
        ("ProphetNetForCausalLM", "with a cache it reads one token at a time"),
        ("RecurrentGemmaForCausalLM", "in its modules.*; task=.text-generation. traces it for texts of one length"),
        ("RwkvForCausalLM", "a list of its own.*, from Python with dynamic=False"),
        ("ReformerModelWithLMHead", "random hashes sort into buckets"),
        ("XLNetLMHeadModel", "its memory is hidden states"),
        ("xLSTMForCausalLM", "its states are in a cache of its own"),
    ],
)
def test_the_reason_is_told(name: str, why: str) -> None:
    with pytest.raises(TraceError, match=f"{name} has no step with a cache that a graph can hold: .*{why}"):
        trace(tiny_decoder(name), task=STEP)


def test_states_that_do_not_begin_with_zeros_are_refused() -> None:
    fields = {"ple_layer_ids": [1], "ple_embed_dim": 32, "heads_per_ngram": 2, "ngram_vocab_size_base": 50}
    with pytest.raises(TraceError, match=r"Qwen4ExpForCausalLM has no step .*: its embeddings of n-grams"):
        trace(tiny_decoder("Qwen4ExpForCausalLM", **fields, eos_token_id=2), task=STEP)


def test_an_input_that_a_step_does_not_take_is_not_left_out_in_silence() -> None:
    model = tiny_decoder("LlamaForCausalLM", num_hidden_layers=1)
    inputs = cached_inputs(model)
    with pytest.raises(
        TraceError, match=r"input_ids.* alone, and the example has output_mask too; .*is inputs_embeds of task='image"
    ):
        trace(model, {**inputs, "output_mask": torch.zeros(2, 3)}, task=STEP)

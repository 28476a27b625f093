"""Models with a recurrent state call the project's operators while they are traced, and compute the same."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from gralora_fx import trace
from gralora_fx.core.tracing.inputs.cache import returned_cache, tensors_of
from gralora_fx.core.tracing.known_code import IN_DECODERS, replaced
from gralora_fx.features.states.operators import CausalConv
from gralora_fx.features.states.recognised import CAUSAL_CONV, DELTA_RULE, KIMI_RULE, RECURRENCES
from gralora_fx.features.states.state_kinds import KINDS
from gralora_fx.format.input_names import PAST
from tests.architectures.tiny_decoders import tiny_decoder

CLASSES = {
    "Qwen3NextForCausalLM": {CAUSAL_CONV, DELTA_RULE},
    "Qwen3_5ForCausalLM": {CAUSAL_CONV, DELTA_RULE},
    "OlmoHybridForCausalLM": {CAUSAL_CONV, DELTA_RULE},
    "LaraMiniForCausalLM": {CAUSAL_CONV, DELTA_RULE},
    "KimiLinearForCausalLM": {CAUSAL_CONV, KIMI_RULE},
    "BailingHybridForCausalLM": {CAUSAL_CONV, KIMI_RULE},
    "Lfm2ForCausalLM": {CAUSAL_CONV},
}


@pytest.mark.parametrize("name", CLASSES)
def test_a_prompt_and_a_step_give_what_the_model_gives(name: str) -> None:
    model = tiny_decoder(name)
    owners = {sys.modules[type(module).__module__] for module in model.modules()}
    assert {code for code in RECURRENCES if any(map(code.is_function_of, owners))} == CLASSES[name]
    ids = torch.randint(3, 50, (2, 67), generator=torch.Generator().manual_seed(0))

    def answers() -> list[Tensor]:
        prompt = model(ids[:, :-1], use_cache=True)
        cache = copy.deepcopy(returned_cache(prompt))
        return [prompt.logits, model(ids[:, -1:], past_key_values=cache).logits]

    with torch.no_grad():
        expected = answers()
        with replaced(model, RECURRENCES):
            actual = answers()
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_a_convolution_takes_the_state_of_its_layer_and_gives_the_next() -> None:
    layers = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}
    graph = trace(tiny_decoder("Lfm2ForCausalLM", **layers), task="text-generation-with-past").graph_module.graph
    ((node, conv),) = CausalConv.all_in(graph)
    assert conv.state.op == "placeholder"
    kept = next(user for user in node.users if user.args[1] == 1)
    assert kept in graph.output_node().all_input_nodes


def test_a_text_without_images_has_one_angle_a_position() -> None:
    model = tiny_decoder("Qwen3_5ForCausalLM")
    rotary, positions = model.model.rotary_emb, torch.tensor([[0, 1, 5], [2, 3, 4]])
    x = torch.zeros(2, 3, 8)
    for given in (positions.expand(3, -1, -1), torch.stack([positions, positions + 1, positions + 2])):
        expected = rotary(x, given)
        with replaced(model, IN_DECODERS):
            assert "forward" in vars(rotary)
            torch.testing.assert_close(rotary(x, given), expected)


def test_lightning_attention_keeps_its_state_in_the_models_own_cache() -> None:
    layers = ["linear_attention", "full_attention", "linear_attention"]
    model = tiny_decoder("MiniMaxForCausalLM", num_hidden_layers=3, layer_types=layers, block_size=4)
    traced = trace(model, task="text-generation-with-past")
    places = ["1.key", "1.value", "0.recurrent", "2.recurrent"]
    assert [slot.place for slot in tensors_of(traced.example_inputs[PAST])] == places
    ids = torch.randint(3, 90, (2, 13), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(ids).logits
        own = model(ids[:, :7], use_cache=True).cache
    torch.testing.assert_close(traced(input_ids=ids).logits, whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(traced(input_ids=ids, cache=DynamicCache()).logits, whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(traced(input_ids=ids[:, 7:], cache=own).logits, whole[:, 7:], atol=1e-5, rtol=1e-5)

    mask = torch.ones_like(ids)
    mask[1, 9:] = 0  # behind the second text, where transformers lets the state decay
    padded = tensors_of(traced(input_ids=ids, attention_mask=mask).cache)
    alone = tensors_of(traced(input_ids=ids[1:, :9]).cache)
    for slot in (slot for slot in padded if slot.kind is KINDS["recurrent"]):
        torch.testing.assert_close(padded[slot][1], alone[slot][0])

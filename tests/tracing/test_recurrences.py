"""Models with a recurrent state call the project's operators while they are traced, and compute the same."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import Tensor

from gralora_fx.tracing.inputs.cache import returned_cache
from gralora_fx.tracing.patches.recognised import replaced
from gralora_fx.tracing.patches.recurrences import CAUSAL_CONV, DELTA_RULE, KIMI_RULE, RECURRENCES
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

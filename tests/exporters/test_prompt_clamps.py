"""Time steps that transformers limits in prompts alone: answers of an export are its own, however rows are read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from gralora_fx import GraloraModel, LoraConfig, rewrite, trace
from gralora_fx.engine.decoder import part_length
from gralora_fx.errors import ServingError
from gralora_fx.exporters import export_onnx
from gralora_fx.serving import load
from gralora_fx.serving.model import OrtModel
from tests.architectures.tiny_decoders import tiny_decoder

TASK, ANSWER = "text-generation-with-past", 12
PROMPTS = [[9], [5, 71], [8, 30, 55, 13, 41, 77, 20]]  # a prompt of one token is one of several, to transformers


@pytest.fixture(scope="module")
def source() -> PreTrainedModel:
    model = tiny_decoder(
        "Mamba2ForCausalLM", num_hidden_layers=2, eos_token_id=None, pad_token_id=0, time_step_limit=(0.05, 0.2)
    )
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("dt_bias"):  # time steps from below the limits to above them
                parameter.copy_(torch.linspace(-5, 1, parameter.numel()))
    return model


@pytest.fixture(scope="module")
def served(source: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> OrtModel:
    directory = tmp_path_factory.mktemp("clamps") / "export"
    traced = trace(source, task=TASK)
    rewritten = rewrite(traced, LoraConfig(r=2, target_modules=["in_proj"]))  # adds zeros
    assert [stepped(rewritten, prompt) for prompt in PROMPTS] == [answer(source, prompt) for prompt in PROMPTS]
    export_onnx(traced, directory)
    return load(directory, threads=1)


def stepped(model: GraloraModel, prompt: list[int]) -> list[int]:
    tokens, read, cache = list(prompt), 0, None
    while len(tokens) < len(prompt) + ANSWER:
        with torch.no_grad():
            outputs = model(input_ids=torch.tensor([tokens[read:]]), past_key_values=cache)
        read, cache = len(tokens), outputs["past_key_values"]
        tokens.append(int(outputs["logits"][0, -1].argmax()))
    return tokens[len(prompt) :]


def answer(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    result = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER, do_sample=False)
    return result[0, len(prompt) :].tolist()


@pytest.mark.quick
def test_answers_are_transformers(source: PreTrainedModel, served: OrtModel) -> None:
    expected = [answer(source, prompt) for prompt in PROMPTS]
    assert served.generate(PROMPTS, max_new_tokens=ANSWER) == expected
    assert [served.generate(prompt, max_new_tokens=ANSWER) for prompt in PROMPTS] == expected


def test_a_prompt_in_pieces_is_the_prompt_and_a_token_by_itself_is_of_an_answer(served: OrtModel) -> None:
    decoder = served.decoder(rows=3, chunk=8)
    whole, in_pieces, singly = (decoder.open() for _ in range(3))
    prompt = PROMPTS[2]
    expected = decoder.step({whole: prompt})[whole]
    decoder.step({in_pieces: prompt[:1], singly: prompt[:1]})
    decoder.step({in_pieces: prompt[1:4]})
    for token in prompt[1:-1]:
        decoder.step({singly: [token]})
    found = decoder.step({in_pieces: prompt[4:], singly: prompt[-1:]})
    np.testing.assert_allclose(found[in_pieces], expected, atol=1e-5)
    assert np.abs(found[singly] - expected).max() > 1e-3


def test_steps_that_would_read_a_prompt_as_an_answer_are_refused(served: OrtModel) -> None:
    assert served.decoder(chunk=8).chosen == 1
    with pytest.raises(ServingError, match=r"chunk=2 would have a token of a prompt read by itself.*at least 3"):
        served.decoder(chunk=2)


def test_the_next_turn_of_a_chat_reads_the_answer_again(served: OrtModel) -> None:
    """As a part of its prompt, whose numbers are others; the prompt before is taken over."""
    decoder, text, read = served.decoder(rows=1, chunk=8, capacity=64, prefix_cache=2**24), list(PROMPTS[2]), 0
    for _ in range(3):
        row = decoder.open()
        found = at = decoder.fill(row, text)
        assert found == read
        while at < len(text):
            count = part_length(len(text) - at, 8)
            logits, at = decoder.step({row: text[at : at + count]})[row], at + count
        read = len(text)
        expected = served.generate(text, max_new_tokens=ANSWER)
        for token in expected:
            assert int(logits.argmax()) == token
            logits = decoder.step({row: [token]})[row]
        decoder.close(row)
        text += [*expected, 9]

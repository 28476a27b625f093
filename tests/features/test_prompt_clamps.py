"""Time steps that transformers limits in prompts alone: answers of an export are its own, however rows are read."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from gralora_fx import GraloraModel, LoraConfig, TracedModel, rewrite, trace
from gralora_fx.errors import ServingError
from gralora_fx.exporters import export_onnx, verify_onnx
from gralora_fx.exporters.verify.cases import PromptBatch, pad_prompts
from gralora_fx.exporters.verify.greedy_tokens import ModelSteps, Step, compare_greedy
from gralora_fx.exporters.verify.tolerances import ToleranceCheck
from gralora_fx.exporters.verify_report import TokenCheck
from gralora_fx.run.engine.limits import part_length
from gralora_fx.run.model import OrtModel
from gralora_fx.serving import load
from tests.architectures.tiny_decoders import tiny_decoder

TASK, ANSWER = "text-generation-with-past", 12
PROMPTS = [[9], [5, 71], [8, 30, 55, 13, 41, 77, 20]]  # a prompt of one token is one of several, to transformers


def limited(least: float, largest: float) -> PreTrainedModel:
    options = {"num_hidden_layers": 2, "eos_token_id": None, "pad_token_id": 0}
    return with_time_steps(tiny_decoder("Mamba2ForCausalLM", **options, time_step_limit=(least, largest)))


def with_time_steps(model: PreTrainedModel) -> PreTrainedModel:
    """Give a model time steps from below its limits to above them."""
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("dt_bias"):
                parameter.copy_(torch.linspace(-5, 1, parameter.numel()))
    return model


@pytest.fixture(scope="module")
def source() -> PreTrainedModel:
    return limited(0.05, 0.2)


@pytest.fixture(scope="module")
def traced(source: PreTrainedModel) -> TracedModel:
    return trace(source, task=TASK)


@pytest.fixture(scope="module")
def export(source: PreTrainedModel, traced: TracedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("clamps") / "export"
    rewritten = rewrite(traced, LoraConfig(r=2, target_modules=["in_proj"]))  # adds zeros
    assert [stepped(rewritten, prompt) for prompt in PROMPTS] == [answer(source, prompt) for prompt in PROMPTS]
    export_onnx(traced, directory)
    return directory


@pytest.fixture(scope="module")
def served(export: Path) -> OrtModel:
    return load(export, threads=1)


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


@pytest.mark.parametrize("name", ["NemotronHForCausalLM", "Zamba2ForCausalLM"])
def test_an_export_is_the_model_call_by_call_where_the_model_is_not_its_text_at_once(name: str, tmp_path: Path) -> None:
    model = with_time_steps(tiny_decoder(name, time_step_min=0.05))
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("in_proj.weight"):  # so that states count
                parameter.mul_(4)
    ids, cache = torch.randint(3, 90, (1, 10), generator=torch.Generator().manual_seed(1)), None
    parts = [ids[:, first:last] for first, last in ((0, 4), (4, 7), (7, 8), (8, 9), (9, 10))]
    with torch.no_grad():
        at_once, expected = model(input_ids=ids).logits[0, -1], []
        for part in parts:
            outputs = model(input_ids=part, cache=cache, use_cache=True)
            cache = outputs.cache
            expected.append(outputs.logits[0, -1])
    export_onnx(trace(model, task=TASK), tmp_path / "export", verify=False)
    decoder = load(tmp_path / "export", threads=1).decoder(rows=1, chunk=8)
    row = decoder.open()
    found = [torch.from_numpy(decoder.step({row: part[0].tolist()})[row]) for part in parts]
    assert float((expected[-1] - at_once).abs().max()) > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


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


def test_rows_are_verified_without_a_token_of_a_prompt_by_itself(export: Path, traced: TracedModel) -> None:
    """The third row reads its prompt in two pieces, of which two tokens would be read one by one."""
    report = verify_onnx(export, traced, "quick", prompts=[PROMPTS[2], PROMPTS[2], PROMPTS[1]])
    assert report.passed


def judged(model: TracedModel, error: float, tolerance: float) -> TokenCheck:
    """Verify steps after a prompt whose logits are off by a number; return the verdict."""

    def begin(_: PromptBatch) -> Step:
        own = ModelSteps(model, 1)
        return lambda ids, mask: own(ids, mask) + (0.0 if ids.shape[1] > 1 else error)

    check = ToleranceCheck(model, tolerance, use_float64=True)
    (tokens,) = compare_greedy({"": begin}, model, [pad_prompts([[5, 9, 12, 44, 20]], steps=3)], check)
    assert all(found.difference > tolerance for found in check.exceeded)
    assert check.exceeded
    return tokens


def test_what_a_text_at_once_gives_does_not_excuse_a_wrong_step() -> None:
    model = trace(limited(5e-3, math.inf), task=TASK).eval()
    ids, longer = torch.tensor([[5, 9, 12, 44, 20]]), torch.ones(1, 6, dtype=torch.int64)
    own = ModelSteps(model, 1)
    token = own(ids, torch.ones_like(ids))[:, -1].argmax(-1, keepdim=True)
    at_once = ModelSteps(model, 1)(torch.cat([ids, token], dim=1), longer)[:, -1]
    assert 5e-3 < float((own(token, longer)[:, -1] - at_once).abs().max()) < 5e-2
    assert not judged(model, error=5e-3, tolerance=1e-4).passed


def test_what_a_text_at_once_gives_is_not_asked_of_a_step(traced: TracedModel) -> None:
    """Both are a tenth apart, so that rounding would explain nothing if it were measured so."""
    assert judged(traced.eval(), error=1e-7, tolerance=1e-8).passed

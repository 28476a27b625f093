"""Scaled rotary embeddings: tokens are those of transformers' generation, for texts on both sides of every switch."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from made_once import made_once
from tiny_models import tiny_model

from gralora_fx import trace
from gralora_fx.errors import ServingError
from gralora_fx.exporters import export_onnx
from gralora_fx.run import open_export
from gralora_fx.run.engine.decoder import Decoder
from gralora_fx.run.engine.limits import DecoderSize, part_length
from gralora_fx.run.engine.sequential_decoder import SequentialDecoder
from gralora_fx.run.model import OrtModel
from gralora_fx.serving import load

SWITCH, CONTEXT, ANSWER = 24, 160, 8
LENGTHS = (10, 20, SWITCH - 1, SWITCH, SWITCH + 1, 100)  # a text that stays short, texts that grow long, long texts
_FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"factor": 4.0},
    "longrope": {**_FACTORS, "factor": 4.0},
    "dynamic": {"factor": 2.0},
}
SWITCHED = [("llama", "longrope"), ("phi3", "longrope")]  # goes on with its cache; computes it anew
CASES = [
    ("phi3", "longrope"),
    ("llama", "linear"),
    ("llama", "longrope"),
    ("llama", "llama3"),
    ("llama", "dynamic"),
    ("llama", "yarn"),
]


@cache
def model_of(family: str, scaling: str) -> Any:
    rope = {"rope_type": scaling, "rope_theta": 10000.0, **SCALINGS[scaling]}
    rope |= {"original_max_position_embeddings": SWITCH} if scaling not in ("linear", "dynamic") else {}
    sizes: dict[str, Any] = {"num_hidden_layers": 1, "initializer_range": 0.3, "eos_token_id": None, "bos_token_id": 1}
    if family == "phi3":
        sizes["original_max_position_embeddings"] = SWITCH
    return tiny_model(family, max_position_embeddings=CONTEXT, rope_parameters=rope, **sizes)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 100, (length,), generator=generator).tolist() for length in LENGTHS]


@cache
def expected(family: str, scaling: str) -> list[list[int]]:
    """Return transformers' answers, each prompt alone."""
    answers = []
    for prompt in prompts():
        ids = torch.tensor([prompt])
        made = model_of(family, scaling).generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER, do_sample=False
        )
        answers.append(made[0, len(prompt) :].tolist())
    return answers


def exported(family: str, scaling: str) -> OrtModel:
    def export(folder: Path) -> None:
        traced = trace(model_of(family, scaling), task="text-generation-with-past")
        export_onnx(traced, folder / "onnx", verify=(family, scaling) in SWITCHED)

    return load(made_once(f"scaled-{family}-{scaling}", export) / "onnx")


def read(decoder: Decoder, row: int, prompt: list[int]) -> list[int]:
    """Let a row read a prompt in chunks, as the service does, and answer."""
    left, answer = prompt[decoder.fill(row, prompt) :], []
    while len(answer) < ANSWER:
        part = left[: part_length(len(left), decoder.chunk)]
        logits, left = decoder.step({row: part})[row], left[len(part) :]
        if not left:
            answer.append(int(logits.argmax()))
            left = answer[-1:]
    return answer


@pytest.mark.parametrize(("family", "scaling"), CASES)
def test_rows_beside_each_other_answer_as_transformers_does_each_alone(family: str, scaling: str) -> None:
    model = exported(family, scaling)
    assert model.generate(prompts(), max_new_tokens=ANSWER) == expected(family, scaling)
    assert [model.generate([prompt], max_new_tokens=ANSWER)[0] for prompt in prompts()] == expected(family, scaling)


@pytest.mark.parametrize(("family", "scaling"), SWITCHED)
def test_a_prompt_read_in_chunks_is_a_long_text_from_its_first_chunk_on(family: str, scaling: str) -> None:
    model = exported(family, scaling)
    size = DecoderSize(2, CONTEXT, chunk=7, prefix_cache=1 << 20)
    decoders = [model.generation.open_decoder(size)]
    session, adapters = model.session, model.adapters
    limits = model.generation.limits
    decoders.append(SequentialDecoder(session, adapters, limits, DecoderSize(2, CONTEXT, chunk=7), takes_buffers=True))
    for decoder in decoders:
        for _ in range(2):  # the second time from the prefix cache
            for prompt, answer in zip(prompts(), expected(family, scaling), strict=True):
                row = decoder.open()
                assert read(decoder, row, prompt) == answer
                decoder.close(row)


@pytest.mark.parametrize(("family", "scaling"), SWITCHED)
def test_texts_share_beginnings_only_with_texts_of_their_kind(family: str, scaling: str) -> None:
    """The keys of a long text's beginning are not those of the same beginning of a short one."""
    long = prompts()[-1]
    short = long[:20]
    ids = torch.tensor([short])
    made = model_of(family, scaling).generate(input_ids=ids, max_new_tokens=ANSWER, do_sample=False)
    size = DecoderSize(1, CONTEXT, chunk=16, prefix_cache=1 << 20)
    decoder = exported(family, scaling).generation.open_decoder(size)
    for prompt, answer in 2 * [(long, expected(family, scaling)[-1]), (short, made[0, len(short) :].tolist())]:
        row = decoder.open()
        assert read(decoder, row, prompt) == answer
        decoder.close(row)
    assert decoder.prefix_cache is not None
    row = decoder.open()
    assert decoder.fill(row, long) > 64  # long texts share with each other


def test_a_text_that_cannot_be_read_again_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, answer = prompts()[3], expected("phi3", "longrope")[3]
    decoder = exported("phi3", "longrope").generation.open_decoder(DecoderSize(1, CONTEXT, chunk=8))
    row = decoder.open()
    decoder.expect(row, len(prompt))
    for start in range(0, len(prompt), 8):
        logits = decoder.step({row: prompt[start : start + 8]})[row]
    run, runs = decoder._run, []

    def failing(*arguments: Any) -> Any:
        runs.append(arguments)
        if len(runs) == 2:
            raise ServingError("no memory")
        return run(*arguments)

    monkeypatch.setattr(decoder, "_run", failing)
    with pytest.raises(ServingError, match="no memory"):
        decoder.step({row: [answer[0]]})
    assert decoder.length(row) == len(prompt)
    tokens = [int(logits.argmax())]
    while len(tokens) < ANSWER:
        tokens.append(int(decoder.step({row: tokens[-1:]})[row].argmax()))
    assert tokens == answer


def test_a_text_beyond_what_dynamic_scaling_leaves_as_it_is_is_refused() -> None:
    with pytest.raises(ServingError, match=f"more than the context of {CONTEXT}"):
        exported("llama", "dynamic").generate([list(range(3, 90)) * 2], max_new_tokens=ANSWER)


def test_an_export_that_takes_no_lengths_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier version wrote such, whose long prompts were rotated as short texts up to their first chunk's end."""
    monkeypatch.setattr(open_export, "text_switch", lambda session: None)
    with pytest.raises(ServingError, match=r"depends \(longrope\): a prompt read in chunks would be wrong; export"):
        exported("llama", "longrope").generate([[3, 4, 5]], max_new_tokens=1)
    assert exported("llama", "yarn").generate([[3, 4, 5]], max_new_tokens=1)

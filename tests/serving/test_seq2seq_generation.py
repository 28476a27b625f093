"""`generate` of encoder-decoders that read texts, with transformers' `generate` as the oracle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import WIDE
from tiny_tokenizers import tiny_tokenizer
from traces import fresh
from transformers import PreTrainedModel

from gralora_fx import GraloraConfig, LoraConfig, rewrite
from gralora_fx.errors import ServingError
from gralora_fx.exporters import export_onnx
from gralora_fx.run.model import OrtModel
from gralora_fx.serving import load

pytestmark = pytest.mark.filterwarnings("ignore:layerdrop is not part of a trace:UserWarning")  # of training alone
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
TEXT = "text2text-generation-with-past"
SOURCES = ("a short one", "b", "and this is a longer text")


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> tuple[OrtModel, PreTrainedModel]:
    path = tmp_path_factory.mktemp("bart") / "onnx"
    model, traced = fresh("bart", task=TEXT, **SPECIAL, **WIDE["bart"])
    rules = {"forced_bos_token_id": 7, "no_repeat_ngram_size": 2, "max_length": 12, "forced_eos_token_id": 2}
    for name, value in rules.items():
        setattr(model.generation_config, name, value)
        setattr(traced.generation_config, name, value)
    export_onnx(traced, path, tokenizer=tiny_tokenizer(), verify=False)
    return load(path), model


def new_tokens(model: PreTrainedModel, text: str, **options: Any) -> list[int]:
    """Return the tokens that transformers adds, without the start token and what follows the end token."""
    inputs = tiny_tokenizer()(text, return_tensors="pt", return_token_type_ids=False)
    tokens: list[int] = model.generate(**inputs, num_beams=1, **options)[0].tolist()[1:]
    return tokens[: tokens.index(2)] if 2 in tokens else tokens


@pytest.mark.quick
def test_texts_are_answered_as_transformers_answers_them(bart: tuple[OrtModel, PreTrainedModel]) -> None:
    model, source = bart
    expected = [new_tokens(source, text) for text in SOURCES]
    assert model.generate(SOURCES[0]) == tiny_tokenizer().decode(expected[0], skip_special_tokens=True)
    assert model.generate([tiny_tokenizer()(text)["input_ids"] for text in SOURCES]) == expected
    assert len({tuple(tokens) for tokens in expected}) == 3


def test_a_tokenizers_result_and_its_padding_are_taken(bart: tuple[OrtModel, PreTrainedModel]) -> None:
    model, source = bart
    batch = tiny_tokenizer()(list(SOURCES), padding=True, return_tensors="pt", return_token_type_ids=False)
    expected = [new_tokens(source, text, max_new_tokens=5) for text in SOURCES]
    assert model.generate(**batch, max_new_tokens=5) == expected


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"max_new_tokens": 7}, {"max_new_tokens": 7}),
        ({"max_new_tokens": 30, "min_new_tokens": 20}, {"max_new_tokens": 30, "min_new_tokens": 20}),
        ({"forced_bos_token_id": 30}, {"forced_bos_token_id": 30}),
        ({"repetition_penalty": 1.7}, {"repetition_penalty": 1.7}),
        ({"eos_token_id": [40, 41, 42]}, {"eos_token_id": [40, 41, 42]}),
        ({"do_sample": True, "seed": 3, "top_k": 1}, {}),  # of one token, by the model's rules
        ({"do_sample": True, "seed": 3, "temperature": 1e-6}, {}),
    ],
)
def test_options_are_transformers_own(bart: tuple[OrtModel, PreTrainedModel], ours: Any, theirs: Any) -> None:
    model, source = bart
    inputs = tiny_tokenizer()(SOURCES[2], return_tensors="pt", return_token_type_ids=False)
    tokens = source.generate(**inputs, num_beams=1, **theirs)[0].tolist()[1:]
    ends = set(ours.get("eos_token_id", [2]))
    cut = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
    assert model.generate(inputs["input_ids"][0], **ours) == tokens[:cut]


def test_streams_stops_and_scores_are_those_of_decoders(bart: tuple[OrtModel, PreTrainedModel]) -> None:
    model, source = bart
    whole = model.generate(SOURCES[0])
    assert "".join(model.generate(SOURCES[0], stream=True)) == whole
    stop = whole[3:5]
    assert model.generate(SOURCES[0], stop=stop) == whole[: whole.index(stop)]
    scored = model.generate(SOURCES[0], logprobs=2)
    assert scored.content == whole
    ids = tiny_tokenizer()(SOURCES[0])["input_ids"]
    with torch.no_grad():
        logits = source(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([[1]])).logits[0, -1]
    first = scored.scores[0]
    assert first.token == 7
    assert abs(first.logprob - float(logits.log_softmax(-1)[7])) < 1e-3  # the model's own, before it was forced


@pytest.mark.parametrize("mode", ["data", "inputs"])
@pytest.mark.parametrize(
    "config",
    [
        GraloraConfig(r=4, gralora_k=2, alpha=16, init_weights=False),
        LoraConfig(r=4, lora_alpha=16, init_lora_weights=False),
    ],
)
def test_prompts_with_an_adapter_each(tmp_path: Path, mode: str, config: Any) -> None:
    source, traced = fresh("t5", task=TEXT, num_layers=1, **SPECIAL, **WIDE["t5"])
    adapted = rewrite(traced, config, adapter_name="tuned")
    export_onnx(adapted, tmp_path / "onnx", adapters=mode, tokenizer=tiny_tokenizer(), verify=False)
    model = load(tmp_path / "onnx")
    ids = tiny_tokenizer()(SOURCES[0])["input_ids"]
    base = source.generate(torch.tensor([ids]), max_new_tokens=8, num_beams=1)[0].tolist()[1:]
    merged = greedy(adapted, ids, 8)
    found = model.generate([ids, ids], adapter=[None, "tuned"], max_new_tokens=8)
    assert found == [until_end(base), until_end(merged)]
    assert found[0] != found[1]
    assert model.generate(ids, adapter="tuned", max_new_tokens=8) == found[1]
    model.load_adapter("again", tmp_path / "onnx" / "adapters" / "tuned.onnx_adapter")
    assert model.generate(ids, adapter="again", max_new_tokens=8) == found[1]
    with pytest.raises(ServingError, match="no adapter 'none'"):
        model.generate(ids, adapter="none")


def greedy(model: Callable[..., Any], ids: list[int], count: int) -> list[int]:
    tokens = [1]
    for _ in range(count):
        with torch.no_grad():
            logits = model(
                input_ids=torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                decoder_input_ids=torch.tensor([tokens]),
            ).logits
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[1:]


def until_end(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(2)] if 2 in tokens else tokens


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ([3] * 65, {}, "the source has 65 tokens, more than the encoder's 64 positions"),
        ([], {}, "the source is empty|there is no prompt"),
        ([[]], {}, "the source is empty"),
        ("", {}, "the source is empty; give a text"),
        (["a", " \n"], {}, "the source is empty; give a text"),
        ([3, 101], {}, "the source holds token 101, outside the vocabulary of 101"),
        ([3, -1], {}, "the source holds token -1"),
        (np.zeros(20, np.float32), {}, "the model reads text, not sound"),
        ({"array": [0.5], "sampling_rate": 16_000}, {}, "the model reads text, not sound"),
        ([3], {"language": "de"}, "language has no effect: the model reads text"),
        ([3], {"task": "translate"}, "task has no effect: the model reads text"),
        (None, {"input_features": np.zeros((1, 8, 40))}, "input_features has no effect: the model reads text"),
        ([3], {"forced_bos_token_id": 101}, "forced_bos_token_id=101 is outside the vocabulary of 101"),
        ([3], {"forced_bos_token_id": "de"}, "forced_bos_token_id must be the id of a token, but got 'de'"),
        ([3], {"max_new_tokens": 64}, "more than the context of 64; give max_new_tokens=63 or less"),
        ([3], {"num_beams": 2}, "unknown option num_beams"),
        ([3], {"adapter": "x"}, "takes no adapters|adapters"),
        ([{"role": "user", "content": "a"}], {}, "no chat template"),
    ],
)
def test_what_a_model_of_text_does_not_take_is_said(
    bart: tuple[OrtModel, PreTrainedModel], given: Any, options: Any, message: str
) -> None:
    with pytest.raises(ServingError, match=message):
        bart[0].generate(given, **options)


def test_a_decoder_has_no_source(tmp_path: Path) -> None:
    export_onnx(fresh("llama", task="text-generation-with-past")[1], tmp_path / "onnx", verify=False)
    model = load(tmp_path / "onnx")
    for options in ({"language": "de"}, {"input_features": [[0.5]]}, {"forced_bos_token_id": 3}):
        with pytest.raises(ServingError, match="has no effect: the model is a decoder"):
            model.generate([5, 6], **options)

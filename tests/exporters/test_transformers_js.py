"""Exports in transformers.js: the directory as it is, in Node, gives the tokens of the PyTorch model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from javascript_project import installed_project, needs_node, run_script
from tiny_models import WIDE, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gralora_fx import GraloraConfig, merge, rewrite, trace
from gralora_fx.exporters import export_onnx

TEXTS = ["w5 w9 w12 w40 w3", "w7 w31", "w60 w61 w62 w63"]
# what is new in an encoder-decoder is how its two graphs work together: a layer of each shows it
ONE_LAYER = {
    "t5": {"num_layers": 1},
    "bart": {"encoder_layers": 1, "decoder_layers": 1},
    "whisper": {"encoder_layers": 1, "decoder_layers": 1},
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
pytestmark = needs_node


def tokenizer(padding_side: str) -> PreTrainedTokenizerFast:
    """Words of a vocabulary of 101, one token each."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(97))]
    words_alone = models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    backend = Tokenizer(words_alone)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side=padding_side, **names)


@pytest.fixture(scope="module")
def project() -> Path:
    """Return the Node project with its packages."""
    return installed_project()


def generated(project: Path, model: Path, class_name: str, **request: Any) -> list[list[int]]:
    """Generate with transformers.js; return the tokens, prompts included."""
    text = json.dumps({"model": str(model), "class": class_name, **request})
    tokens: list[list[int]] = run_script(project, "generate.mjs", text)
    return tokens


def batch(texts: Sequence[str], side: str) -> dict[str, torch.Tensor]:
    encoded = tokenizer(side)(list(texts), return_tensors="pt", padding=True)
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_decoder_runs_unchanged(name: str, project: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = tiny_model(name, **SPECIAL)
    fields = {"target_modules": "all-linear", "fan_in_fan_out": name == "gpt2"}
    model = rewrite(trace(source, task="text-generation-with-past"), GraloraConfig(r=4, init_weights=False, **fields))
    export_onnx(model, tmp_path / "model", tokenizer=tokenizer("left"))
    merge_into(source, model)
    expected = source.generate(**batch(TEXTS, "left"), max_new_tokens=12, do_sample=False, eos_token_id=None)
    options = {"max_new_tokens": 12, "eos_token_id": None}
    tokens = generated(project, tmp_path / "model", "AutoModelForCausalLM", texts=TEXTS, options=options)
    assert tokens == expected.tolist()


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_an_encoder_decoder_runs_unchanged(name: str, project: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    fields = {**SPECIAL, **WIDE[name], **ONE_LAYER[name], "decoder_start_token_id": 1, "forced_eos_token_id": None}
    source = tiny_model(name, **fields)
    task = "automatic-speech-recognition" if name == "whisper" else "text2text-generation"
    config = GraloraConfig(r=4, alpha=4, init_weights=False, target_modules="all-linear")
    model = rewrite(trace(source, task=f"{task}-with-past"), config)
    export_onnx(model, tmp_path / "model", tokenizer=tokenizer("right"))
    merge_into(source, model)
    options: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": None}
    if name == "whisper":
        read: dict[str, Any] = {"input_features": torch.randn(2, 8, 40)}
        request: dict[str, Any] = {"class": "AutoModelForSpeechSeq2Seq", "features": read["input_features"].tolist()}
        options["decoder_input_ids"] = [[1, 7], [1, 7]]
    else:
        read, request = batch(TEXTS, "right"), {"class": "AutoModelForSeq2SeqLM", "texts": TEXTS}
    start = torch.tensor(options.get("decoder_input_ids", [[1]] * len(TEXTS)))
    tokens = source.generate(**read, **{**options, "decoder_input_ids": start}, do_sample=False, num_beams=1)
    answers = generated(project, tmp_path / "model", request.pop("class"), **request, options=options)
    assert [row[-12:] for row in answers] == tokens[:, -12:].tolist()
    assert len(set(tokens[:, -12:].flatten().tolist())) > 1


def merge_into(source: Any, model: Any) -> None:
    """Put the folded weights into the source model, so that transformers itself generates with them."""
    folded = merge(model).tree.parameters
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            parameter.copy_(folded[name])

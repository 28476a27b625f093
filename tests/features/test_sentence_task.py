"""Base models that are sentence encoders, and the settings that their tokenizers take from the directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import tiny_model
from tiny_tokenizers import tiny_tokenizer
from transformers import BertConfig

from gralora_fx.core.loading.bases import inferred_task
from gralora_fx.core.loading.models import load_model
from gralora_fx.errors import CheckpointError, TraceError
from gralora_fx.features.sentences.encoder import settings_of_tokenizer
from gralora_fx.features.sentences.stored_modules import SentenceModules

TASK = "sentence-similarity"


@pytest.fixture
def encoder(tmp_path: Path) -> str:
    (tmp_path / "modules.json").write_text(json.dumps([]))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("task", "is_asked", "expected"),
    [
        (None, False, TASK),
        ("feature-extraction", False, TASK),  # what an adapter's task type says
        (TASK, True, TASK),
        ("feature-extraction", True, "feature-extraction"),
        ("text-classification", False, "text-classification"),
    ],
)
def test_a_directory_with_modules_is_a_sentence_encoder(
    encoder: str, task: str | None, is_asked: bool, expected: str
) -> None:
    arguments = {"sentence_modules": Path(encoder)} if expected == TASK else {}
    assert inferred_task(task, (None, encoder), is_asked=is_asked) == (expected, arguments)


def test_the_adapters_directory_comes_first(encoder: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    found = TASK, {"sentence_modules": Path(encoder)}
    assert inferred_task(None, (encoder, str(other)), is_asked=False) == found
    assert inferred_task(None, (str(other), encoder), is_asked=False) == found
    assert inferred_task(None, (str(other),), is_asked=False) == (None, {})
    assert inferred_task(TASK, (str(other),), is_asked=True) == (TASK, {})


def test_only_the_encoder_of_a_t5_is_loaded(tmp_path: Path) -> None:
    tiny_model("t5").save_pretrained(tmp_path / "t5")
    assert type(load_model(tmp_path / "t5", TASK)).__name__ == "T5EncoderModel"
    tiny_model("bart").save_pretrained(tmp_path / "bart")
    with pytest.raises(TraceError, match="bart is an encoder-decoder, whose encoder transformers does not load alone"):
        load_model(tmp_path / "bart", TASK)


def test_a_pooler_may_be_missing_but_no_other_tensor(tmp_path: Path) -> None:
    tiny_model("roberta").save_pretrained(tmp_path)  # a classifier, which has none
    model = load_model(tmp_path, TASK)
    assert not model.get_parameter("pooler.dense.weight").any()
    with pytest.raises(CheckpointError, match=r"- missing pooler\.dense\.weight"):
        load_model(tmp_path, "feature-extraction")


@pytest.mark.parametrize(
    ("modules", "length"),
    [
        (SentenceModules("", (), max_seq_length=12), 12),
        (SentenceModules("", (), max_seq_length=900), 900),
        (SentenceModules("", ()), 64),
    ],
)
def test_the_length_of_texts_is_the_directorys_or_the_models(modules: SentenceModules, length: int) -> None:
    tokenizer = tiny_tokenizer()
    changed = settings_of_tokenizer(tokenizer, modules, BertConfig(max_position_embeddings=64))
    assert changed.model_max_length == length
    assert tokenizer.model_max_length > 1000  # the given one is as it was


def test_texts_are_lowercased_once() -> None:
    modules = SentenceModules("", (), lowercases=True)
    changed = settings_of_tokenizer(tiny_tokenizer(), modules, None)
    assert changed("Ab")["input_ids"] == tiny_tokenizer()("ab")["input_ids"]
    again = settings_of_tokenizer(changed, modules, None)
    assert repr(again.backend_tokenizer.normalizer).count("Lowercase(") == 1

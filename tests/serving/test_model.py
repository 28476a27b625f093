"""A served model is called like the PyTorch model, and says clearly what it cannot take."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import text_batch, tiny_model

from gralora_fx import GraloraConfig, GraloraModel, rewrite, trace
from gralora_fx.errors import ServingError
from gralora_fx.exporters import export_onnx
from gralora_fx.serving import OrtModel, load


@pytest.fixture(scope="module")
def model() -> GraloraModel:
    config = GraloraConfig(r=8, target_modules=["query"], init_weights=False)
    return rewrite(trace(tiny_model("bert")), config)


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
    for given in (ids.numpy(), ids.numpy().astype(np.int32), ids.tolist()):
        outputs = served(input_ids=given)
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
        (
            {"input_ids": [1, 2]},
            r"'input_ids' has shape \[2\], but the model takes \['batch_size', 'sequence_length'\]",
        ),
        ({"input_ids": [[1.5, 2.0]]}, "'input_ids' is float64, but the model takes int64"),
        ({"input_ids": [[1, 2], [3]]}, "'input_ids' is no array"),
        ({"input_ids": [["a"]]}, "'input_ids' is .*but the model takes int64"),
        (
            {"input_ids": [[1, 2]], "attention_mask": [[1, 1, 1]]},
            "'attention_mask' has sequence_length 3, but 'input_ids' has 2",
        ),
        ({"input_ids": [[100_000]]}, "'input_ids' holds token 100000, outside the vocabulary of 101 tokens"),
        (
            {"input_ids": [[1, 2]], "token_type_ids": [[0, 9]]},
            r"ONNX Runtime refuses input_ids \[1, 2\], token_type_ids \[1, 2\], .*indices element out of data bounds",
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


def test_a_directory_that_is_no_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ServingError, match=r"no gralora_export.json in"):
        load(tmp_path)


def test_a_missing_provider_is_named(served: OrtModel) -> None:
    with pytest.raises(ServingError, match=r"NoSuchProvider is not installed; there are .*CPUExecutionProvider"):
        load(served.directory, providers=["NoSuchProvider"])

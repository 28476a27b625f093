"""Tokens as rows of a matrix, without padding: what is computed, what is zero, and what keeps padding in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from tiny_models import text_batch, tiny_model
from torch import Tensor, nn
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForTokenClassification,
    BertConfig,
    BertModel,
    PreTrainedModel,
)

from gralora_fx import trace
from gralora_fx.exporters import export_onnx
from gralora_fx.exporters.reports import ExportReport

CONFIG = BertConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    vocab_size=101,
    num_labels=3,
    max_position_embeddings=64,
)
TWO_LABELS = BertConfig(**{**CONFIG.to_dict(), "id2label": None, "label2id": None, "num_labels": 2})


def run(directory: Path, inputs: dict[str, Tensor]) -> dict[str, Any]:
    session = onnxruntime.InferenceSession(directory / "model.onnx")
    feed = {value.name: inputs[value.name].numpy() for value in session.get_inputs()}
    return dict(zip((value.name for value in session.get_outputs()), session.run(None, feed), strict=True))


def batch(padding: str = "right") -> dict[str, Tensor]:
    inputs = text_batch(4, 11, padding)
    return {**inputs, "token_type_ids": torch.zeros_like(inputs["input_ids"])}


def skipped(report: ExportReport) -> list[str]:
    return [skip.reason for entry in report.passes if entry.name == "flatten_tokens" for skip in entry.skipped]


TASKS: dict[str, Any] = {
    "feature-extraction": lambda: BertModel(CONFIG, add_pooling_layer=False).eval(),
    "token-classification": lambda: AutoModelForTokenClassification.from_config(CONFIG).eval(),
    "question-answering": lambda: AutoModelForQuestionAnswering.from_config(TWO_LABELS).eval(),
    "fill-mask": lambda: AutoModelForMaskedLM.from_config(CONFIG).eval(),
}


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("task", TASKS)
def test_outputs_are_the_models_and_zero_at_padding(task: str, padding: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: PreTrainedModel = TASKS[task]()
    report = export_onnx(trace(model, task=task), tmp_path / "onnx", verify=False)
    assert skipped(report) == []
    inputs = batch(padding)
    shown = inputs["attention_mask"].bool()
    kept = shown.clone()
    kept[:, 0] = True
    outputs = run(tmp_path / "onnx", inputs)
    assert outputs
    for name, expected in model(**inputs).items():
        actual = torch.from_numpy(outputs[name])
        torch.testing.assert_close(actual[kept], expected[kept], atol=1e-5, rtol=1e-4)
        assert not actual[~kept].any()


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("name", ["bert", "distilbert", "roberta", "albert"])
def test_a_classifier_reads_the_first_position_whatever_the_padding(name: str, padding: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    report = export_onnx(trace(model, task="text-classification"), tmp_path / "onnx", verify=False)
    assert skipped(report) == []
    inputs = {key: value for key, value in batch(padding).items() if key in ("input_ids", "attention_mask")}
    given = batch(padding)
    logits = run(tmp_path / "onnx", given)["logits"]
    np.testing.assert_allclose(logits, model(**inputs).logits.detach().numpy(), atol=1e-5)


def test_batches_of_any_size_and_padding(tmp_path: Path) -> None:
    model = tiny_model("bert")
    export_onnx(trace(model, task="text-classification"), tmp_path / "onnx", verify=False)
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    generator = torch.Generator().manual_seed(0)
    for rows, length in ((1, 1), (1, 64), (7, 3), (2, 1), (5, 33)):
        mask = (torch.rand(rows, length, generator=generator) > 0.4).long()
        mask[:, 0] = 1  # holes within a row too
        ids = torch.randint(0, 101, (rows, length), generator=generator)
        feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
        (actual,) = session.run(["logits"], {name: value.numpy() for name, value in feed.items()})
        np.testing.assert_allclose(actual, model(**feed).logits.detach().numpy(), atol=1e-5)


def test_padding_can_be_kept(tmp_path: Path) -> None:
    model = BertModel(CONFIG, add_pooling_layer=False).eval()
    export_onnx(trace(model, task="feature-extraction"), tmp_path / "onnx", keep_padding=True)
    inputs = batch()
    actual = run(tmp_path / "onnx", inputs)["last_hidden_state"]
    np.testing.assert_allclose(actual, model(**inputs).last_hidden_state.detach().numpy(), atol=1e-5)


class Pooled(nn.Module):
    """Reads all positions, padding or not."""

    def __init__(self, pooling: str) -> None:
        super().__init__()
        self.bert, self.pooling = BertModel(CONFIG, add_pooling_layer=False), pooling
        self.score = nn.Linear(CONFIG.hidden_size, 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self.pooling == "largest":
            return states.amax(1)  # type: ignore[no-any-return]
        if self.pooling == "scored":
            return self.score(states).squeeze(-1).softmax(1)  # type: ignore[no-any-return]
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        return (states * mask).sum(1) / mask.sum(1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("pooling", ["largest", "scored", "masked mean"])
def test_a_reader_of_all_positions_keeps_padding_in_unless_it_masks_it(pooling: str, tmp_path: Path) -> None:
    model = Pooled(pooling).eval()
    inputs = text_batch(4, 11)
    traced = trace(model, {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]})
    report = export_onnx(traced, tmp_path / "onnx")
    assert bool(skipped(report)) is (pooling != "masked mean")
    (actual,) = run(tmp_path / "onnx", inputs).values()
    np.testing.assert_allclose(actual, model(**inputs).detach().numpy(), atol=1e-5)

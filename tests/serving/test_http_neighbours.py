"""Answers of a service depend on no text beside them, whatever its model makes of padding."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from served_exports import chat_tokenizer
from starlette.testclient import TestClient

from gralora_fx import trace
from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.exporters import export_onnx
from gralora_fx.service.app import create_app
from tests.architectures.newer_torch import skip_if_torch_is_too_old
from tests.architectures.tiny_encoders import tiny_encoder

TEXTS = ["a", "some more words that are longer than a window", "two words", "b", "nine words", "six"]
# class: what its tokenizer is like, and whether texts of unequal length can run together
KINDS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "a window": ("ModernBertForSequenceClassification", {}, True),
    "distances in buckets": ("MPNetForSequenceClassification", {}, True),
    "landmarks of all positions": ("NystromformerForSequenceClassification", {}, False),
    "the first position, padded on the left": ("BertForSequenceClassification", {"padding_side": "left"}, False),
    "no token for padding": ("BertForSequenceClassification", {"pad_token": None}, False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_classes_of_texts_together_are_those_of_each_alone(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    name, fields, runs_together = KINDS[kind]
    skip_if_torch_is_too_old(name)
    model, tokenizer = tiny_encoder(name, num_labels=3, vocab_size=101), chat_tokenizer()
    for field, value in fields.items():
        setattr(tokenizer, field, value)
        tokenizer.init_kwargs[field] = value  # which alone is saved
    export_onnx(trace(model, task="text-classification"), tmp_path / "onnx", tokenizer=tokenizer, verify=False)
    with caplog.at_level(logging.WARNING), TestClient(create_app(ServiceSettings(tmp_path / "onnx"))) as client:

        def classes(texts: Any) -> list[list[float]]:
            found = client.post("/classify", json={"input": texts}).raise_for_status().json()
            return [row["probs"] for row in found["data"]]

        together, alone = classes(TEXTS), [classes(text)[0] for text in TEXTS]
    assert np.abs(np.array(together) - np.array(alone)).max() <= 1e-5
    for text, probs in zip(TEXTS, together, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        assert np.abs(logits.softmax(-1).numpy() - probs).max() <= 1e-4
    assert ("only texts of one length run together" in caplog.text) is not runs_together
    assert ("has no token for padding" in caplog.text) is (kind == "no token for padding")
    assert ("padding changes what" in caplog.text) is (not runs_together and kind != "no token for padding")

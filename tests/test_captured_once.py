"""Captures that tests share: each model gets its own tensors, and one that was changed gets its own capture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from captured_once import key_of, once
from tiny_models import text_batch, tiny_model
from torch import nn

from gralora_fx import trace
from gralora_fx.core.tracing import capture
from gralora_fx.core.tracing.draft import Captured, Draft

pytestmark = pytest.mark.quick


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Return a list that gets the models that are captured, in order."""
    original, made = capture.capture, list[nn.Module]()

    def noted(draft: Draft) -> Captured:
        made.append(draft.model)
        return original(draft)

    monkeypatch.setattr(capture, "capture", once(noted))
    return made


@pytest.mark.parametrize("name", ["bert", "gpt2", "gemma3"])
def test_models_that_are_alike_share_a_capture_and_no_tensor(name: str, captures: list[nn.Module]) -> None:
    models = [tiny_model(name), tiny_model(name, 5)]
    traces = [trace(model) for model in models]
    assert captures == models[:1]
    inputs = text_batch(3, 7)
    for model, traced in zip(models, traces, strict=True):
        assert {id(p) for p in traced.graph_module.parameters()} <= {id(p) for p in model.parameters()}
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(1.5)
            torch.testing.assert_close(traced(**inputs).logits, model(**inputs).logits)
    assert traces[0].signature == traces[1].signature
    assert [node.name for node in traces[0].graph_module.graph.nodes] == [
        node.name for node in traces[1].graph_module.graph.nodes
    ]


class Stop(Exception):
    """Raised in place of a capture."""


def test_whatever_differs_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[str | None] = []

    def noted(draft: Draft) -> Captured:
        keys.append(key_of(draft))
        raise Stop

    def changed(index: int) -> nn.Module:
        model = tiny_model("bert")
        if index == 1:
            model.bert.embeddings.dropout.p = 0.5
        elif index == 2:
            model.classifier.register_forward_hook(lambda module, args, output: output * 2)
        elif index == 3:
            model.config.hidden_act = "relu"
        elif index == 4:
            model.bert.pooler.dense.weight.requires_grad = False
        return model

    monkeypatch.setattr(capture, "capture", noted)
    for index in range(6):
        with pytest.raises(Stop):
            trace(changed(index))
    *differing, same = keys
    assert keys[2] is None  # which may do anything
    assert len(set(differing)) == 5
    assert same == keys[0]


def test_a_model_is_the_same_wherever_it_was_saved(captures: list[nn.Module], tmp_path: Path) -> None:
    model = tiny_model("bert")
    for name in ("a", "b"):
        model.save_pretrained(tmp_path / name)
    loaded = [type(model).from_pretrained(tmp_path / name) for name in ("a", "b")]
    graphs = [trace(each).graph_module for each in loaded]
    assert captures == loaded[:1]
    assert {id(p) for p in graphs[1].parameters()} <= {id(p) for p in loaded[1].parameters()}

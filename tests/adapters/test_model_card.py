"""The card beside saved adapters has the metadata of PEFT's."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from tiny_models import tiny_model
from torch import nn
from traces import fresh_trace
from transformers import Trainer, TrainingArguments

import gralora_fx.peft as ours
from gralora_fx import GraloraConfig, rewrite, trace

TARGETS = ["q_proj"]


def card_of(directory: Path) -> ModelCard:
    return ModelCard.load(directory / "README.md")


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_its_metadata_are_pefts(task: str | None, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    data = []
    for package in (peft, ours):
        base = type(tiny_model("llama")).from_pretrained(tmp_path / "base")
        model = package.get_peft_model(base, package.LoraConfig(r=4, target_modules=TARGETS, task_type=task))
        model.save_pretrained(str(tmp_path / package.__name__))
        data.append(card_of(tmp_path / package.__name__).data.to_dict())
    assert data[0] == data[1]
    assert data[1]["library_name"] == "peft"


def test_a_rewritten_module_has_one_too_and_trainer_adds_to_it(tmp_path: Path) -> None:
    model = rewrite(fresh_trace("llama", num_hidden_layers=1), GraloraConfig(r=4, target_modules=TARGETS))
    model.add_model_tags("mine")
    trainer = Trainer(model=model, args=TrainingArguments(str(tmp_path), report_to=[]))
    trainer.save_model()
    assert {"gralora", "mine", "transformers"} <= set(card_of(tmp_path).data.tags or ())
    trainer.create_model_card()
    assert card_of(tmp_path).data.library_name == "peft"
    plain = rewrite(trace(nn.Sequential(nn.Linear(4, 4)), (torch.randn(2, 4),)), GraloraConfig(target_modules=["0"]))
    plain.save_pretrained(tmp_path / "plain")
    assert card_of(tmp_path / "plain").data.to_dict() == {"library_name": "peft", "tags": ["gralora"]}


def test_the_text_of_a_card_stays_and_one_that_cannot_be_read_too(tmp_path: Path) -> None:
    model = rewrite(trace(nn.Sequential(nn.Linear(4, 4)), (torch.randn(2, 4),)), GraloraConfig(target_modules=["0"]))
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags: [a]\n---\nMy own words.\n")
    model.save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert card.text.strip() == "My own words."
    assert card.data.to_dict() == {"license": "mit", "library_name": "peft", "tags": ["a", "gralora"]}
    (tmp_path / "README.md").write_text("---\ntags: [a\n---\nMy own words.\n")
    with pytest.warns(UserWarning, match=r"the adapter is saved, and its card .*README.md is left as it was"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text().startswith("---\ntags: [a\n")

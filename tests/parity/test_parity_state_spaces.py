"""PEFT's adapters on decoders with state space layers: the logits of a rewritten model are PEFT's."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
from peft_oracle import peft_model
from torch import nn
from transformers import PreTrainedModel

from gralora_fx import GraloraModel, TracedModel, merge, trace
from gralora_fx.errors import MergeError
from tests.architectures.tiny_decoders import tiny_decoder

CLASSES = ("MambaForCausalLM", "Mamba2ForCausalLM", "BambaForCausalLM")
REFUSED = {"out_proj", "lm_head"}  # by PEFT's LoRA, of some


@cache
def model_and_trace(name: str) -> tuple[PreTrainedModel, TracedModel]:
    model = tiny_decoder(name)
    return model, trace(copy.deepcopy(model), task="text-generation-with-past")


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("GRALORA", {"gralora_k": 2, "target_modules": "all-linear"}),
        ("LORA", {"lora_alpha": 8}),
    ],
    ids=["GraLoRA", "LoRA"],
)
def test_logits_with_an_adapter_are_pefts(name: str, method: str, fields: dict, tmp_path: Path) -> None:
    model, traced = model_and_trace(name)
    linear = {path.rpartition(".")[2] for path, part in model.named_modules() if isinstance(part, nn.Linear)}
    fields = {"target_modules": sorted(linear - REFUSED), **fields}
    wrapped = peft_model(copy.deepcopy(model), method=method, r=4, **fields)
    wrapped.save_pretrained(str(tmp_path))
    ours = GraloraModel.from_pretrained(traced, tmp_path).eval()
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        expected, base = wrapped(**inputs).logits, model(**inputs).logits
        actual = ours(**inputs).logits
    largest = expected.abs().max()
    assert (actual - expected).abs().max() <= 1e-5 * largest
    assert (base - expected).abs().max() > 1e-2 * largest


def test_a_layer_that_is_not_called_takes_the_update_that_training_leaves_it_and_no_other(tmp_path: Path) -> None:
    """Mamba reads the weight of `dt_proj`: an adapter there has no effect and no gradient, until PEFT merges it."""
    model, traced = model_and_trace("MambaForCausalLM")
    wrapped = peft_model(copy.deepcopy(model), method="LORA", r=4, target_modules=["dt_proj", "in_proj"])
    inputs = {"input_ids": torch.arange(3, 12)[None], "attention_mask": torch.ones(1, 9, dtype=torch.long)}
    wrapped.save_pretrained(str(tmp_path / "drawn"))
    with torch.no_grad():
        for path, parameter in wrapped.named_parameters():
            if "dt_proj.lora_B" in path:
                parameter.zero_()
        expected = wrapped(**inputs).logits
    wrapped.save_pretrained(str(tmp_path / "trained"))
    drawn, trained = (GraloraModel.from_pretrained(traced, tmp_path / name).eval() for name in ("drawn", "trained"))
    with torch.no_grad():
        for ours in (drawn, trained, merge(trained)):
            assert (ours(**inputs).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
        trained.merge_adapter()
        assert (trained(**inputs).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    for fold in (merge, GraloraModel.merge_adapter):
        with pytest.raises(MergeError, match=r"reads the weight of .*dt_proj .* and never calls the layer, .*leave it"):
            fold(drawn)

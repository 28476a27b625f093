"""Adapters on layers with a recurrent state or a convolution: logits and gradients are PEFT's, over several chunks."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from traces import relative_error
from transformers import PreTrainedModel

from gralora_fx import GraloraConfig, GraloraModel, LoraConfig, TracedModel, rewrite, trace
from tests.architectures.tiny_decoders import tiny_decoder

CLASSES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "Qwen3_5ForCausalLM": ({}, ["in_proj_qkv", "in_proj_z", "out_proj"]),
    "KimiLinearForCausalLM": ({}, ["q_proj", "k_proj", "v_proj", "o_proj"]),
    "Lfm2ForCausalLM": ({"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}, ["in_proj", "out_proj"]),
}
METHODS = {
    "LoRA": (peft.LoraConfig, LoraConfig, {"r": 4, "lora_alpha": 4, "init_lora_weights": False}),
    "GraLoRA": (peft.GraloraConfig, GraloraConfig, {"r": 4, "alpha": 4, "gralora_k": 2, "init_weights": False}),
}


@functools.cache
def source(name: str) -> tuple[PreTrainedModel, TracedModel]:
    model = tiny_decoder(name, **CLASSES[name][0])
    return model, trace(model, task="text-generation")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CLASSES)
def test_logits_and_gradients_are_pefts(name: str, method: str, tmp_path: Path) -> None:
    model, traced = source(name)
    config, _, options = METHODS[method]
    torch.manual_seed(0)
    theirs = peft.get_peft_model(copy.deepcopy(model), config(target_modules=CLASSES[name][1], **options)).eval()
    theirs.save_pretrained(tmp_path)
    ours = rewrite(traced, METHODS[method][1].from_pretrained(tmp_path))
    ours.load_adapter(tmp_path, "default")
    ours.eval()
    ids = torch.randint(3, 90, (2, 70), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    expected, actual = (
        theirs(input_ids=ids, attention_mask=mask).logits,
        ours(input_ids=ids, attention_mask=mask).logits,
    )
    assert relative_error(actual, expected) < 1e-5
    for logits in (expected, actual):
        logits.square().mean().backward()
    wanted = [p.grad for key, p in sorted(theirs.named_parameters()) if p.requires_grad]
    given = [p.grad for key, p in sorted(ours.named_parameters()) if p.requires_grad]
    assert len(wanted) == len(given) > 0
    assert sum(g.norm() for g in given) == pytest.approx(float(sum(g.norm() for g in wanted)), rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_defaults_are_as_close_to_float64_as_pefts(method: str, tmp_path: Path) -> None:
    """At PEFT's default scales random updates may be ten times the weights, whose ulps move logits by 1e-4 then."""
    model, traced = source("Qwen3_5ForCausalLM")
    config, _, options = METHODS[method]
    defaults = {name: value for name, value in options.items() if "alpha" not in name}
    torch.manual_seed(0)
    theirs = peft.get_peft_model(copy.deepcopy(model), config(target_modules="all-linear", **defaults)).eval()
    theirs.save_pretrained(tmp_path)
    ours = GraloraModel.from_pretrained(traced, tmp_path).eval()
    ids = torch.randint(3, 90, (2, 30), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        found, expected = ours(**inputs).logits, theirs(**inputs).logits
        exact = theirs.double()(**inputs).logits
    assert (found - exact).abs().max() < 1.5 * (expected - exact).abs().max()
    assert (found - expected).abs().max() < 1.5 * (expected - exact).abs().max()

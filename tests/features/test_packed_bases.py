"""A frozen base in four bits in memory: values and gradients of the dense one, its merges and its exports."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from four_bit_bases import float_base, in_four_bits, inputs
from safetensors.torch import load_file, save_file
from torch import Tensor

from gralora_fx import DoraConfig, GraloraConfig, GraloraModel, LoraConfig, TracedModel, merge, rewrite, trace
from gralora_fx.errors import CheckpointError, ConfigError, TraceError
from gralora_fx.exporters import export_onnx
from gralora_fx.features.nf4.four_bits import FourBits
from gralora_fx.features.nf4.packed import UnpackFourBits
from gralora_fx.loading import load_model

pytest.importorskip("bitsandbytes")

CONFIGS = {
    "gralora": GraloraConfig(r=4, target_modules="all-linear", init_weights=False),
    "lora": LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    "dora": DoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Float checkpoints by the name of their class."""
    made: dict[str, Path] = {}

    def base(name: str) -> Path:
        if name not in made:
            made[name] = float_base(tmp_path_factory.mktemp(name), name)
        return made[name]

    return base


def pair(base: Path, how: Any = "nf4") -> tuple[TracedModel, TracedModel]:
    """Traces of the base with dense weights and with packed ones."""
    dense, packed = (load_model(base, base_quantization=how, packed=flag) for flag in (False, True))
    given = inputs(dense)
    with torch.no_grad():
        assert torch.equal(packed(**given)[0], dense(**given)[0])  # as transformers' model, too
    return trace(dense), trace(packed)


def adapted(traced: TracedModel, config: Any) -> GraloraModel:
    torch.manual_seed(1)
    return rewrite(traced, config).train()


def step(model: GraloraModel) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(2)
    output = model(**model.traced.graph_inputs)[0]
    output.square().mean().backward()
    return output.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "T5ForConditionalGeneration"])
def test_training_over_packed_weights_is_that_over_dense_ones(bases: Any, name: str, method: str) -> None:
    dense, packed = (adapted(traced, CONFIGS[method]) for traced in pair(bases(name)))
    assert [site.path for site in packed.sites] == [site.path for site in dense.sites]
    calls = list(UnpackFourBits.all_in(packed.graph_module.graph))
    assert calls
    for node, _ in calls:
        assert next(iter(node.users)) is node.next  # directly before its user
    expected, gradients = step(dense)
    for checkpoints in (False, True):
        if checkpoints:
            packed.gradient_checkpointing_enable()
        actual, others = step(packed)
        assert torch.equal(actual, expected)
        assert others.keys() == gradients.keys()
        for key, gradient in gradients.items():  # of an input that several layers read they are added in another order
            assert torch.allclose(others[key], gradient, rtol=1e-5, atol=1e-6), key
    held = sum(t.numel() * t.element_size() for t in [*packed.buffers(), *packed.parameters()] if not t.requires_grad)
    floats = sum(p.numel() * 4 for p in dense.parameters() if not p.requires_grad)
    assert held < floats / 2
    assert not any(p.is_meta for p in packed.parameters())


def test_merges_are_those_of_the_dense_base(bases: Any) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    dense, packed = (adapted(traced, config).eval() for traced in pair(bases("LlamaForCausalLM")))
    given = dense.traced.graph_inputs
    merged = merge(packed)
    assert torch.equal(merged(**given)[0], merge(dense)(**given)[0])
    assert not merged.site("model.layers.0.self_attn.q_proj").weight.is_meta
    before = packed(**given)[0]
    for model in (dense, packed):
        model.merge_adapter()
    assert torch.equal(packed(**given)[0], dense(**given)[0])
    packed.unmerge_adapter()
    assert torch.equal(packed(**given)[0], before)
    other = copy.deepcopy(packed)
    assert torch.equal(other(**given)[0], before)
    expected = merged(**given)[0]
    assert torch.equal(packed.merge_and_unload()(**given)[0], expected)


def test_an_adapter_is_saved_with_how_its_base_was_rounded_and_loads_over_either_form(
    bases: Any, tmp_path: Path
) -> None:
    dense, packed = pair(bases("LlamaForCausalLM"), "nf4-double")
    model = adapted(packed, CONFIGS["gralora"])
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_quantization"]["double"] is True
    given = model.traced.graph_inputs
    expected = model.eval()(**given)[0]
    for traced in (dense, pair(bases("LlamaForCausalLM"), "nf4-double")[1]):
        assert torch.equal(GraloraModel.from_pretrained(traced, tmp_path).eval()(**given)[0], expected)


def test_its_export_is_that_of_the_rounded_base(bases: Any, tmp_path: Path) -> None:
    for name, traced in zip(("dense", "packed"), pair(bases("LlamaForCausalLM")), strict=True):
        export_onnx(adapted(traced, CONFIGS["gralora"]).eval(), tmp_path / name)
    files = {path.name for path in (tmp_path / "dense").iterdir()}
    assert {path.name for path in (tmp_path / "packed").iterdir()} == files
    for file in files - {"gralora_export.json"}:
        assert (tmp_path / "packed" / file).read_bytes() == (tmp_path / "dense" / file).read_bytes(), file


@pytest.mark.parametrize("how", [FourBits(), FourBits(double=True), FourBits("fp4", compute_dtype="bfloat16")])
def test_a_checkpoint_of_bitsandbytes_keeps_its_bits(bases: Any, tmp_path: Path, how: FourBits) -> None:
    in_four_bits(bases("LlamaForCausalLM"), how).save_pretrained(tmp_path)
    dense, packed = load_model(tmp_path), load_model(tmp_path, packed=True)
    given = inputs(dense)
    with torch.no_grad():
        assert torch.equal(packed(**given)[0], dense(**given)[0])
    assert packed.model.layers[0].mlp.up_proj.weight.is_meta
    assert not packed.lm_head.weight.is_meta


def test_what_packed_weights_cannot_be_is_refused_by_name(bases: Any, tmp_path: Path) -> None:
    base = bases("LlamaForCausalLM")
    with pytest.raises(ConfigError, match="is in floats, which have to be rounded to be held in few bits"):
        load_model(base, packed=True)
    model = adapted(trace(load_model(base, base_quantization="nf4", packed=True)), CONFIGS["lora"])
    with pytest.raises(TraceError, match=r"q_proj.weight is in its file or in few bits.*load the model.* in floats"):
        model.bfloat16()
    assert model.to("cpu").float() is model
    in_four_bits(base, FourBits()).save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "model.safetensors"
    whole = load_file(file)
    key = "model.layers.1.mlp.up_proj.weight"
    for damage, message in (
        ({f"{key}.absmax": torch.full_like(whole[f"{key}.absmax"], float("nan"))}, f"the scales of {key} .*not finite"),
        ({f"{key}.absmax": whole[f"{key}.absmax"][:-1]}, f"{key}: .* scales are not those of"),
        ({key: whole[key][:-1]}, f"{key}: .* bytes and .* scales are not those of"),
    ):
        damaged = tmp_path / "damaged"
        shutil.copytree(tmp_path / "saved", damaged, dirs_exist_ok=True)
        save_file({**whole, **damage}, damaged / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            load_model(damaged, packed=True)

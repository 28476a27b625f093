"""A frozen base in few bits in memory: values and gradients of the dense one, its merges and its exports."""

from __future__ import annotations

import copy
import functools
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from four_bit_bases import float_base, in_eight_bits, in_four_bits, inputs
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from gralora_fx import DoraConfig, GraloraConfig, GraloraModel, LoraConfig, TracedModel, merge, rewrite, trace
from gralora_fx.base.sources.lazy_tensors import values_of
from gralora_fx.errors import CheckpointError, ConfigError, TraceError
from gralora_fx.exporters import export_onnx
from gralora_fx.features.llm_int8.packed import UnpackEightBits
from gralora_fx.features.nf4.four_bits import FourBits
from gralora_fx.features.nf4.packed import UnpackFourBits, _kernels, packed_weight
from gralora_fx.loading import load_model, load_streamed

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


def pair(base: Path, how: str = "nf4") -> tuple[TracedModel, TracedModel]:
    """Traces of the base with dense weights and with packed ones, for a test to change."""
    return copy.deepcopy(_pair(base, how))


@functools.cache
def _pair(base: Path, how: str) -> tuple[TracedModel, TracedModel]:
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
@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("LlamaForCausalLM", "nf4"),
        ("GPT2LMHeadModel", "nf4"),
        ("T5ForConditionalGeneration", "nf4"),
        ("LlamaForCausalLM", "int8"),
        ("GPT2LMHeadModel", "int8"),
    ],
)
def test_training_over_packed_weights_is_that_over_dense_ones(bases: Any, name: str, how: str, method: str) -> None:
    dense, packed = (adapted(traced, CONFIGS[method]) for traced in pair(bases(name), how))
    assert [site.path for site in packed.sites] == [site.path for site in dense.sites]
    operator: Any = UnpackEightBits if how == "int8" else UnpackFourBits
    calls = list(operator.all_in(packed.graph_module.graph))
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


@pytest.mark.parametrize("targets", ["all-linear", {"q_proj", "c_attn"}])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_no_unpacked_weight_is_kept_for_the_backward_pass(bases: Any, name: str, targets: Any) -> None:
    _, model = pair(bases(name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names of targets that the other model has
        gralora = adapted(model, LoraConfig(r=4, target_modules=targets))
    kept: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        gralora(**gralora.traced.graph_inputs)
    shapes = {tuple(packed.shape) for packed in gralora._state.base.computed.values()}
    assert shapes
    assert not {*shapes, *(shape[::-1] for shape in shapes)} & set(kept)


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


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_its_export_is_that_of_the_rounded_base(bases: Any, tmp_path: Path, how: str) -> None:
    for name, traced in zip(("dense", "packed"), pair(bases("LlamaForCausalLM"), how), strict=True):
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


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_a_checkpoint_in_int8_has_the_values_that_bitsandbytes_multiplies_by(
    bases: Any, tmp_path: Path, name: str
) -> None:
    theirs = in_eight_bits(bases(name))
    theirs.save_pretrained(tmp_path)
    models = [load_model(tmp_path, packed=packed) for packed in (False, True)]
    models += [load_model(bases(name), base_quantization="int8", packed=packed) for packed in (False, True)]
    given = inputs(models[0])
    theirs.train()  # where it multiplies by floats on a CPU
    for module in theirs.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        expected = theirs(**given).logits
        for model in models:
            assert torch.equal(model(**given).logits, expected)
    for model in models:
        assert model.config.base_quantization == {"kind": "int8", "skip_modules": None}
    streamed = load_streamed(tmp_path)
    for key, parameter in streamed.named_parameters():
        assert torch.equal(values_of(parameter, key), models[0].state_dict()[key]), key


def test_what_packed_weights_cannot_be_is_refused_by_name(bases: Any) -> None:
    base = bases("LlamaForCausalLM")
    with pytest.raises(ConfigError, match="has float weights, which must be rounded to be kept in few bits"):
        load_model(base, packed=True)
    model = adapted(pair(base)[1], CONFIGS["lora"])
    with pytest.raises(TraceError, match=r"q_proj.weight is in its file or in few bits.*load the model.* in floats"):
        model.bfloat16()
    assert model.to("cpu").float() is model


UP = "model.layers.0.mlp.up_proj"
DAMAGES: dict[str, tuple[str, str, Any, str]] = {
    "scales that are not finite": ("nf4", ".weight.absmax", lambda t: t * torch.nan, "the scales of .* not finite"),
    "a scale too few": ("nf4", ".weight.absmax", lambda t: t[:-1], "bytes and 511 scales are not those of"),
    "no scales": ("nf4", ".weight.absmax", None, "absmax is missing"),
    "codes cut off": ("nf4", ".weight", lambda t: t[:-1], "16383 bytes and 512 scales are not those of"),
    "no codes": ("nf4", ".weight", None, "its integers are missing"),
    "another table": ("nf4", ".weight.quant_map", lambda t: t / 2, "do not reach from -1 to 1"),
    "a table that is no number": ("nf4", ".weight.quant_map", lambda t: t * torch.nan, "do not reach from -1 to 1"),
    "int8: scales that are not finite": ("int8", ".SCB", lambda t: t * torch.inf, "its scales, SCB, are not finite"),
    "int8: a scale too few": ("int8", ".SCB", lambda t: t[:-1], "SCB has 255 scales in F32 for 256 rows"),
    "int8: no scales": ("int8", ".SCB", None, "the scales of its rows, SCB, are missing"),
    "int8: other codes": ("int8", ".weight", lambda t: t.to(torch.int32), "it is I32 of shape"),
    "int8: no codes": ("int8", ".weight", None, "its integers are missing"),
    "int8: columns": ("int8", ".weight_format", lambda t: t + 1, "its weight_format is not 0"),
}


@pytest.fixture(scope="module")
def stored(bases: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a checkpoint of bitsandbytes in each form."""
    found = {how: tmp_path_factory.mktemp(how) for how in ("nf4", "int8")}
    in_four_bits(bases("LlamaForCausalLM"), FourBits()).save_pretrained(found["nf4"])
    in_eight_bits(bases("LlamaForCausalLM")).save_pretrained(found["int8"])
    return found


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_weight_is_one_error_with_its_name_and_file(
    stored: dict[str, Path], tmp_path: Path, damage: str
) -> None:
    how, part, change, message = DAMAGES[damage]
    shutil.copytree(stored[how], tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensor = tensors.pop(f"{UP}{part}")
    save_file(tensors if change is None else {**tensors, f"{UP}{part}": change(tensor)}, file, {"format": "pt"})
    for packed in (False, True):
        with pytest.raises(CheckpointError, match=message) as raised:
            load_model(tmp_path, packed=packed)
        assert f"{UP}.weight" in str(raised.value)
        assert file.name in str(raised.value)


def test_a_file_that_was_cut_off_is_named(stored: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(stored["int8"], tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_model(tmp_path, packed=True)


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_a_float_weight_that_is_not_finite_is_named_when_it_is_rounded(bases: Any, tmp_path: Path, how: str) -> None:
    shutil.copytree(bases("LlamaForCausalLM"), tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{UP}.weight"][3, 5] = torch.inf
    save_file(tensors, file, {"format": "pt"})
    for packed in (False, True):
        with pytest.raises(CheckpointError, match=rf"{UP}.weight has values that are not finite.*mend the weight"):
            load_model(tmp_path, base_quantization=how, packed=packed)
    streamed = load_streamed(tmp_path, base_quantization=how)
    with pytest.raises(CheckpointError, match=rf"{UP}.weight has values that are not finite"):
        values_of(streamed.get_submodule(UP).weight, "weight")


@pytest.mark.parametrize("how", ["nf4", "fp4-32", "nf4-1024", "nf4-double", "nf4-4096"])
@pytest.mark.parametrize("shape", [(30, 96), (7, 9), (64, 128)])
def test_the_kernel_of_bitsandbytes_unpacks_to_the_same_bits(how: str, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).numpy()
    quantization = FourBits.of_text(how)
    packed = packed_weight(weight, "w", quantization, is_turned=False)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        found = packed()
    given = UnpackFourBits(*packed.tensors.values(), [], quantization.block_size, None, None, None)
    expected = given.by_pytorch(
        weight.size, *(packed.tensors[name].view(torch.float32) for name in ("scales", "table"))
    )
    assert torch.equal(found.view(torch.int32), expected.view(shape).view(torch.int32))
    is_whole = weight.size % quantization.block_size == 0
    used = any(event.key == "bitsandbytes::dequantize_4bit" for event in seen.key_averages())
    # the kernel for fp4 has another table on processors without AVX-512
    is_known = quantization.kind == "nf4" or packed.tensors["table"].numpy().tobytes() in _kernels()
    assert used == (is_whole and is_known and quantization.block_size <= 1024)


def test_other_values_than_those_of_the_kernel_are_unpacked_by_pytorch() -> None:
    packed = packed_weight(torch.randn(8, 64).numpy(), "w", FourBits(), is_turned=False)
    table = packed.tensors["table"].view(torch.float32)
    table[3] /= 2
    assert packed().unique().numel() > 16
    codes = packed.tensors["codes"]
    pairs = torch.stack((codes >> 4, codes & 15), 1).view(8, 64).int()
    scales = packed.tensors["scales"].view(torch.float32)[:, None]
    assert torch.equal(packed(), table[pairs] * scales)

"""DoRA beside the parity grid: training, several adapters, files, the command line, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from fold_cases import CACHED, Case, assert_same_weights
from peft_oracle import peft_model
from safetensors.torch import load_file, save_file
from tiny_models import text_batch, tiny_model
from tiny_tokenizers import tiny_tokenizer
from torch import nn
from traces import fresh_trace, main_output, relative_error, run, traced
from typer.testing import CliRunner

from gralora_fx import DoraConfig, GraloraConfig, GraloraModel, LoraConfig, merge, rewrite, trace
from gralora_fx.cli import app
from gralora_fx.core.methods import config_from_peft, method_of, read_config
from gralora_fx.core.methods.dora import DoraFactors
from gralora_fx.errors import CheckpointError, ConfigError, ExportError, MergeError, RewriteError
from gralora_fx.exporters import export_adapter, export_onnx, fold_onnx, merge_checkpoint, to_lora, verify_onnx
from gralora_fx.serving import load

BOTH = ["q_proj", "v_proj"]
QUERY = "model.layers.0.self_attn.q_proj"


def perturbed(model: nn.Module, name: str = "magnitude") -> None:
    """Move magnitudes away from the weights' norms, as training does."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if name in path:
                parameter *= 1 + 0.3 * torch.rand(parameter.shape, generator=generator)


def adapted(model: str = "llama", **fields: Any) -> GraloraModel:
    torch.manual_seed(0)
    config = DoraConfig(**{"r": 4, "target_modules": BOTH, "init_lora_weights": False, **fields})
    rewritten = rewrite(fresh_trace(model), config)
    perturbed(rewritten)
    return rewritten


# -- as PEFT does it ----------------------------------------------------------------------------------------------


def test_initial_tensors_are_pefts() -> None:
    torch.manual_seed(3)
    base = nn.Sequential(nn.Linear(24, 48))
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=6, target_modules=["0"], use_dora=True))
    layer = theirs.base_model.model[0]
    torch.manual_seed(5)
    layer.reset_lora_parameters("default", True)
    torch.manual_seed(5)
    ours = rewrite(trace(base, (torch.randn(2, 24),)), DoraConfig(r=6, target_modules=["0"])).factors("0")
    assert isinstance(ours, DoraFactors)
    assert torch.equal(ours.magnitude, layer.lora_magnitude_vector["default"].weight)
    assert torch.allclose(ours.magnitude, base[0].weight.norm(dim=1))
    assert not ours.B.any()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_dropout_acts_as_in_peft(training: bool, bias: bool, tmp_path: Path) -> None:
    """In training the layer's own product is of the dropped input too, but for the part that is not scaled."""
    base = nn.Sequential(nn.Linear(24, 48, bias=bias))
    fields = {"r": 4, "target_modules": ["0"], "lora_dropout": 0.4}
    theirs = peft_model(copy.deepcopy(base), method="DORA", **fields)  # type: ignore[arg-type]
    perturbed(theirs)
    theirs.save_pretrained(str(tmp_path))
    x = torch.randn(6, 24)
    ours = GraloraModel.from_pretrained(trace(base, (torch.randn(3, 24),)), tmp_path)
    outputs, gradients = [], []
    for model in (theirs, ours):
        model.train(training)
        torch.manual_seed(9)
        outputs.append(model(x))
        outputs[-1].square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert torch.allclose(outputs[0], outputs[1], atol=1e-5)
    assert len(gradients[0]) == len(gradients[1]) == 3
    for expected, actual in zip(gradients[0], gradients[1], strict=True):
        assert relative_error(actual, expected) < 1e-5


def test_no_gradient_goes_through_the_norm() -> None:
    model = adapted()
    inputs = text_batch()
    main_output(model(**inputs)).square().mean().backward()
    factors = model.factors(QUERY)
    assert isinstance(factors, DoraFactors)
    grads = [tensor.grad for tensor in factors]
    assert all(grad is not None and grad.any() for grad in grads)
    assert all(p.grad is None for p in model.traced.tree.parameters.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_has_float32_adapters(dtype: torch.dtype) -> None:
    model = rewrite(
        trace(nn.Sequential(nn.Linear(24, 48)).to(dtype), (torch.randn(2, 24, dtype=dtype),)),
        DoraConfig(r=4, target_modules=["0"], init_lora_weights=False),
    )
    perturbed(model)
    x = torch.randn(3, 24, dtype=dtype)
    assert {tensor.dtype for tensor in model.factors("0") if tensor is not None} == {torch.float32}
    assert model(x).dtype == dtype
    assert relative_error(model(x), merge(model)(x)) < 4 * torch.finfo(dtype).eps


def test_a_fresh_adapter_changes_nothing() -> None:
    model = rewrite(fresh_trace("llama"), DoraConfig(target_modules=BOTH))
    assert relative_error(run(model, text_batch()), run(model.traced, text_batch())) < 1e-5


def test_merged_is_unmerged_and_unmerging_restores_every_bit() -> None:
    model = adapted(target_modules="all-linear")
    before = {name: p.clone() for name, p in model.traced.tree.parameters.items()}
    expected = run(model, text_batch())
    assert relative_error(expected, run(model.traced, text_batch())) > 1e-3
    assert relative_error(run(merge(model), text_batch()), expected) < 1e-5
    model.merge_adapter()
    assert relative_error(run(model, text_batch()), expected) < 1e-5
    model.unmerge_adapter()
    assert all(torch.equal(p, before[name]) for name, p in model.traced.tree.parameters.items())
    assert relative_error(run(model, text_batch()), expected) < 1e-6


def test_the_update_is_what_merging_changes() -> None:
    model = adapted()
    merged = merge(model).tree.parameters[f"{QUERY}.weight"]
    delta = merged - model.traced.tree.parameters[f"{QUERY}.weight"]
    assert torch.allclose(model.delta_weight(QUERY), delta, atol=1e-6)
    assert model.block_norms(QUERY).item() == pytest.approx(delta.norm().item(), rel=1e-4)


def test_a_part_of_a_layers_output_has_its_part_of_the_magnitudes() -> None:
    """`nn.MultiheadAttention` computes keys and values from some rows of its weight; PEFT has no adapter there."""
    attention = nn.MultiheadAttention(16, 2, batch_first=True).eval()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
            return self.attention(x, memory, memory, need_weights=False)[0]

    nn.init.normal_(attention.in_proj_bias)
    inputs = (torch.randn(2, 3, 16), torch.randn(2, 5, 16))
    graph = trace(Model().eval(), inputs)
    model = rewrite(graph, DoraConfig(r=2, target_modules=["in_proj_weight"], init_lora_weights=False))
    perturbed(model)
    assert relative_error(model(*inputs), merge(model)(*inputs)) < 1e-5
    assert relative_error(model(*inputs), graph(*inputs)) > 1e-3


# -- several adapters ---------------------------------------------------------------------------------------------


def test_adapters_of_one_layer_are_refused_since_in_peft_their_order_counts(tmp_path: Path) -> None:
    model = adapted()
    model.add_adapter("lora", LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.add_adapter("apart", GraloraConfig(target_modules=["o_proj"], init_weights=False))
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path)).eval()
    theirs.load_adapter(str(tmp_path / "lora"), "lora")
    outputs = []
    for names in (["default", "lora"], ["lora", "default"]):
        theirs.base_model.set_adapter(names)
        outputs.append(main_output(theirs(**text_batch())).detach())
    assert relative_error(*outputs) > 1e-4
    for names in (["default", "lora"], ["lora", "default"]):
        with pytest.raises(RewriteError, match=r"both adapt .*q_proj.* 'default' \(DoRA\) does there depends on"):
            model.set_adapter(names)
        with pytest.raises(RewriteError, match=r"both adapt .*q_proj.* 'default' \(DoRA\) does there depends on"):
            merge(model, adapter_names=names)
    assert (model.active_adapters, model.merged_adapters) == (["default"], [])
    model.set_adapter(["default", "apart"])
    expected = run(model, text_batch())
    assert relative_error(run(merge(model), text_batch()), expected) < 1e-5
    model.set_adapter(["apart", "default"])
    assert relative_error(run(model, text_batch()), expected) < 1e-6


def test_a_weighted_sum_is_refused() -> None:
    model = adapted()
    with pytest.raises(RewriteError, match=r"adapter 'default' is a DoRA adapter: .* which a weighted sum needs"):
        model.add_weighted_adapter(["default"], [0.5], "weaker")
    assert list(model.configs) == ["default"]


# -- configurations -----------------------------------------------------------------------------------------------


def test_configurations_are_pefts(tmp_path: Path) -> None:
    theirs = peft.LoraConfig(r=4, lora_alpha=3, use_rslora=True, use_dora=True, target_modules=BOTH)
    ours = DoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=BOTH)
    assert config_from_peft(theirs) == DoraConfig.from_peft(theirs) == LoraConfig.from_peft(theirs) == ours
    assert LoraConfig(r=4, lora_alpha=3, use_rslora=True, use_dora=True, target_modules=BOTH) == ours
    ours.save_pretrained(tmp_path)
    again = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert (again.use_dora, again.r, again.use_rslora) == (True, 4, True)
    assert read_config(tmp_path) == ours
    assert method_of(ours).config is DoraConfig
    assert method_of(LoraConfig()).config is LoraConfig
    assert type(LoraConfig(use_dora=False)) is LoraConfig


def test_copies_of_a_configuration_keep_its_method() -> None:
    ours = LoraConfig(r=4, use_dora=True)
    again = (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), dataclasses.replace(LoraConfig(r=4), use_dora=True))
    assert [(type(config), config) for config in again] == [(DoraConfig, ours)] * 3


def test_what_no_configuration_of_dora_is() -> None:
    fields = {"peft_type": "LORA", "use_dora": True}
    with pytest.raises(ConfigError, match=r"use_dora must be False, or True in LoraConfig\(use_dora=True\)"):
        LoraConfig(use_dora=1)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="a file: use_dora must be True, but got False; take LoraConfig"):
        DoraConfig.from_fields({"peft_type": "LORA"}, "a file")
    with pytest.raises(ConfigError, match=r"lora_bias=True \(a bias of lora_B\) is not supported in a DoRA"):
        DoraConfig.from_fields({**fields, "lora_bias": True}, "a file")


def test_a_lora_config_that_asks_for_dora_is_one_in_a_process_that_has_made_none() -> None:
    code = "from gralora_fx import LoraConfig; print(type(LoraConfig(r=4, use_dora=True)).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "DoraConfig"


def test_the_plan_says_what_it_trains() -> None:
    model = adapted()
    assert "r=4 and magnitudes" in str(model.plans["default"])
    assert "default (active): r=4 and magnitudes, 4 sites" in repr(model)


def test_magnitudes_are_read_by_the_names_that_peft_reads(tmp_path: Path) -> None:
    """PEFT saves `lora_magnitude_vector`, and loads `lora_magnitude_vector.weight` too."""
    case = Case(
        tmp_path, fresh_trace("llama", task=CACHED), DoraConfig(r=4, target_modules=BOTH, init_lora_weights=False)
    )
    file = case.adapter / "adapter_model.safetensors"
    saved = load_file(file)
    save_file({f"{key}.weight" if key.endswith("_vector") else key: tensor for key, tensor in saved.items()}, file)
    again = GraloraModel.from_pretrained(case.model.traced, case.adapter)
    assert torch.equal(again.factors(QUERY).magnitude, case.model.factors(QUERY).magnitude)
    case.fold()
    assert verify_onnx(case.out, again, "quick").passed


def test_a_row_without_a_norm_is_named() -> None:
    network = nn.Sequential(nn.Linear(8, 8))
    with torch.no_grad():
        network[0].weight[3] = 0
    with pytest.raises(MergeError, match=r"0 is not finite; .* is a DoRA adapter of a row of zeros, which has no norm"):
        merge(rewrite(trace(network, (torch.randn(2, 8),)), DoraConfig(r=2, target_modules=["0"])))


def test_a_missing_magnitude_is_named(tmp_path: Path) -> None:
    rewrite(fresh_trace("llama"), LoraConfig(r=4, target_modules=BOTH)).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**fields, "use_dora": True}))
    with pytest.raises(CheckpointError, match=r"missing .*q_proj\.lora_magnitude_vector"):
        GraloraModel.from_pretrained(traced("llama"), tmp_path)
    with pytest.raises(CheckpointError, match=r"missing .*q_proj\.lora_magnitude_vector"):
        to_lora(tmp_path, tmp_path / "lora")


# -- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_checkpoints_are_merged_as_peft_merges(name: str, tmp_path: Path) -> None:
    targets = BOTH if name == "llama" else ["c_attn", "c_proj"]
    base = tiny_model(name)
    base.save_pretrained(tmp_path / "base")
    theirs = peft_model(copy.deepcopy(base), method="DORA", r=4, target_modules=targets)
    perturbed(theirs)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    actual = type(base).from_pretrained(tmp_path / "merged").state_dict()
    for key, expected in theirs.merge_and_unload().state_dict().items():
        assert torch.allclose(actual[key], expected, atol=1e-6), key


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("gpt2", {}),
        ("llama", {"quantize": "int8"}),
        ("bert", {"precision": "fp16"}),
    ],
)
def test_a_fold_is_the_export_of_the_merged_model(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Packed projections, whose layers lie beside each other in one matrix, weights `[in, out]`, integers."""
    targets = {"llama": "all-linear", "gpt2": ["c_attn", "c_fc"], "bert": ["query", "value", "dense"]}[name]
    task = None if name == "bert" else CACHED
    case = Case(
        tmp_path,
        fresh_trace(name, task=task),
        DoraConfig(r=4, target_modules=targets, init_lora_weights=False),
        **options,
    )
    perturbed(case.model)
    case.model.save_pretrained(case.adapter)
    if "quantize" in options:
        tiny_model(name).save_pretrained(tmp_path / "weights")
        case.fold(requantize=True, base=tmp_path / "weights", force=True)
    else:
        case.fold()
    assert_same_weights(case.out, case.export_fresh(), 2e-3 if options else 1e-5)


def test_a_fold_beside_another_adapter_is_refused(tmp_path: Path) -> None:
    case = Case(
        tmp_path, fresh_trace("llama", task=CACHED), DoraConfig(r=4, target_modules=BOTH, init_lora_weights=False)
    )
    case.fold()
    other = rewrite(fresh_trace("llama", task=CACHED), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(MergeError, match=r"both adapt .*q_proj.*a DoRA adapter does there depends on the weight"):
        fold_onnx(case.out, tmp_path / "other", tmp_path / "both")
    fold_onnx(case.out, tmp_path / "other", tmp_path / "both", force=True)


def test_merged_exports_are_verified_and_what_takes_plain_lora_refuses(tmp_path: Path) -> None:
    model = adapted()
    report = export_onnx(model, tmp_path / "merged")
    assert report.verification is not None
    assert verify_onnx(tmp_path / "merged", model).passed
    lora = rewrite(fresh_trace("llama"), LoraConfig(target_modules=BOTH, init_lora_weights=False))
    export_onnx(lora, tmp_path / "data", adapters="data", verify=False)
    model.save_pretrained(tmp_path / "dora")
    with pytest.raises(ExportError, match=r"is a DoRA adapter, which scales .* was exported with adapters that do not"):
        export_adapter(tmp_path / "dora", tmp_path / "data", "dora")
    for rank in (None, 2):
        with pytest.raises(ConfigError, match=r"is a DoRA adapter: .* which to_lora needs"):
            to_lora(tmp_path / "dora", tmp_path / "lora", rank=rank)


# -- the command line ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a base with a tokenizer, and a DoRA and a LoRA adapter of it that PEFT saved."""
    folder = tmp_path_factory.mktemp("dora")
    model = tiny_model("llama", bos_token_id=1, eos_token_id=2, num_hidden_layers=1)
    model.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    for name, method in (("dora", "DORA"), ("lora", "LORA")):
        wrapped = peft_model(copy.deepcopy(model), method=method, r=4, target_modules=BOTH, task_type="CAUSAL_LM")
        perturbed(wrapped)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped.save_pretrained(str(folder / name))
    return folder


def command(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    error = "" if result.exception is None else str(result.exception)
    return result.exit_code, f"{result.output}{error}"


def test_every_command_takes_it_or_says_why_not(folder: Path, tmp_path: Path) -> None:
    of_base = ["--model", folder / "base", "--adapter", folder / "dora"]
    code, printed = command("inspect", *of_base, "--svg", tmp_path / "graph.svg")
    assert (code, "r=4 and magnitudes" in printed) == (0, True), printed
    assert "r=4 and magnitudes" in (tmp_path / "graph.svg").read_text()
    code, printed = command("merge", *of_base, "--output", tmp_path / "merged")
    assert code == 0, printed
    code, printed = command("export", *of_base, "--output", tmp_path / "onnx", "--verify", "quick")
    assert code == 0, printed
    code, printed = command(
        "export", "--model", folder / "base", "--task", CACHED, "--output", tmp_path / "plain", "--no-verify"
    )
    assert code == 0, printed
    code, printed = command(
        "fold", "--onnx", tmp_path / "plain", "--adapter", folder / "dora", "--output", tmp_path / "folded"
    )
    assert code == 0, printed
    prompt = {"input_ids": np.array([[5, 6, 7, 8]]), "attention_mask": np.ones((1, 4), np.int64)}
    outputs = [load(tmp_path / name)(**prompt)["logits"] for name in ("onnx", "folded")]
    np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-5)
    code, printed = command("export", *of_base, "--adapters", "data", "--output", tmp_path / "data")
    assert code == 0, printed
    code, printed = command(
        "export-adapter", "--adapter", folder / "dora", "--onnx", tmp_path / "data", "--adapter-name", "again"
    )
    assert (code, "its norms were computed from the float32 weights, as in PEFT" in printed) == (0, True), printed
    answers = [
        command("generate", "--onnx", tmp_path / "data", "--adapter", adapter, "--prompt", "hello")
        for adapter in ("default", "again", f"other={folder / 'dora'}")
    ]
    assert {code for code, _ in answers} == {0}
    assert len({printed for _, printed in answers}) == 1
    code, printed = command("to-lora", "--adapter", folder / "dora", "--output", tmp_path / "lora")
    assert code != 0
    assert "is a DoRA adapter" in printed


def test_an_export_with_adapters_as_data_refuses_it(folder: Path, tmp_path: Path) -> None:
    code, printed = command(
        "export",
        "--model",
        folder / "base",
        "--adapter",
        folder / "lora",
        "--adapters",
        "data",
        "--output",
        tmp_path / "data",
        "--no-verify",
    )
    assert code == 0, printed
    code, printed = command(
        "export-adapter", "--adapter", folder / "dora", "--onnx", tmp_path / "data", "--name", "dora"
    )
    assert code != 0
    assert "is a DoRA adapter" in printed
    code, printed = command(
        "generate", "--onnx", tmp_path / "data", "--adapter", f"dora={folder / 'dora'}", "--prompt", "hello"
    )
    assert code != 0
    assert "is a DoRA adapter" in printed
    code, printed = command("serve", "--onnx", tmp_path / "data", "--adapter", f"dora={folder / 'dora'}", "--port", 0)
    assert code != 0
    assert "is a DoRA adapter" in printed


def test_saved_keys_are_pefts(folder: Path, tmp_path: Path) -> None:
    GraloraModel.from_pretrained(fresh_trace("llama", num_hidden_layers=1), folder / "dora").save_pretrained(tmp_path)
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (tmp_path, folder / "dora"))
    assert ours.keys() == theirs.keys()
    assert f"base_model.model.{QUERY}.lora_magnitude_vector" in ours
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)

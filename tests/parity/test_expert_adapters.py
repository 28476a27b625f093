"""Adapters of stacked experts: as PEFT's `target_parameters` for LoRA, and by the same rules for GraLoRA."""

from __future__ import annotations

import copy
import json
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gralora_fx import GraloraConfig, GraloraModel, LoraConfig, TracedModel, merge, plan, rewrite, trace
from gralora_fx.core.adapters.checkpoint import checkpoint_parameters
from gralora_fx.errors import CheckpointError, ConfigError, ExportError, MergeError, RewriteError, TargetError
from gralora_fx.exporters import export_onnx, fold_onnx, merge_checkpoint, to_lora
from gralora_fx.serving import load
from tests.architectures.tiny_decoders import tiny_decoder

UP_AND_DOWN = ("experts.gate_up_proj", "experts.down_proj")
MODELS: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", UP_AND_DOWN, {}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", UP_AND_DOWN, {}),
    "gpt-oss": ("GptOssForCausalLM", UP_AND_DOWN, {}),
    "granite-moe": ("GraniteMoeForCausalLM", UP_AND_DOWN, {}),
    "deepseek-v3": ("DeepseekV3ForCausalLM", UP_AND_DOWN, {}),
    "nemotron-h": (
        "NemotronHForCausalLM",
        ("experts.up_proj", "experts.down_proj"),
        {"layers_block_type": ["attention", "moe"]},
    ),
}
CLOSE = 1e-5


@cache
def traced(name: str) -> TracedModel:
    return trace(base(name))


@cache
def base(name: str) -> PreTrainedModel:
    kind, _, fields = MODELS[name]
    return tiny_decoder(kind, **fields)


def ids(model: PreTrainedModel) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(3, model.config.vocab_size, (2, 9), generator=generator)


def in_peft(name: str, **fields: Any) -> peft.PeftModel:
    torch.manual_seed(1)
    values = {"r": 4, "lora_alpha": 8, "target_modules": [], "target_parameters": list(MODELS[name][1])}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(copy.deepcopy(base(name)), peft.LoraConfig(**values | fields))


def saved_by_peft(name: str, directory: Path, **fields: Any) -> peft.PeftModel:
    theirs = in_peft(name, **{"init_lora_weights": False} | fields).eval()
    theirs.save_pretrained(str(directory))
    return theirs


def logits(model: Any, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=inputs).logits
    return result


def error(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")  # but they count
@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_of_pefts_computes_merges_and_goes_back(name: str, tmp_path: Path) -> None:
    inputs = ids(base(name))
    theirs = saved_by_peft(name, tmp_path / "theirs", use_rslora=True, rank_pattern={"down_proj": 2})
    expected = logits(theirs, inputs)
    assert error(expected, logits(base(name), inputs)) > 1e-3  # the adapter does something
    ours = GraloraModel.from_pretrained(traced(name), tmp_path / "theirs").eval()
    assert error(logits(ours, inputs), expected) < CLOSE
    assert error(logits(merge(ours), inputs), expected) < CLOSE
    ours.merge_adapter(safe_merge=True)
    assert error(logits(ours, inputs), expected) < CLOSE
    ours.unmerge_adapter()
    with ours.disable_adapter():
        assert torch.equal(logits(ours, inputs), logits(traced(name), inputs))
    ours.save_pretrained(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base(name)), str(tmp_path / "ours")).eval()
    assert error(logits(back, inputs), expected) < CLOSE


@pytest.mark.parametrize("name", MODELS)
def test_the_files_of_a_base_are_merged_into(name: str, tmp_path: Path) -> None:
    """Most models store a matrix for each expert, and the gate apart from the up projection."""
    base(name).save_pretrained(tmp_path / "base")
    theirs = saved_by_peft(name, tmp_path / "adapter")
    report = merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert report.merged
    merged = type(base(name)).from_pretrained(tmp_path / "merged").eval()
    inputs = ids(base(name))
    assert error(logits(merged, inputs), logits(theirs, inputs)) < CLOSE


@pytest.mark.filterwarnings("ignore:in the first step:UserWarning")
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_training_is_pefts(name: str) -> None:
    """From the same seed: the same tensors, of the same keys and shapes, and the same losses."""
    fields = {"target_modules": ["q_proj", "o_proj"], "init_lora_weights": True}
    inputs = ids(base(name))
    theirs = in_peft(name, **fields)
    torch.manual_seed(1)
    ours = rewrite(
        traced(name),
        LoraConfig(r=4, lora_alpha=8, target_parameters=list(MODELS[name][1]), **fields),
    ).train()
    fresh = checkpoint_parameters(ours.adapter("default"))
    expected = peft.get_peft_model_state_dict(theirs)
    assert fresh.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in fresh.items())
    assert losses(ours, inputs) == pytest.approx(losses(theirs, inputs), rel=CLOSE)


def losses(model: nn.Module, inputs: Tensor) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    values = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(input_ids=inputs, labels=inputs).loss
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < values[0]
    return values


@pytest.mark.filterwarnings("ignore:in the first step:UserWarning")
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_gralora_of_experts(name: str, tmp_path: Path) -> None:
    """Each expert's matrix has the GraLoRA of a linear layer; it is saved, merged, and a LoRA that PEFT loads."""
    inputs = ids(base(name))
    config = GraloraConfig(
        r=4,
        gralora_k=2,
        hybrid_r=2,
        target_modules=["v_proj"],
        target_parameters=list(MODELS[name][1]),
        init_weights=False,
    )
    ours = rewrite(traced(name), config)
    losses(ours.train(), inputs)
    expected = logits(ours.eval(), inputs)
    assert error(logits(merge(ours), inputs), expected) < CLOSE
    path = next(planned.site.path for planned in ours.adapted_sites() if planned.stack)
    update = ours.adapter("default").update(path)
    A, B = update.matrix(1).lora_form()
    delta = ours.delta_weight(path)[1]
    assert torch.allclose(delta.mT if ours.site(path).is_transposed else delta, update.scale * B @ A, atol=1e-6)
    with pytest.warns(UserWarning, match="target_parameters, which PEFT's GraLoRA does not read"):
        ours.save_pretrained(tmp_path / "ours")
    assert f"base_model.model.{path}.gralora_A" in checkpoint_parameters(ours.adapter("default"))
    loaded = GraloraModel.from_pretrained(traced(name), tmp_path / "ours").eval()
    assert error(logits(loaded, inputs), expected) < CLOSE
    to_lora(tmp_path / "ours", tmp_path / "lora")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base(name)), str(tmp_path / "lora")).eval()
    assert error(logits(theirs, inputs), expected) < CLOSE


def test_adapters_of_experts_act_beside_each_other() -> None:
    torch.manual_seed(1)  # some draws route a token so narrowly that half an ulp of the weights changes 8e-5 of logits
    ours = rewrite(traced("mixtral"), LoraConfig(r=2, target_parameters=[UP_AND_DOWN[0]], init_lora_weights=False))
    ours.add_adapter(
        "second", GraloraConfig(r=2, target_modules=[], target_parameters=[*UP_AND_DOWN], init_weights=False)
    )
    ours.set_adapter(["default", "second"])
    inputs = ids(base("mixtral"))
    both = logits(ours, inputs)
    assert error(logits(merge(ours), inputs), both) < CLOSE
    ours.merge_adapter(["second"])
    assert error(logits(ours, inputs), both) < CLOSE
    ours.unmerge_adapter()
    with pytest.raises(RewriteError, match=r"adapts parameters .*which cannot be summed"):
        ours.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")


def test_a_half_precision_base_rounds_its_adapted_weight_once() -> None:
    model = copy.deepcopy(base("mixtral")).to(torch.bfloat16)
    ours = rewrite(
        trace(model), LoraConfig(r=2, target_modules=[], target_parameters=[*UP_AND_DOWN], init_lora_weights=False)
    )
    assert {p.dtype for p in ours.adapter("default").parameters()} == {torch.float32}
    inputs = ids(base("mixtral"))
    assert error(logits(ours, inputs), logits(merge(ours), inputs)) < 1e-2


# -- plans --------------------------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout=0.1 does not work with target_parameters"),
        ({"use_dora": True}, "use_dora=True does not work with target_parameters"),
        ({"target_parameters": "experts.down_proj"}, "target_parameters must be a list of names or None"),
    ],
)
def test_what_peft_refuses_is_refused(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        LoraConfig(**{"target_parameters": ["experts.down_proj"], **fields})


@pytest.mark.quick
def test_parameters_are_written_and_read_as_pefts(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=[], target_parameters=["experts.down_proj"])
    config.save_pretrained(tmp_path)
    fields = peft.LoraConfig.from_pretrained(str(tmp_path))
    assert fields.target_parameters == ["experts.down_proj"]
    assert LoraConfig.from_peft(fields) == config == LoraConfig.from_pretrained(tmp_path)
    assert "target_parameters" not in json.loads(LoraConfig(target_modules=["q"]).to_json())


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"target_parameters": ["experts.gate_up_porj"]}, r"matches no parameter; nearest names: .*gate_up_proj"),
        ({"target_parameters": ["input_layernorm.weight"]}, r"has the shape \[\d+\], and 2 or 3 dimensions are needed"),
        (
            {"target_modules": ["q_proj"], "target_parameters": ["q_proj.weight"]},
            "target_modules names model.layers.0.self_attn.q_proj, which owns it",
        ),
    ],
)
def test_a_name_that_fits_no_parameter_is_an_error(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(TargetError, match=expected):
        plan(traced("mixtral"), LoraConfig(**{"target_modules": [], **fields}))


def test_a_plan_says_what_of_experts_it_takes() -> None:
    config = LoraConfig(r=4, target_modules=[], target_parameters=["experts.down_proj", "mlp.gate.weight"])
    made = plan(traced("mixtral"), config)
    assert {planned.site.path.rpartition(".")[2] for planned in made.selected} == {"down_proj", "gate"}
    reasons = {entry.site.path.rpartition(".")[2]: entry.reason for entry in made.rejected}
    assert "target_parameters does not name" in reasons["gate_up_proj"]
    site = next(planned for planned in made.selected if planned.stack)
    assert site.parameters == sum(t.numel() for t in peft_tensors("mixtral", site.site.path))
    assert f"r=4, {site.stack} matrices" in str(made)
    with pytest.warns(UserWarning, match="target_parameters 'absent' matches no parameter"):
        plan(traced("mixtral"), config.changed(target_parameters=["experts.down_proj", "absent"]))
    with pytest.warns(UserWarning, match="does not concern target_parameters, as in PEFT"):
        plan(traced("mixtral"), config.changed(target_modules={"q_proj"}, layers_to_transform=[0]))


def peft_tensors(name: str, path: str) -> list[Tensor]:
    module = path.rpartition(".")[0]
    theirs = in_peft(name, target_parameters=["experts.down_proj"])
    return [p for key, p in theirs.named_parameters() if f"{module}.lora_" in key]


# -- what does not fit ----------------------------------------------------------------------------------------------


def test_experts_that_do_not_match_are_an_error(tmp_path: Path) -> None:
    saved_by_peft("mixtral", tmp_path / "adapter")
    model = tiny_decoder("MixtralForCausalLM", num_local_experts=3)
    other = trace(model)
    with pytest.raises(CheckpointError, match=r"has shape .* instead of .*: .*gate_up_proj has 3 matrices of"):
        GraloraModel.from_pretrained(other, tmp_path / "adapter")
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(
        CheckpointError, match=r"experts.*down_proj has shape \[3, .* that of the adapter's \d matrices"
    ):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    export_onnx(other, tmp_path / "export", verify=False)
    with pytest.raises(MergeError, match=r"down_proj: the export has 3 matrices of .*, and the adapter \d of"):
        fold_onnx(tmp_path / "export", tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_a_base_with_fewer_layers_is_refused_as_that_of_linear_layers_is(tmp_path: Path) -> None:
    model = tiny_decoder("MixtralForCausalLM", num_hidden_layers=base("mixtral").config.num_hidden_layers + 1)
    model.save_pretrained(tmp_path / "base")
    export_onnx(trace(model), tmp_path / "export", verify=False)
    linear = {"target_modules": ["q_proj"], "target_parameters": None}
    for name, fields in {"self_attn.q_proj": linear, "mlp.experts.down_proj": {}}.items():
        adapter = tmp_path / name
        saved_by_peft("mixtral", adapter, **fields)
        text = rf"there are no tensors of model\.layers\.2\.{name}.*, which the configuration selects"
        with pytest.raises(CheckpointError, match=text):
            merge_checkpoint(tmp_path / "base", adapter, tmp_path / "merged")
        with pytest.raises(CheckpointError, match=text):
            fold_onnx(tmp_path / "export", adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_experts_cannot_be_data_of_an_export(tmp_path: Path) -> None:
    ours = rewrite(traced("mixtral"), LoraConfig(r=2, target_modules=[], target_parameters=[*UP_AND_DOWN]))
    with pytest.raises(ExportError, match=r"parameters of the model's own code.*gate_up_proj.*adapters='merged'"):
        export_onnx(ours, tmp_path / "export", adapters="swappable")


def test_an_adapter_that_gets_no_gradient_is_named_once() -> None:
    """Tokens of one kind are routed to the same experts, so that others get none in the first step."""
    model = rewrite(traced("mixtral"), LoraConfig(target_modules=[], target_parameters=[*UP_AND_DOWN]))
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    inputs = torch.full((1, 4), 5)
    model(input_ids=inputs, labels=inputs).loss.backward()
    with pytest.warns(
        UserWarning, match=r"in the first step, adapter 'default' got no gradient at .*\(matrices .* of \d\)"
    ):
        optimizer.step()
    optimizer.step()  # a warning is an error here
    assert (tuple(model.adapters_at("model.layers.0.mlp.experts.down_proj"))) == ("default",)


def test_a_layer_that_the_loss_does_not_depend_on_is_named() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.used(x), self.idle(x)

    model = rewrite(trace(Half(), {"x": torch.ones(2, 4)}), LoraConfig(r=2, target_modules="all-linear")).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(x=torch.ones(2, 4))[0].sum().backward()
    with pytest.warns(UserWarning, match="got no gradient at idle: the loss does not depend on it"):
        optimizer.step()


# -- exports ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "nemotron-h"])
def test_an_adapter_is_folded_into_the_experts_of_an_export(name: str, tmp_path: Path) -> None:
    """As PEFT saved it: which of its tensors are of which parameter is told by the widths."""
    export_onnx(traced(name), tmp_path / "base")
    theirs = saved_by_peft(name, tmp_path / "adapter")
    report = fold_onnx(tmp_path / "base", tmp_path / "adapter", tmp_path / "folded")
    assert {site.path.rpartition(".")[2] for site in report.sites} == {n.rpartition(".")[2] for n in MODELS[name][1]}
    inputs = ids(base(name))
    assert error(outputs(tmp_path / "folded", inputs), logits(theirs, inputs)) < 1e-4
    assert error(outputs(tmp_path / "base", inputs), logits(base(name), inputs)) < 1e-4
    with pytest.raises(MergeError, match="folded into the export already"):
        fold_onnx(tmp_path / "folded", tmp_path / "adapter", tmp_path / "twice")


def outputs(directory: Path, inputs: Tensor) -> Tensor:
    session = load(directory)
    result = session(input_ids=inputs.numpy(), attention_mask=np.ones(inputs.shape, np.int64))
    return torch.from_numpy(np.asarray(result["logits"]))


def test_a_merged_export_has_the_experts_in_four_bits(tmp_path: Path) -> None:
    model = GraloraModel.from_pretrained(traced("mixtral"), saved_twice(tmp_path))
    report = export_onnx(model, tmp_path / "int4", quantize="int4")
    assert report.experts is not None
    assert report.experts.fused == 2
    with pytest.raises(MergeError, match=r"experts: no initializer of floats has the name of its parameter"):
        fold_onnx(tmp_path / "int4", tmp_path / "other", tmp_path / "folded")


def saved_twice(directory: Path) -> Path:
    saved_by_peft("mixtral", directory / "adapter")
    saved_by_peft("mixtral", directory / "other", r=2)
    return directory / "adapter"


def test_the_only_expert_stored_in_out_is_adapted() -> None:
    """In PEFT the update has the other orientation, and does not fit."""

    class Only(nn.Module):
        is_transposed = True

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(1, 6, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight[0]

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = Only()

        def forward(self, x: Tensor) -> Tensor:
            return self.experts(x)

    x = torch.randn(3, 6)
    for config in (
        LoraConfig(r=2, target_modules=[], target_parameters=["experts.weight"], init_lora_weights=False),
        GraloraConfig(r=2, target_modules=[], target_parameters=["experts.weight"], init_weights=False),
    ):
        model = rewrite(trace(Outer(), {"x": x}), config)
        assert torch.allclose(model(x=x), merge(model)(x=x), atol=1e-6)
        assert not torch.allclose(model(x=x), model.traced(x=x))

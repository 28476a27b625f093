"""Plain LoRA: what it draws, what it refuses, and how it stands beside GraLoRA; the rest is in the parity grid."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_oracle import peft_model
from safetensors.torch import load_file, save_file
from tiny_models import text_batch, tiny_model
from torch import nn
from traces import fresh_trace, main_output, relative_error, run, traced

from gralora_fx import GraloraConfig, GraloraModel, LoraConfig, merge, plan, rewrite
from gralora_fx.core.methods import config_from_peft, method_of, read_config
from gralora_fx.core.methods.gralora import Factors
from gralora_fx.core.methods.lora import LoraFactors
from gralora_fx.errors import CheckpointError, ConfigError, MergeError, TargetError

pytestmark = pytest.mark.quick

BOTH = ["q_proj", "v_proj"]


@pytest.mark.parametrize("initial", [True, False, "gaussian"])
def test_initial_draws_are_pefts(initial: bool | str) -> None:
    config = peft.LoraConfig(r=6, init_lora_weights=initial, target_modules=["0"])
    torch.manual_seed(3)
    layer = peft.get_peft_model(nn.Sequential(nn.Linear(24, 48)), config).base_model.model[0]
    ours = LoraConfig(r=6, init_lora_weights=initial)
    torch.manual_seed(3)
    nn.Linear(24, 48)
    sizes, scale = method_of(ours).sizes(ours, lambda name: getattr(ours, name))
    drawn = method_of(ours).initial((24, 48), sizes, ours, weight=lambda: torch.zeros(48, 24), scale=scale)
    assert isinstance(drawn, LoraFactors)
    assert torch.equal(drawn.A, layer.lora_A["default"].weight)
    assert torch.equal(drawn.B, layer.lora_B["default"].weight)
    assert drawn.is_zero is (initial is not False)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"r": 0}, "r must be a positive integer, but got 0"),
        ({"lora_alpha": "8"}, "lora_alpha must be a finite number, but got '8'"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\), but got 1.0"),
        ({"bias": "gralora_only"}, "bias must be one of none, all, lora_only, but got 'gralora_only'"),
        ({"use_rslora": 1}, "use_rslora must be True or False, but got 1"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights must be True, False or 'gaussian', but got 'pissa'"),
        ({"init_lora_weights": 1}, "init_lora_weights must be True, False or 'gaussian', but got 1"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\] must be a positive integer"),
        ({"alpha_pattern": {"q": "1"}}, r"alpha_pattern\['q'\] must be a finite number"),
        ({"layers_pattern": "h"}, "layers_pattern='h' has no effect without layers_to_transform"),
    ],
)
def test_a_bad_field_is_named(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        LoraConfig(**fields)


OTHER_FORMS = {
    "use_qalora": True,
    "lora_bias": True,
    "layer_replication": [[0, 2]],
    "trainable_token_indices": [3],
    "megatron_config": {"x": 1},
    "ensure_weight_tying": True,
}


@pytest.mark.parametrize("name", OTHER_FORMS)
def test_another_form_of_lora_is_refused_by_name(name: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=BOTH, task_type="CAUSAL_LM")
    setattr(config, name, OTHER_FORMS[name])
    with pytest.raises(ConfigError, match=rf"{name}=.*\(.*\) is not supported in a LoRA configuration"):
        LoraConfig.from_peft(config)
    config = peft.LoraConfig(r=4, target_modules=BOTH)
    config.save_pretrained(str(tmp_path))
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**fields, name: OTHER_FORMS[name]}))
    with pytest.raises(ConfigError, match=rf"adapter_config.json: {name}="):
        read_config(tmp_path)


@pytest.mark.parametrize("name", ["kasa_config", "velora_config", "arrow_config", "use_bdlora", "monteclora_config"])
def test_a_form_with_a_configuration_of_its_own_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}="):
        LoraConfig.from_fields({"peft_type": "LORA", "r": 4, name: {"some": "field"}}, "a file")


@pytest.mark.parametrize("name", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga"])
def test_a_start_that_changes_the_base_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' took part of the base's weights.*path_initial_model_for_weight"):
        LoraConfig.from_fields({"peft_type": "LORA", "init_lora_weights": name}, "a file")


@pytest.mark.parametrize("name", ["eva", "orthogonal", "mica"])
def test_a_start_that_leaves_the_base_alone_is_read(name: str) -> None:
    with pytest.warns(UserWarning, match=f"'{name}' concerns a fresh adapter only"):
        config = LoraConfig.from_fields({"peft_type": "LORA", "init_lora_weights": name}, "a file")
    assert config.init_lora_weights is True


def test_what_peft_writes_is_read_without_a_warning(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    peft.LoraConfig(
        r=4, lora_alpha=3, use_rslora=True, target_modules=BOTH, rank_pattern={"q_proj": 2}, bias="lora_only"
    ).save_pretrained(str(tmp_path))
    recwarn.clear()
    config = read_config(tmp_path)
    assert config == LoraConfig(
        r=4, lora_alpha=3, use_rslora=True, target_modules=BOTH, rank_pattern={"q_proj": 2}, bias="lora_only"
    )
    assert not recwarn.list


def test_what_is_written_is_read_by_peft(tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=BOTH, exclude_modules=["layers.0"])
    config.save_pretrained(tmp_path)
    theirs = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(theirs, peft.LoraConfig)
    assert (theirs.r, theirs.lora_alpha, theirs.use_rslora) == (4, 3, True)
    assert (theirs.target_modules, theirs.exclude_modules) == (set(BOTH), {"layers.0"})
    assert config_from_peft(theirs) == config


def test_a_configuration_of_the_other_method_names_both(tmp_path: Path) -> None:
    LoraConfig().save_pretrained(tmp_path / "lora")
    GraloraConfig().save_pretrained(tmp_path / "gralora")
    with pytest.raises(ConfigError, match="peft_type is 'LORA', not 'GRALORA'; give a GraLoRA adapter"):
        GraloraConfig.from_pretrained(tmp_path / "lora")
    with pytest.raises(ConfigError, match="peft_type is 'GRALORA', not 'LORA'; give a LoRA adapter"):
        LoraConfig.from_pretrained(tmp_path / "gralora")
    assert isinstance(read_config(tmp_path / "lora"), LoraConfig)
    assert isinstance(read_config(tmp_path / "gralora"), GraloraConfig)


def test_the_plan_shows_the_rank_of_each_site() -> None:
    table = str(plan(traced("llama"), LoraConfig(target_modules=BOTH, rank_pattern={"q_proj": 3})))
    assert "  r=3\n" in table
    assert "  r=8\n" in table
    assert "k=" not in table


def test_a_key_of_a_pattern_that_matches_nothing_is_named_in_a_warning() -> None:
    """PEFT ignores it; GraLoRA's patterns are an extension of this package, where it is an error."""
    with pytest.warns(UserWarning, match="rank_pattern key 'k_proj' applies to no adapted layer; nearest names: "):
        made = plan(traced("llama"), LoraConfig(target_modules=BOTH, rank_pattern={"k_proj": 3}))
    assert {planned.r for planned in made.selected} == {8}
    with pytest.raises(TargetError, match="rank_pattern key 'k_proj' applies to no adapted layer"):
        plan(traced("llama"), GraloraConfig(target_modules=BOTH, rank_pattern={"k_proj": 4}))


def test_an_exclusion_that_matches_nothing_is_named_in_a_warning() -> None:
    with pytest.warns(UserWarning, match="exclude_modules 'absent' matches no module"):
        made = plan(traced("llama"), LoraConfig(target_modules=BOTH, exclude_modules=["absent"]))
    assert len(made.selected) == 4
    with pytest.raises(TargetError, match="exclude_modules 'absent' matches no module"):
        plan(traced("llama"), GraloraConfig(r=4, target_modules=BOTH, exclude_modules=["absent"]))


def test_all_linear_of_a_mixture_means_its_experts_as_in_peft(tmp_path: Path) -> None:
    """PEFT makes `target_parameters` of it, and doubles the rank of what are two matrices in one."""
    peft_model(tiny_model("mixtral"), method="LORA", r=4, target_modules="all-linear").save_pretrained(str(tmp_path))
    config = read_config(tmp_path)
    assert set(config.target_parameters or ()) == {"down_proj", "gate.weight", "gate_up_proj"}
    ranks = {entry.site.path.rpartition(".")[2]: entry.r for entry in plan(traced("mixtral"), config).selected}
    assert ranks["gate_up_proj"] == 8
    assert ranks["down_proj"] == ranks["gate"] == ranks["q_proj"] == 4


def test_an_embedding_is_refused_by_name() -> None:
    with pytest.raises(TargetError, match=r"model\.embed_tokens is an Embedding, not a linear layer"):
        plan(traced("llama"), LoraConfig(target_modules=["q_proj", "embed_tokens"]))


# -- beside GraLoRA -----------------------------------------------------------------------------------------------


@pytest.fixture
def mixed() -> GraloraModel:
    """One graph with a LoRA and a GraLoRA adapter, which share `q_proj`."""
    torch.manual_seed(0)
    model = rewrite(fresh_trace("llama"), LoraConfig(target_modules=BOTH, init_lora_weights=False), adapter_name="lora")
    model.add_adapter(
        "gralora", GraloraConfig(r=8, hybrid_r=2, target_modules=["q_proj", "o_proj"], init_weights=False)
    )
    return model


def alone(directory: Path, name: str) -> peft.PeftModel:
    return peft.PeftModel.from_pretrained(tiny_model("llama"), str(directory / name)).eval()


def test_both_methods_act_side_by_side(mixed: GraloraModel, tmp_path: Path) -> None:
    """The oracle: PEFT folds one into the base, and runs the other on top of that."""
    mixed.save_pretrained(tmp_path)
    inputs = text_batch()
    base = alone(tmp_path, "lora").merge_and_unload()
    with torch.no_grad():
        expected = main_output(peft.PeftModel.from_pretrained(base, str(tmp_path / "gralora")).eval()(**inputs))
    mixed.set_adapter(["lora", "gralora"])
    path = "model.layers.0.self_attn.q_proj"
    assert [type(mixed.factors(path, name)) for name in ("lora", "gralora")] == [LoraFactors, Factors]
    assert relative_error(run(mixed, inputs), expected) < 1e-5
    assert relative_error(run(merge(mixed), inputs), expected) < 1e-5
    mixed.merge_adapter(["lora"])
    assert relative_error(run(mixed, inputs), expected) < 1e-5
    mixed.unmerge_adapter()
    for name in ("lora", "gralora"):
        mixed.set_adapter(name)
        assert relative_error(run(mixed, inputs), run(alone(tmp_path, name), inputs)) < 1e-5
    with mixed.disable_adapter():
        assert torch.equal(run(mixed, inputs), run(mixed.traced, inputs))


def test_both_methods_train_together(mixed: GraloraModel) -> None:
    mixed.set_adapter(["lora", "gralora"])
    mixed.train()
    main_output(mixed(**text_batch())).square().mean().backward()
    for name in ("lora", "gralora"):
        assert all(p.grad is not None and bool(p.grad.any()) for p in mixed.adapter(name).parameters()), name


def test_a_sum_of_lora_adapters_is_a_lora_adapter(mixed: GraloraModel, tmp_path: Path) -> None:
    mixed.add_adapter("other", LoraConfig(r=3, use_rslora=True, target_modules=["v_proj"], init_lora_weights=False))
    mixed.add_weighted_adapter(["lora", "other"], [0.5, -2.0], "sum")
    assert isinstance(mixed.configs["sum"], LoraConfig)
    assert mixed.configs["sum"].scale == 1.0
    for path in sites_of(mixed, "sum"):
        expected = sum(
            (
                w * mixed.delta_weight(path, n)
                for n, w in (("lora", 0.5), ("other", -2.0))
                if path in sites_of(mixed, n)
            ),
            torch.zeros(()),
        )
        assert torch.allclose(mixed.delta_weight(path, "sum"), expected, atol=1e-6), path
    mixed.set_adapter("sum")
    mixed.save_pretrained(tmp_path, ["sum"])
    inputs = text_batch()
    assert relative_error(run(mixed, inputs), run(alone(tmp_path, "sum"), inputs)) < 1e-5


def test_a_sum_of_both_methods_is_a_gralora_adapter(mixed: GraloraModel, tmp_path: Path) -> None:
    mixed.add_weighted_adapter(["lora", "gralora"], [0.5, 1.5], "sum")
    config = mixed.configs["sum"]
    assert isinstance(config, GraloraConfig)
    assert (config.r, config.gralora_k, config.hybrid_r) == (8, 2, 10)
    for path in sites_of(mixed, "sum"):
        named = [(n, w) for n, w in (("lora", 0.5), ("gralora", 1.5)) if path in sites_of(mixed, n)]
        expected = sum((w * mixed.delta_weight(path, n) for n, w in named), torch.zeros(()))
        assert torch.allclose(mixed.delta_weight(path, "sum"), expected, atol=1e-6), path
    mixed.set_adapter("sum")
    mixed.save_pretrained(tmp_path, ["sum"])
    inputs = text_batch()
    assert relative_error(run(mixed, inputs), run(alone(tmp_path, "sum"), inputs)) < 1e-5


def sites_of(model: GraloraModel, name: str) -> set[str]:
    return {planned.site.path for planned in model.plans[name].selected}


def test_an_adapter_of_the_other_method_is_not_loaded_over_one(mixed: GraloraModel, tmp_path: Path) -> None:
    mixed.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="adapter 'lora' exists with another configuration"):
        mixed.load_adapter(tmp_path / "gralora", "lora")
    mixed.load_adapter(tmp_path / "lora", "again")
    assert mixed.configs["again"].peft_type == "LORA"


def test_pictures_and_texts_name_the_sizes_of_each(mixed: GraloraModel) -> None:
    assert "lora (active): r=8, 4 sites" in repr(mixed)
    assert "gralora (waiting): r=8 k=2 hybrid_r=2, 4 sites" in repr(mixed)
    assert mixed.block_norms("model.layers.0.self_attn.v_proj", "lora").shape == (1, 1)


# -- checkpoints --------------------------------------------------------------------------------------------------


def test_an_edited_scale_is_refused(mixed: GraloraModel, tmp_path: Path) -> None:
    mixed.save_pretrained(tmp_path, ["lora"])
    file = next(tmp_path.rglob("adapter_config.json"))
    file.write_text(file.read_text().replace('"use_rslora": false', '"use_rslora": true'))
    with pytest.raises(CheckpointError, match=r"use_rslora is True in adapter_config\.json, but the tensors were"):
        GraloraModel.from_pretrained(fresh_trace("llama"), file.parent)


def test_damaged_tensors_are_named(tmp_path: Path) -> None:
    theirs = peft_model(tiny_model("llama"), method="LORA", r=4, target_modules=BOTH)
    theirs.save_pretrained(str(tmp_path))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    for damaged, expected in (
        ({k: t for k, t in tensors.items() if k != key}, f"missing {key}"),
        ({**tensors, key: tensors[key][:2]}, rf"{key} has shape \[2, 32\] instead of \[4, 32\]"),
        ({**tensors, f"{key}.x": tensors[key].clone()}, f"unexpected {key}.x"),
    ):
        save_file({k: t.contiguous() for k, t in damaged.items()}, tmp_path / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match=expected):
            GraloraModel.from_pretrained(fresh_trace("llama"), tmp_path)


def test_a_damaged_update_is_not_merged(mixed: GraloraModel) -> None:
    before = copy.deepcopy(dict(mixed.traced.tree.parameters))
    with torch.no_grad():
        mixed.factors("model.layers.0.self_attn.q_proj", "lora").A[0, 0] = float("nan")  # type: ignore[attr-defined]
    with pytest.raises(MergeError, match=r"model\.layers\.0\.self_attn\.q_proj is not finite"):
        merge(mixed)
    assert all(torch.equal(before[name], p) for name, p in mixed.traced.tree.parameters.items())

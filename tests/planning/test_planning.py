"""`plan`: a table of what is taken and why the rest is not, or every problem at once."""

from __future__ import annotations

import re
import warnings
from typing import Any

import peft
import pytest
import torch
from peft_oracle import peft_model
from tiny_models import TINY, tiny_model
from torch import Tensor, nn
from traces import source, traced

from gralora_fx import GraloraConfig, LoraConfig, RewritePlan, plan, trace
from gralora_fx.errors import TargetError


def planned(name: str, **fields: Any) -> RewritePlan:
    return plan(traced(name), GraloraConfig(**{"r": 8, **fields}))


# -- what a plan says ---------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_a_plan_prints_as_a_table() -> None:
    text = str(planned("gpt2", target_modules=["c_attn"], hybrid_r=4, layers_to_transform=[0]))
    assert (
        text
        == """\
site                         kind     in  out  calls  adapter
transformer.h.0.attn.c_attn  conv1d   32   96      1  r=8 k=2 hybrid_r=4
transformer.h.0.attn.c_proj  conv1d   32   32      1  - target_modules does not name it
transformer.h.0.mlp.c_fc     conv1d   32  128      1  - target_modules does not name it
transformer.h.0.mlp.c_proj   conv1d  128   32      1  - target_modules does not name it
transformer.h.1.attn.c_attn  conv1d   32   96      1  - layer 1 is not in layers_to_transform
transformer.h.1.attn.c_proj  conv1d   32   32      1  - target_modules does not name it
transformer.h.1.mlp.c_fc     conv1d   32  128      1  - target_modules does not name it
transformer.h.1.mlp.c_proj   conv1d  128   32      1  - target_modules does not name it
lm_head                      linear   32  101      1  - target_modules does not name it
1 of 9 sites adapted; trainable parameters: 1,536 of 32,288 (4.76 %)"""
    )


def test_every_site_is_selected_or_rejected_with_a_reason() -> None:
    result = planned("bert", target_modules=["query", "value"], layers_to_transform=[1])
    taken = [entry.site.path for entry in result.selected]
    left = {entry.site.path: entry.reason for entry in result.rejected}
    assert taken == [f"bert.encoder.layer.1.attention.self.{end}" for end in ("query", "value")]
    assert sorted([*taken, *left]) == sorted(site.path for site in traced("bert").sites)
    assert left["bert.encoder.layer.0.attention.self.query"] == "layer 0 is not in layers_to_transform"
    assert left["classifier"] == "target_modules does not name it"
    assert all(left.values())


def test_sizes_of_a_selected_site() -> None:
    entry = planned("gpt2", target_modules=["c_attn"], hybrid_r=4).selected[0]
    assert (entry.r, entry.k, entry.hybrid_r) == (8, 2, 4)
    assert entry.parameters == (8 + 4) * (32 + 96)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["query"], "hybrid_r": 4},
        {"target_modules": ["query"], "task_type": "SEQ_CLS"},
        {"target_modules": ["query", "dense"], "bias": "gralora_only"},
        {"target_modules": ["query"], "bias": "all"},
    ],
    ids=str,
)
def test_the_number_of_trainable_values_is_pefts(fields: dict[str, Any]) -> None:
    result = planned("bert", **fields)
    theirs = peft_model(tiny_model("bert"), r=8, **fields)
    trainable, total = theirs.get_nb_trainable_parameters()
    assert result.trainable_parameters == trainable
    # PEFT trains the base's biases themselves, we a copy
    assert result.total_parameters == total + result.bias_parameters


def test_tied_weights_are_counted_once() -> None:
    result = planned("gpt2", target_modules=["c_attn"])
    assert result.base_parameters == sum(p.numel() for p in source("gpt2").parameters())


@pytest.mark.filterwarnings("ignore:modules_to_save 'norm' matches no module")  # of those that have no `norm`
@pytest.mark.parametrize("name", TINY)
def test_planning_changes_nothing(name: str) -> None:
    text = str(traced(name).graph_module.graph)
    before = {key: (id(p), p.requires_grad, p._version) for key, p in source(name).named_parameters()}
    planned(name, target_modules="all-linear", bias="all", modules_to_save=["norm"])
    assert str(traced(name).graph_module.graph) == text
    assert {key: (id(p), p.requires_grad, p._version) for key, p in source(name).named_parameters()} == before


def test_moe_experts_are_reported() -> None:
    result = planned("mixtral", target_modules="all-linear")
    experts = {entry.site.path: entry.reason for entry in result.rejected if "experts" in entry.site.path}
    assert experts
    assert all("a parameter of stacked matrices" in reason for reason in experts.values())
    assert "a parameter of stacked matrices" in str(result)


def test_the_output_embedding_is_rejected_with_its_reason() -> None:
    left = {entry.site.path: entry.reason for entry in planned("llama", target_modules="all-linear").rejected}
    assert left == {"lm_head": "it is the output embedding, which all-linear leaves out; name it to adapt it"}


def test_the_classification_head_is_rejected_with_its_reason() -> None:
    result = planned("bert", target_modules="all-linear", task_type="SEQ_CLS")
    left = {entry.site.path: entry.reason for entry in result.rejected}
    assert left == {"classifier": "it belongs to modules_to_save (classifier)"}
    assert result.saved_modules == ("classifier",)
    assert str(result).count("trains a copy of classifier") == 1


def test_a_layer_that_modules_to_save_takes_by_its_ending_is_not_adapted_too() -> None:
    """PEFT fails here: it wraps DistilBERT's pre_classifier twice."""
    result = planned("distilbert", target_modules="all-linear", task_type="SEQ_CLS")
    assert set(result.saved_modules) == {"classifier", "pre_classifier"}
    left = {entry.site.path: entry.reason for entry in result.rejected}
    assert left["pre_classifier"] == "pre_classifier trains as a whole, since modules_to_save selects it"
    assert all(not entry.site.path.endswith("classifier") for entry in result.selected)


# -- what cannot be met -------------------------------------------------------------------------------------------


def problem(name: str, **fields: Any) -> str:
    with pytest.raises(TargetError) as caught:
        planned(name, **fields)
    return str(caught.value)


def test_a_name_that_matches_nothing_gets_the_nearest() -> None:
    text = problem("bert", target_modules=["qeury"])
    assert re.fullmatch(r"target_modules 'qeury' matches no module; nearest names: query(, \w+)*", text)


def test_every_name_of_a_list_that_matches_nothing_is_named() -> None:
    text = problem("llama", target_modules=["q_prj", "xyzzy"])
    assert text.startswith("2 problems:\n")
    assert "- target_modules 'q_prj' matches no module; nearest names: q_proj" in text
    assert "- target_modules 'xyzzy' matches no module; the table of plan(traced, config), with" in text


def test_one_name_of_a_list_that_matches_nothing_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="target_modules 'qeury' matches no module; nearest names: query") as caught:
        result = planned("bert", target_modules=["qeury", "value"])
    assert len(result.selected) == 2
    assert len(caught) == 1


def test_a_pattern_that_matches_nothing_lists_the_layers() -> None:
    assert problem("bert", target_modules=r".*\.q_proj") == (
        r"target_modules '.*\\.q_proj' matches no whole module path; the linear layers are called "
        "query, key, value, dense, classifier"
    )


def test_a_pattern_that_matches_a_part_only_matches_nothing() -> None:
    assert "matches no whole module path" in problem("bert", target_modules="query")


def test_widths_that_k_does_not_divide_name_every_site() -> None:
    text = problem("vit", target_modules="all-linear", r=10, gralora_k=5)
    paths = [site.path for site in traced("vit").sites]
    assert text.startswith(f"{len(paths)} problems:\n")
    for site in traced("vit").sites:
        assert (
            f"- {site.path}: in_features={site.in_features}, out_features={site.out_features} must both be divisible "
            "by gralora_k=5; take another gralora_k or gralora_k_pattern, or leave the layer out with exclude_modules"
        ) in text


def test_one_width_is_enough() -> None:
    text = problem("bert", target_modules=["query", "classifier"], r=8, gralora_k=4)
    assert text == (
        "classifier: in_features=32, out_features=2 must both be divisible by gralora_k=4; "
        "take another gralora_k or gralora_k_pattern, or leave the layer out with exclude_modules"
    )


@pytest.mark.parametrize("layers", [7, [7], [7, 9]], ids=str)
def test_no_layer_of_that_index(layers: Any) -> None:
    asked = [layers] if isinstance(layers, int) else layers
    assert problem("llama", target_modules=["q_proj"], layers_to_transform=layers) == (
        f"layers_to_transform {asked} names no layer that exists; there are 0 to 1"
    )


def test_a_missing_layer_among_others_is_a_warning_that_names_it() -> None:
    with pytest.warns(
        UserWarning, match=re.escape("layers_to_transform [5] does not exist and is skipped; there are 0 to 1")
    ):
        result = planned("llama", target_modules=["q_proj"], layers_to_transform=[1, 5])
    assert [entry.site.path for entry in result.selected] == ["model.layers.1.self_attn.q_proj"]


def test_a_container_that_does_not_exist_lists_those_that_do() -> None:
    text = problem("gpt2", target_modules=["c_attn"], layers_to_transform=[0], layers_pattern="blocks")
    assert text == (
        "layers_to_transform [0] with layers_pattern ['blocks'] finds no numbered layers; "
        "the containers with numbered children are: h"
    )


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ["self"],
            r"bert\.encoder\.layer\.0\.attention\.self is a BertSelfAttention, not a linear layer; "
            "name its linear layers, such as query, key, value",
        ),
        (["LayerNorm"], r"bert\.embeddings\.LayerNorm is a LayerNorm, not a linear layer; leave it out"),
        (["query", "word_embeddings"], r"bert\.embeddings\.word_embeddings is a\w* \w*Embedding, not a linear layer"),
        (r"bert\.pooler", r"bert\.pooler is a BertPooler, not a linear layer; name its linear layers, such as dense"),
    ],
    ids=["container", "norm", "embedding", "pattern"],
)
def test_a_named_module_that_is_not_a_linear_layer(targets: Any, message: str) -> None:
    assert re.search(message, problem("bert", target_modules=targets))


@pytest.mark.quick
def test_all_problems_at_once() -> None:
    text = problem("bert", target_modules=["classifier", "pooler", "query"], r=8, gralora_k=4)
    assert text.startswith("2 problems:")
    assert "bert.pooler is a BertPooler" in text
    assert "classifier: in_features=32, out_features=2" in text
    assert "query" not in text.replace("such as", "")


def test_targets_that_modules_to_save_takes_whole() -> None:
    text = problem("bert", target_modules=["classifier"], modules_to_save=["classifier"])
    assert text == ("every module that target_modules names is left out: it belongs to modules_to_save (classifier)")


def test_a_target_that_modules_to_save_takes_by_its_ending_alone() -> None:
    text = problem("distilbert", target_modules=["pre_classifier"], modules_to_save=["classifier"])
    assert "pre_classifier trains as a whole" in text


class NoLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def test_a_model_without_linear_layers() -> None:
    result = trace(NoLinear(), (torch.ones(2, 4),))
    with pytest.raises(TargetError, match="the model has no linear layer to adapt"):
        plan(result, GraloraConfig(target_modules="all-linear"))
    with pytest.raises(TargetError, match="the linear layers are called nothing: the model has none"):
        plan(result, GraloraConfig(target_modules="fc.*"))


def test_all_linear_of_a_model_with_functional_calls_alone_names_them() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.w)

    result = trace(Functional(), (torch.ones(2, 4),))
    with pytest.raises(TargetError, match="no linear layer to adapt; name its functional calls to adapt them: w"):
        plan(result, GraloraConfig(target_modules="all-linear"))


def test_a_plain_module_has_no_default_targets() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    with pytest.raises(TargetError, match=r"for example \['fc'\], or take 'all-linear'"):
        plan(trace(Plain(), (torch.ones(2, 4),)), GraloraConfig())


def test_modules_to_save_that_match_nothing_are_pefts_business() -> None:
    """PEFT takes names that no module has: a task type adds both `classifier` and `score`."""
    with pytest.warns(UserWarning, match="modules_to_save 'nowhere' matches no module"):
        assert planned("bert", target_modules=["query"], modules_to_save=["nowhere"]).saved_modules == ()
    peft_model(tiny_model("bert"), target_modules=["query"], modules_to_save=["nowhere"])


def test_layers_of_a_target_outside_all_layers() -> None:
    config = GraloraConfig(r=4, target_modules=["classifier", "query"], layers_to_transform=[0])
    assert {p.site.path for p in plan(traced("bert"), config).selected} == {
        "bert.encoder.layer.0.attention.self.query",
        "classifier",
    }


@pytest.mark.parametrize(("model", "config"), [(None, GraloraConfig()), (nn.Linear(2, 2), GraloraConfig())])
def test_only_traced_models_are_planned(model: Any, config: GraloraConfig) -> None:
    with pytest.raises(TargetError, match="trace it first: call trace\\(\\)"):
        plan(model, config)


def test_a_parameter_with_two_names_trains_once() -> None:
    import transformers

    model = transformers.BertForMaskedLM(tiny_model("bert").config)
    config = GraloraConfig(r=4, target_modules=["query"], bias="all")
    wrapped = peft_model(transformers.BertForMaskedLM(model.config), r=4, target_modules=["query"], bias="all")
    trainable = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert plan(trace(model), config).trainable_parameters == trainable


# -- beyond PEFT's GraLoRA ----------------------------------------------------------------------------------------

ALL = ["query", "key", "value", "dense"]


def sizes(result: RewritePlan) -> dict[str, tuple[int, int, int, float]]:
    return {entry.site.path: (entry.r, entry.k, entry.hybrid_r, entry.scale) for entry in result.selected}


def test_patterns_set_the_sizes_of_the_layers_they_name() -> None:
    actual = sizes(
        planned(
            "bert",
            target_modules=ALL,
            hybrid_r=2,
            alpha=20,
            rank_pattern={"query": 4, "bert.encoder.layer.0.attention.self.query": 6, r"layer\.1\..*\.key": 12},
            alpha_pattern={"value": 5, "intermediate.dense": 30},
            gralora_k_pattern={r"1\.attention\.self\.(key|value)": 4},
        )
    )
    attention = "bert.encoder.layer.{}.attention.self.{}".format
    assert actual[attention(0, "query")] == (6, 2, 2, 20 / 8)  # the whole path counts before the end of one
    assert actual[attention(1, "query")] == (4, 2, 2, 20 / 6)
    assert actual[attention(0, "key")] == (8, 2, 2, 2.0)
    assert actual[attention(1, "key")] == (12, 4, 2, 20 / 14)
    assert actual[attention(0, "value")] == (8, 2, 2, 0.5)
    assert actual[attention(1, "value")] == (8, 4, 2, 0.5)
    assert actual["bert.encoder.layer.1.intermediate.dense"] == (8, 2, 2, 3.0)
    assert actual["bert.encoder.layer.1.output.dense"] == (8, 2, 2, 2.0)


def test_a_width_that_k_does_not_divide_gets_its_own_k() -> None:
    actual = sizes(
        planned("bert", target_modules=["query", "classifier"], gralora_k=4, gralora_k_pattern={"classifier": 2})
    )
    assert actual["classifier"] == (8, 2, 0, 8.0)
    assert actual["bert.encoder.layer.0.attention.self.query"][1] == 4


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern", "gralora_k_pattern"])
def test_a_key_that_counts_for_nothing_is_named(field: str) -> None:
    text = problem("bert", target_modules=["query"], **{field: {"qeury": 4, "key": 4, "query": 4}})
    assert f"{field} key 'qeury' applies to no adapted layer; nearest names: query" in text
    assert f"{field} key 'key' applies to no adapted layer" in text
    assert "key 'query'" not in text


def test_ranks_that_a_k_does_not_divide_name_every_site() -> None:
    text = problem("bert", target_modules=["query"], rank_pattern={"0.attention.self.query": 5})
    assert "bert.encoder.layer.0.attention.self.query: r should be divisible by gralora_k, but got 5 and 2" in text
    text = problem("bert", target_modules=["query", "key"], gralora_k_pattern={"query": 3})
    assert text.count("r should be divisible by gralora_k, but got 8 and 3") == 2
    assert text.count("must both be divisible by gralora_k=3") == 2


@pytest.mark.parametrize(
    ("excluded", "taken"),
    [
        (["query"], ["key"]),
        (["layer.0.attention.self.key", "query"], ["key"]),
        (r".*\.query", ["key"]),
        (r".*layer\.1.*", ["query", "key"]),
    ],
    ids=str,
)
def test_excluded_modules_are_left_out_with_that_reason(excluded: Any, taken: list[str]) -> None:
    result = planned("bert", target_modules=["query", "key"], exclude_modules=excluded)
    assert {entry.site.path.rpartition(".")[2] for entry in result.selected} == set(taken)
    reasons = {entry.site.path: entry.reason for entry in result.rejected}
    left = {path for path, reason in reasons.items() if reason == "exclude_modules names it"}
    assert left | {entry.site.path for entry in result.selected} >= {
        f"bert.encoder.layer.{index}.attention.self.{name}" for index in (0, 1) for name in ("query", "key")
    }
    reference = peft_model(tiny_model("bert"), target_modules=["query", "key"], r=8)
    assert len(result.selected) < sum("gralora_A" in name for name, _ in reference.named_parameters())


def test_excluded_modules_are_those_of_pefts_lora() -> None:
    config = peft.LoraConfig(target_modules="all-linear", exclude_modules=["dense", "layer.0.attention.self.query"])
    theirs = peft.get_peft_model(tiny_model("bert"), config)
    result = planned("bert", target_modules="all-linear", exclude_modules=config.exclude_modules)
    assert {f"base_model.model.{entry.site.path}" for entry in result.selected} == {
        name.removesuffix(".lora_A.default") for name, _ in theirs.named_modules() if name.endswith("lora_A.default")
    }


@pytest.mark.parametrize(
    ("excluded", "message"),
    [
        (["qeury"], "exclude_modules 'qeury' matches no module; nearest names: query"),
        ("qeury.*", r"exclude_modules 'qeury.*' matches no whole module path; correct it or leave it out"),
        (["query"], "every module that target_modules names is left out: exclude_modules names it"),
    ],
    ids=str,
)
def test_exclusions_that_cannot_be_meant(excluded: Any, message: str) -> None:
    assert message in problem("bert", target_modules=["query"], exclude_modules=excluded)


@pytest.mark.parametrize(
    ("name", "targets", "fan_in_fan_out", "message"),
    [
        ("gpt2", ["c_attn"], False, "fan_in_fan_out is False, but the adapted layers are Conv1D; it is read as True"),
        ("bert", ["query"], True, "fan_in_fan_out is True, but the adapted layers are Linear; it is read as False"),
    ],
)
def test_fan_in_fan_out_is_corrected_as_peft_corrects_it(
    name: str, targets: list[str], fan_in_fan_out: bool, message: str
) -> None:
    with pytest.warns(UserWarning, match=message) as caught:
        result = planned(name, target_modules=targets, fan_in_fan_out=fan_in_fan_out)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match=f"fan_in_fan_out is set to {fan_in_fan_out} but the target module is"):
        theirs = peft.get_peft_model(
            tiny_model(name), peft.GraloraConfig(target_modules=targets, fan_in_fan_out=fan_in_fan_out)
        )
    assert result.config.fan_in_fan_out == theirs.peft_config["default"].fan_in_fan_out == (not fan_in_fan_out)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        planned(name, target_modules=targets, fan_in_fan_out=not fan_in_fan_out)


def test_a_saved_module_that_does_not_exist_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="modules_to_save 'clasifier' matches no module; nearest names: classifier"):
        planned("bert", target_modules=["query"], modules_to_save=["clasifier"])
    with warnings.catch_warnings():  # PEFT adds both heads for the task, and a model has one
        warnings.simplefilter("error")
        planned("bert", target_modules=["query"], modules_to_save=["classifier", "score"], task_type="SEQ_CLS")


def test_one_of_several_layer_patterns_that_finds_nothing_is_a_warning() -> None:
    with pytest.warns(
        UserWarning, match="layers_pattern 'layers' finds no numbered layers; the containers .* are: layer"
    ):
        planned("bert", target_modules=["query"], layers_to_transform=[0], layers_pattern=["layers", "layer"])


class Heads(nn.Module):
    """A body, and heads of odd widths: one behind it, one behind another head's softmax, one that is a layer twice."""

    def __init__(self, inner: int = 16) -> None:
        super().__init__()
        self.body, self.policy, self.value = nn.Linear(16, inner), nn.Linear(inner, 7), nn.Linear(inner, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.body(x).relu()
        return self.policy(hidden).softmax(-1), self.value(hidden) + self.value(hidden * 2)


def test_all_linear_leaves_out_heads_that_blocks_do_not_fit_with_the_reason() -> None:
    config = GraloraConfig(r=4, gralora_k=2, target_modules="all-linear", init_weights=False)
    found = plan(trace(Heads(), (torch.randn(3, 16),)), config)
    assert [entry.site.path for entry in found.selected] == ["body"]
    reasons = {entry.site.path: entry.reason for entry in found.rejected}
    assert list(reasons) == ["policy", "value"]
    widths = "in_features=16, out_features=7 must both be divisible by gralora_k=2"
    assert reasons["policy"] == f"all-linear leaves out a head that the adapter does not fit: {widths}"
    lora = plan(trace(Heads(), (torch.randn(3, 16),)), LoraConfig(target_modules="all-linear"))
    assert [entry.site.path for entry in lora.selected] == ["body", "policy", "value"]


def test_a_head_that_is_named_or_a_layer_within_is_still_an_error() -> None:
    traced_heads = trace(Heads(), (torch.randn(3, 16),))
    with pytest.raises(TargetError, match="value: in_features=16, out_features=1 must both be divisible by"):
        plan(traced_heads, GraloraConfig(r=4, gralora_k=2, target_modules=["body", "value"]))
    odd = trace(Heads(inner=15), (torch.randn(3, 16),))
    with pytest.raises(TargetError) as caught:
        plan(odd, GraloraConfig(r=4, gralora_k=2, target_modules="all-linear"))
    assert str(caught.value).startswith("3 problems:\n- body: ")
    without = GraloraConfig(r=4, gralora_k=2, target_modules="all-linear", exclude_modules=["body"])
    with pytest.raises(
        TargetError, match=r"every module .* left out: all-linear leaves out a head .*; exclude_modules"
    ):
        plan(odd, without)

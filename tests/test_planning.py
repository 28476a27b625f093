"""`plan`: a table of what is taken and why the rest is not, or every problem at once."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from peft_oracle import peft_model
from tiny_models import TINY, tiny_model
from torch import Tensor, nn
from traces import source, traced

from gralora_fx import GraloraConfig, RewritePlan, plan, trace
from gralora_fx.errors import TargetError


def planned(name: str, **fields: Any) -> RewritePlan:
    return plan(traced(name), GraloraConfig(**{"r": 8, **fields}))


# -- what a plan says ---------------------------------------------------------------------------------------------


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
    assert all("one matrix for each expert" in reason for reason in experts.values())
    assert "one matrix for each expert" in str(result)


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
    assert "- target_modules 'xyzzy' matches no module; print(traced.sites) lists the linear layers" in text


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
            "by gralora_k=5; take another gralora_k or gralora_k_pattern, or leave the layer out"
        ) in text


def test_one_width_is_enough() -> None:
    text = problem("bert", target_modules=["query", "classifier"], r=8, gralora_k=4)
    assert text == (
        "classifier: in_features=32, out_features=2 must both be divisible by gralora_k=4; "
        "take another gralora_k or gralora_k_pattern, or leave the layer out"
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
def test_a_named_module_that_is_no_linear_layer(targets: Any, message: str) -> None:
    assert re.search(message, problem("bert", target_modules=targets))


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
    with pytest.raises(TargetError, match="give what trace\\(\\) returned"):
        plan(model, config)


def test_a_parameter_with_two_names_trains_once() -> None:
    import transformers

    model = transformers.BertForMaskedLM(tiny_model("bert").config)
    config = GraloraConfig(r=4, target_modules=["query"], bias="all")
    wrapped = peft_model(transformers.BertForMaskedLM(model.config), r=4, target_modules=["query"], bias="all")
    trainable = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert plan(trace(model), config).trainable_parameters == trainable

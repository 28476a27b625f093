"""Layers that a configuration takes: the very ones that PEFT takes."""

from __future__ import annotations

import re
from typing import Any

import pytest
from peft.utils.constants import TRANSFORMERS_MODELS_TO_GRALORA_TARGET_MODULES_MAPPING as PEFT_DEFAULTS
from peft_oracle import adapted_paths, peft_model
from tiny_models import TINY, tiny_model
from traces import traced

from gralora_fx import GraloraConfig, plan
from gralora_fx.core.planning.targets import _DEFAULTS, TargetRule, nearest_names, numbered_containers
from gralora_fx.errors import TargetError

ATTENTION = {
    "gpt2": ["c_attn"],
    "falcon": ["query_key_value"],
    "phi3": ["qkv_proj"],
    "t5": ["q", "v"],
    "distilbert": ["q_lin"],
    "mpnet": ["q", "v"],
}
CONTAINERS = {
    "gpt2": "h",
    "falcon": "h",
    "t5": "block",
    "bert": "layer",
    "roberta": "layer",
    "mpnet": "layer",
    "distilbert": "layer",
    "albert": "albert_layer_groups",
}


def attention(name: str) -> list[str]:
    """Return ends of the paths of a model's query layers."""
    if name in ATTENTION:
        return ATTENTION[name]
    ends = {site.path.rpartition(".")[2] for site in traced(name).sites}
    return [end for end in ("query", "q_proj") if end in ends]


def selected(name: str, **fields: Any) -> set[str]:
    config = GraloraConfig(r=4, **fields)
    return {planned.site.path for planned in plan(traced(name), config).selected}


def pefts(name: str, **fields: Any) -> set[str]:
    return adapted_paths(peft_model(tiny_model(name), r=4, **fields))


@pytest.mark.parametrize("name", TINY)
def test_all_linear(name: str) -> None:
    assert selected(name, target_modules="All-Linear") == pefts(name, target_modules="All-Linear")


@pytest.mark.parametrize("name", ["bert", "roberta", "albert", "mpnet"])  # PEFT raises for distilbert
def test_all_linear_of_a_classifier(name: str) -> None:
    fields = {"target_modules": "all-linear", "task_type": "SEQ_CLS"}
    assert selected(name, **fields) == pefts(name, **fields)


@pytest.mark.parametrize("name", TINY)
def test_a_list_of_names(name: str) -> None:
    fields = {"target_modules": attention(name)}
    assert selected(name, **fields) == pefts(name, **fields)
    assert len(selected(name, **fields)) >= 1


@pytest.mark.parametrize("name", TINY)
def test_a_full_path_and_a_suffix_of_two_parts(name: str) -> None:
    paths = sorted(selected(name, target_modules=attention(name)))
    fields = {"target_modules": [paths[0], ".".join(paths[-1].split(".")[-2:])]}
    assert selected(name, **fields) == pefts(name, **fields)


@pytest.mark.parametrize("name", TINY)
def test_a_regular_expression(name: str) -> None:
    pattern = rf".*\.0\..*({'|'.join(attention(name))})"
    assert selected(name, target_modules=pattern) == pefts(name, target_modules=pattern)


@pytest.mark.parametrize("name", TINY)
def test_none_is_pefts_default_or_an_error(name: str) -> None:
    model_type = traced(name).config.model_type
    if model_type not in PEFT_DEFAULTS:
        with pytest.raises(ValueError, match="target_modules"):
            pefts(name, target_modules=None)
        with pytest.raises(TargetError, match=f"no default is known for model type '{model_type}'; name the modules"):
            selected(name, target_modules=None)
    else:
        assert selected(name, target_modules=None) == pefts(name, target_modules=None)


@pytest.mark.parametrize("layers", [0, [1], [0, 1], [0, 0], []], ids=str)
@pytest.mark.parametrize("name", TINY)
def test_layers_without_a_pattern(name: str, layers: Any) -> None:
    fields = {"target_modules": attention(name), "layers_to_transform": layers}
    if name == "albert" and layers == [1]:
        with pytest.raises(TargetError, match="there are 0 to 0"):
            selected(name, **fields)
        return
    if name == "albert" and layers == [0, 1]:
        with pytest.warns(UserWarning, match=r"layers_to_transform \[1\] does not exist and is skipped"):
            assert selected(name, **fields) == pefts(name, **fields)
        return
    assert selected(name, **fields) == pefts(name, **fields)


@pytest.mark.filterwarnings("ignore:layers_pattern 'nowhere' finds no numbered layers")
@pytest.mark.parametrize("as_list", [True, False])
@pytest.mark.parametrize("name", [name for name in TINY if name != "albert"])
def test_layers_with_a_pattern(name: str, as_list: bool) -> None:
    container = CONTAINERS.get(name, "layers")
    fields = {
        "target_modules": attention(name),
        "layers_to_transform": [1],
        "layers_pattern": ["nowhere", container] if as_list else container,
    }
    taken = selected(name, **fields)
    assert taken == pefts(name, **fields)
    assert 0 < len(taken) < len(selected(name, target_modules=attention(name)))


def test_a_path_in_full_is_taken_whatever_its_layer() -> None:
    fields = {"target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"], "layers_to_transform": [1]}
    assert selected("llama", **fields) == pefts("llama", **fields)
    assert selected("llama", **fields) == {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"}


def test_all_linear_with_layers_does_what_it_says() -> None:
    """PEFT ignores the layers here on small models."""
    taken = selected("llama", target_modules="all-linear", layers_to_transform=[1])
    assert taken == {path for path in selected("llama", target_modules="all-linear") if ".layers.1." in path}


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("bert", {"target_modules": ["dense"], "modules_to_save": ["pooler"]}),
        ("bert", {"target_modules": ["dense", "classifier"], "modules_to_save": ["classifier"]}),
        ("bert", {"target_modules": r".*(dense|classifier)", "modules_to_save": ["classifier"]}),
        ("bert", {"target_modules": ["dense", "query"], "modules_to_save": ["attention"]}),
        ("opt", {"target_modules": ["fc1", "q_proj"], "modules_to_save": ["self_attn"]}),
    ],
    ids=["pooler", "head", "regex", "containers", "attention"],
)
def test_modules_to_save_are_never_adapted(name: str, fields: dict[str, Any]) -> None:
    assert selected(name, **fields) == pefts(name, **fields)


def test_the_table_of_defaults_is_pefts() -> None:
    theirs = {kind: value if isinstance(value, str) else set(value) for kind, value in PEFT_DEFAULTS.items()}
    ours = {kind: value if isinstance(value, str) else set(value) for kind, value in _DEFAULTS.items()}
    assert ours == theirs


# -- rules over paths alone ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "path", "taken"),
    [
        ({"q_proj"}, "a.q_proj", True),
        ({"q_proj"}, "q_proj", True),
        ({"q_proj"}, "a.xq_proj", False),
        ({"q_proj"}, "a.q_proj.inner", False),
        ({"attn.q_proj"}, "a.attn.q_proj", True),
        ({"attn.q_proj"}, "a.cross_attn.q_proj", False),
        ({"a.b"}, "axb", False),
    ],
)
def test_a_name_is_a_path_or_its_end_after_a_dot(names: set[str], path: str, taken: bool) -> None:
    assert (TargetRule(names=frozenset(names)).rejection(path) is None) is taken


@pytest.mark.parametrize(
    ("rule", "path", "reason"),
    [
        (TargetRule(names=frozenset({"q"})), "h.0.k", "target_modules does not name it"),
        (TargetRule(pattern=r".*\.q"), "h.0.qq", "target_modules does not name it"),
        (
            TargetRule(names=frozenset({"q"}), indices=frozenset({1})),
            "m.h.0.q",
            "layer 0 is not in layers_to_transform",
        ),
        (
            TargetRule(names=frozenset({"q"}), indices=frozenset({1})),
            "m.q",
            "its path has no layer index, and layers_to_transform is set",
        ),
        (TargetRule(all_linear=True, saved=("head",)), "m.head", "it belongs to modules_to_save (head)"),
        (TargetRule(all_linear=True, saved=("head",)), "m.head.fc", "it belongs to modules_to_save (head)"),
        (TargetRule(all_linear=True, left_out={"lm_head": "no"}), "lm_head", "no"),
    ],
)
def test_reasons(rule: TargetRule, path: str, reason: str) -> None:
    assert rule.rejection(path) == reason


def test_all_linear_leaves_functional_calls_out() -> None:
    assert "functional call" in (TargetRule(all_linear=True).rejection("attention", is_linear_layer=False) or "")
    assert TargetRule(names=frozenset({"attention"})).rejection("attention", is_linear_layer=False) is None


def test_nearest_names() -> None:
    paths = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.0.mlp.up_proj"]
    assert nearest_names("qproj", paths)[0] == "q_proj"
    assert "model.layers.0.self_attn.q_proj" in nearest_names("layers.0.self_attn.qproj", paths)
    assert nearest_names("zzzz", paths) == []


def test_numbered_containers() -> None:
    assert numbered_containers(["model.layers.0.fc", "model.layers.1", "head", "h.2.x"]) == ["h", "layers"]


def test_layer_indices_are_read_as_peft_reads_them() -> None:
    rule = TargetRule(names=frozenset({"q"}), indices=frozenset({3}), layer_patterns=("blocks", "h"))
    assert rule.layer_index("m.h.3.q") == 3
    assert rule.layer_index("h.3.q") == 3
    assert rule.layer_index("m.gh.3.q") is None
    free = TargetRule(names=frozenset({"q"}), indices=frozenset({3}))
    assert free.layer_index("m.h.3.blocks.4.q") == 3
    assert free.layer_index("h.3.q") is None  # PEFT wants something before the container
    assert re.match(r".*\.[^.]*\.(\d+)\.", "h.3.q") is None

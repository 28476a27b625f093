"""`add_weighted_adapter`: the weighted sum of adapters, exact, as one adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_oracle import adapted_paths
from tiny_models import tiny_model
from traces import inputs_of, relative_error, run, traced

from gralora_fx import GraloraConfig, GraloraModel, rewrite
from gralora_fx.adapter import delta_weight
from gralora_fx.errors import ConfigError, MergeError, RewriteError

ALL = ["query", "key", "value", "dense"]
SAME_K: list[dict[str, Any]] = [
    {"r": 8, "gralora_k": 2, "target_modules": ALL},
    {"r": 4, "gralora_k": 2, "alpha": 3, "target_modules": ALL},
]
OTHER_TARGETS: list[dict[str, Any]] = [
    {"r": 8, "gralora_k": 4, "hybrid_r": 2, "target_modules": ["query"]},
    {"r": 4, "gralora_k": 4, "target_modules": ["query", "value"], "layers_to_transform": [1]},
    {"r": 8, "gralora_k": 2, "alpha": 7, "target_modules": ["key"]},
]
OTHER_K: list[dict[str, Any]] = [
    {"r": 8, "gralora_k": 2, "target_modules": ALL},
    {"r": 4, "gralora_k": 4, "hybrid_r": 3, "target_modules": ["dense"]},
    {"r": 3, "gralora_k": 1, "target_modules": ["dense", "query"], "rank_pattern": {"query": 5}},
]


def with_adapters(configs: list[dict[str, Any]], name: str = "bert") -> GraloraModel:
    torch.manual_seed(3)
    first, *others = [GraloraConfig(**{"init_weights": False, **fields}) for fields in configs]
    model = rewrite(traced(name), first, adapter_name="a0")
    for index, config in enumerate(others, start=1):
        model.add_adapter(f"a{index}", config)
    return model


@pytest.mark.parametrize("configs", [SAME_K, OTHER_TARGETS, OTHER_K], ids=["same k", "other targets", "other k"])
def test_the_update_is_the_weighted_sum_at_every_site(configs: list[dict[str, Any]]) -> None:
    model = with_adapters(configs)
    names, weights = [f"a{index}" for index in range(len(configs))], [0.7, -1.5, 2.0][: len(configs)]
    model.add_weighted_adapter(names, weights, "sum")
    assert model.active_adapters == ["a0"]
    expected: dict[str, torch.Tensor] = {}
    for name, weight in zip(names, weights, strict=True):
        adapter = model.installed(name)
        for path in adapter.factors:
            expected[path] = expected.get(path, 0) + weight * delta_weight(adapter.update(path))  # type: ignore[assignment]
    combined = model.installed("sum")
    assert set(combined.factors) == set(expected)
    for path, delta in expected.items():
        assert relative_error(delta_weight(combined.update(path)), delta) < 1e-6


@pytest.mark.parametrize("configs", [SAME_K, OTHER_TARGETS, OTHER_K], ids=["same k", "other targets", "other k"])
def test_with_weights_of_one_it_is_the_active_sum(configs: list[dict[str, Any]]) -> None:
    model, inputs = with_adapters(configs), inputs_of("bert")
    names = [f"a{index}" for index in range(len(configs))]
    model.set_adapter(names)
    expected = run(model, inputs)
    model.add_weighted_adapter(names, [1.0] * len(names), "sum")
    model.set_adapter("sum")
    assert relative_error(run(model, inputs), expected) < 1e-5
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"graph_module.{path}" for path, _ in model.installed("sum").named_parameters()
    }


def test_the_same_k_keeps_its_form() -> None:
    model = with_adapters(SAME_K)
    model.add_weighted_adapter(["a0", "a1"], [1, 1], "sum")
    config = model.configs["sum"]
    assert (config.r, config.gralora_k, config.hybrid_r, config.scale) == (12, 2, 0, 1.0)
    assert not config.rank_pattern
    assert not config.gralora_k_pattern


def test_a_sum_is_saved_and_loads_in_peft(tmp_path: Path) -> None:
    model, inputs = with_adapters(SAME_K), inputs_of("bert")
    model.add_weighted_adapter(["a0", "a1"], [0.5, 0.25], "sum")
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, ["sum"])
    theirs = peft.PeftModel.from_pretrained(tiny_model("bert"), str(tmp_path / "sum")).eval()
    assert adapted_paths(theirs) == set(model.installed("sum").factors)
    assert relative_error(run(model, inputs), run(theirs, inputs)) < 1e-5


def test_a_sum_of_different_sizes_is_saved_and_loads_here(tmp_path: Path) -> None:
    model, inputs = with_adapters(OTHER_K), inputs_of("bert")
    model.add_weighted_adapter(["a0", "a1", "a2"], [0.5, 0.25, -1], "sum")
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, ["sum"])
    again = GraloraModel.from_pretrained(traced("bert"), tmp_path / "sum")
    assert torch.equal(run(again, inputs), run(model, inputs))


def test_drawing_random_numbers_is_left_alone() -> None:
    model = with_adapters(SAME_K)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model.add_weighted_adapter(["a0", "a1"], [1, 1], "sum")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((["a0", "a1"], [1.0], "sum"), ConfigError, "2 adapters were named, but 1 weights given; give one weight"),
        (([], [], "sum"), ConfigError, "0 adapters were named, but 0 weights given"),
        ((["a0", "x"], [1, 1], "sum"), RewriteError, "no adapter 'x'; there are a0, a1"),
        (
            (["a0"], [float("nan")], "sum"),
            ConfigError,
            "the weight of adapter 'a0' must be a finite number, but got nan",
        ),
        ((["a0"], ["1"], "sum"), ConfigError, "the weight of adapter 'a0' must be a finite number, but got '1'"),
        ((["a0"], [1], "a1"), ConfigError, "adapter 'a1' exists already"),
        ((["a0"], [1], "a.b"), ConfigError, "'a.b' cannot name an adapter"),
        (("a0", [1], "sum"), ConfigError, r"adapters must be a list of names, but got 'a0'; give \['a0'\]"),
        ((["a0"], [1], "sum", "svd"), ConfigError, "combination_type must be 'linear', but got 'svd'"),
    ],
    ids=lambda value: str(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_combined(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    model = with_adapters(SAME_K)
    before = str(model.graph_module.graph), list(dict(model.named_parameters()))
    with pytest.raises(error, match=message):
        model.add_weighted_adapter(*arguments)
    assert (str(model.graph_module.graph), list(dict(model.named_parameters()))) == before
    assert list(model.configs) == ["a0", "a1"]


def test_copies_have_no_weighted_sum() -> None:
    model = with_adapters([{**SAME_K[0], "modules_to_save": ["classifier"]}, SAME_K[1]])
    with pytest.raises(RewriteError, match="adapter 'a0' trains copies in classifier, which have no weighted sum"):
        model.add_weighted_adapter(["a0", "a1"], [1, 1], "sum")


def test_not_while_merged() -> None:
    model = with_adapters(SAME_K)
    model.merge_adapter()
    with pytest.raises(MergeError, match="cannot add an adapter while a0 is merged; call unmerge_adapter"):
        model.add_weighted_adapter(["a0", "a1"], [1, 1], "sum")

"""`add_weighted_adapter`: the weighted sum of adapters, exact, as one adapter."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_oracle import adapted_paths
from tiny_models import tiny_model
from traces import fresh, inputs_of, relative_error, run, traced

from gralora_fx import GraloraConfig, GraloraModel, rewrite
from gralora_fx.core.methods.forms import delta_weight
from gralora_fx.errors import ConfigError, MergeError, RewriteError

ALL = ["query", "key", "value", "dense"]
ALL_GPT2 = ["c_attn", "c_proj", "c_fc"]
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


def with_adapters(
    configs: list[dict[str, Any]], name: str = "bert", sizes: dict[str, Any] | None = None
) -> GraloraModel:
    torch.manual_seed(3)
    first, *others = [GraloraConfig(**{"init_weights": False, **fields}) for fields in configs]
    model = rewrite(fresh(name, **sizes)[1] if sizes else traced(name), first, adapter_name="a0")
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
        adapter = model.adapter(name)
        for path in adapter.factors:
            expected[path] = expected.get(path, 0) + weight * delta_weight(adapter.update(path))  # type: ignore[assignment]
    combined = model.adapter("sum")
    assert set(combined.factors) == set(expected)
    for path, delta in expected.items():
        assert relative_error(delta_weight(combined.update(path)), delta) < 1e-6


@pytest.mark.parametrize("configs", [SAME_K, OTHER_TARGETS, OTHER_K], ids=["same k", "other targets", "other k"])
def test_with_weights_of_one_it_is_the_active_sum(configs: list[dict[str, Any]]) -> None:
    model, inputs = with_adapters(configs, sizes={"num_hidden_layers": 2, "dtype": torch.float64}), inputs_of("bert")
    names = [f"a{index}" for index in range(len(configs))]
    model.set_adapter(names)
    expected = run(model, inputs)  # in float64: the logits are small, and float32 rounds them apart on some processors
    model.add_weighted_adapter(names, [1.0] * len(names), "sum")
    model.set_adapter("sum")
    assert relative_error(run(model, inputs), expected) < 1e-10
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"graph_module.{path}" for path, _ in model.adapter("sum").named_parameters()
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
    assert adapted_paths(theirs) == set(model.adapter("sum").factors)
    assert relative_error(run(model, inputs), run(theirs, inputs)) < 1e-5


SUMS: dict[str, tuple[str, dict[str, int], list[dict[str, Any]]]] = {
    "r": ("bert", {}, [{"r": 8, "target_modules": ALL}, {"r": 4, "alpha": 3, "target_modules": ["query"]}]),
    "targets": ("bert", {}, OTHER_TARGETS),
    "k": ("bert", {}, OTHER_K),
    "hybrid": (
        "bert",
        {},
        [
            {"r": 8, "hybrid_r": 4, "target_modules": ["query"]},
            {"r": 8, "hybrid_r": 2, "target_modules": ["query", "key"]},
            {"r": 4, "alpha": 5, "target_modules": ["value"]},
        ],
    ),
    "one alone": ("bert", {}, [{"r": 8, "target_modules": ["query", "key"], "rank_pattern": {"key": 2}}]),
    "scales alone": ("bert", {}, [{"r": 8, "target_modules": ["query", "key"], "alpha_pattern": {"key": 2}}]),
    "transposed": (
        "gpt2",
        {},
        [
            {"r": 8, "target_modules": ["c_attn"], "fan_in_fan_out": True},
            {"r": 4, "gralora_k": 4, "target_modules": ALL_GPT2},
        ],
    ),
    "widths": (  # 4 does not divide 66
        "llama",
        {"intermediate_size": 66},
        [{"r": 8, "gralora_k": 4, "target_modules": ["q_proj"]}, {"r": 6, "target_modules": ["up_proj", "q_proj"]}],
    ),
}


# the common r and k of each sum
SMALLEST = {
    "r": (12, 2),
    "targets": (16, 4),
    "k": (35, 1),  # 40 with 4 blocks
    "hybrid": (16, 2),
    "one alone": (8, 2),
    "scales alone": (8, 2),
    "transposed": (20, 4),
    "widths": (44, 1),
}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is")
@pytest.mark.parametrize("case", SUMS)
def test_any_sum_is_saved_without_a_pattern_and_gives_pefts_logits(case: str, tmp_path: Path) -> None:
    name, sizes, configs = SUMS[case]
    model, inputs = with_adapters(configs, name, sizes), inputs_of(name)
    names = [f"a{index}" for index in range(len(configs))]
    model.add_weighted_adapter(names, [0.5, -0.25, 2.0][: len(names)], "sum")
    config = model.configs["sum"]
    assert (config.rank_pattern, config.alpha_pattern, config.gralora_k_pattern) == ({}, {}, {})
    assert (config.r, config.gralora_k) == SMALLEST[case]
    assert config.scale == 1
    model.set_adapter("sum")
    expected = run(model, inputs)
    assert relative_error(run(model.traced, inputs), expected) > 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path, ["sum"])
    theirs = peft.PeftModel.from_pretrained(tiny_model(name, **sizes), str(tmp_path / "sum")).eval()
    assert adapted_paths(theirs) == set(model.adapter("sum").factors)
    assert relative_error(run(theirs, inputs), expected) < 1e-5
    again = GraloraModel.from_pretrained(model.traced, tmp_path / "sum")
    assert torch.equal(run(again, inputs), expected)


def test_what_is_filled_with_zeros_stays_zero_in_training() -> None:
    model, inputs = with_adapters(SUMS["r"][2]), inputs_of("bert")
    model.add_weighted_adapter(["a0", "a1"], [1.0, 1.0], "sum")
    model.set_adapter("sum")
    model(**inputs).logits.square().sum().backward()
    for factors in model.adapter("sum").factors.values():
        unused = (factors.A == 0).all(dim=1).all(dim=0)  # [r]
        assert factors.A.grad is not None
        assert not factors.A.grad[:, :, unused].any()


def test_a_pattern_is_saved_with_a_warning_that_names_it(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"target_modules": ALL, "rank_pattern": {"query": 4}, "alpha_pattern": {"key": 3}}
    model = with_adapters([{"r": 8, **fields}])
    with pytest.warns(
        UserWarning, match="adapter 'a0' has rank_pattern, alpha_pattern, which PEFT's GraLoRA"
    ) as caught:
        model.save_pretrained(tmp_path)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with pytest.raises(RuntimeError, match="size mismatch"), pytest.warns(UserWarning, match="alpha_pattern"):
        peft.PeftModel.from_pretrained(tiny_model("bert"), str(tmp_path / "a0"))


@pytest.mark.parametrize("exclude", [["layer.0.attention.self.query"], r".*\.1\..*", ["key"]], ids=str)
def test_what_is_excluded_is_saved_in_pefts_terms(exclude: Any, tmp_path: Path) -> None:
    model, inputs = (
        with_adapters([{"r": 8, "target_modules": ["query", "key"], "exclude_modules": exclude}]),
        inputs_of("bert"),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path)
        theirs = peft.PeftModel.from_pretrained(tiny_model("bert"), str(tmp_path / "a0")).eval()
    assert adapted_paths(theirs) == set(model.adapter("a0").factors)
    assert relative_error(run(theirs, inputs), run(model, inputs)) < 1e-5


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
    with pytest.raises(RewriteError, match="adapter 'a0' trains copies in classifier, which cannot be summed"):
        model.add_weighted_adapter(["a0", "a1"], [1, 1], "sum")


def test_not_while_merged() -> None:
    model = with_adapters(SAME_K)
    model.merge_adapter()
    with pytest.raises(MergeError, match="cannot add an adapter while a0 is merged; call unmerge_adapter"):
        model.add_weighted_adapter(["a0", "a1"], [1, 1], "sum")

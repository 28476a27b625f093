"""One module tree owns a model's tensors: whatever replaces, converts or loads them, the model is right or refuses."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gralora_fx import GraloraConfig, GraloraModel, merge, rewrite, trace
from gralora_fx.errors import GraloraError, MergeError, RewriteError, TraceError

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Layers, a tied head, and a parameter at the root."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8, bias=False)
        self.tied.weight = self.second.weight
        self.scale = nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.last(torch.tanh(self.second(torch.relu(self.first(x))))) * self.scale)


class Checked(Net):
    """The same with a check of values in half precision, which a trace cannot make."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float16 and not torch.isfinite(x).all():
            x = x.clamp(-1, 1)
        return super().forward(x)


def adapted(seed: int = 0, dtype: torch.dtype = torch.float32, net: type[Net] = Net) -> GraloraModel:
    """Return a model whose adapter works, trains a copy of a module, and has another waiting beside it."""
    torch.manual_seed(seed)
    base = trace(net().to(dtype).eval(), (X.to(dtype),))
    model = rewrite(base, GraloraConfig(r=4, target_modules=["first"], modules_to_save=["last"], init_weights=False))
    model.add_adapter("other", GraloraConfig(r=2, target_modules=["first", "last"], init_weights=False))
    with torch.no_grad():
        for parameter in model.adapter("default").copies["last"].values():
            parameter.add_(0.1)
    return model


def outputs(model: GraloraModel, directory: Path) -> dict[str, Tensor]:
    """Compute what a model gives in every way: as it is, merged, saved and loaded, with its other adapter."""
    x = X.to(next(model.traced.graph_module.parameters()).dtype)
    with torch.no_grad():
        results = {"active": model(x), "folded": merge(model)(x)}
        model.save_pretrained(directory)
        with model.disable_adapter():
            results["disabled"] = model(x)
        model.merge_adapter()
        results["merged"] = model(x)
        model.unmerge_adapter()
        model.set_adapter("other")
        results["other"] = model(x)
        model.set_adapter("default")
        results["back"] = model(x)
        again = GraloraModel.from_pretrained(model.traced, directory)
        results["loaded"] = again(x)
        results["unloaded"] = again.unload()(x)
    return results


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, expected in first.items():
        assert torch.equal(second[name], expected), name


@pytest.mark.parametrize("is_merged", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_a_loaded_state_dict_is_what_everything_reads(tmp_path: Path, assign: bool, is_merged: bool) -> None:
    model, source = adapted(), adapted(seed=1)
    state = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    state["graph_module.tied.weight"] = state["graph_module.second.weight"]
    if is_merged:
        model.merge_adapter()
    model.load_state_dict(state, assign=assign)
    if is_merged:
        source.merge_adapter()
        assert torch.equal(model(X), source(X))
        model.unmerge_adapter()
        source.unmerge_adapter()
    assert_same(outputs(source, tmp_path / "a"), outputs(model, tmp_path / "b"))


def test_a_state_dict_is_the_same_merged_and_unmerged() -> None:
    model = adapted()
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    for change in (model.merge_adapter, model.train, model.unmerge_adapter, lambda: model.set_adapter("other")):
        change()
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(after[name].data_ptr() == at and torch.equal(after[name], was) for name, (at, was) in before.items())


CONVERSIONS: dict[str, Callable[[nn.Module], Any]] = {
    "float64": lambda model: model.double(),
    "bfloat16": lambda model: model.bfloat16(),
    "float16": lambda model: model.half(),
    "torch.bfloat16": lambda model: model.to(torch.bfloat16),
    "torch.float16": lambda model: model.to("cpu", torch.float16),
    "torch.float64": lambda model: nn.Sequential(model).to(device="cpu", dtype=torch.float64),
}


@pytest.mark.parametrize("when", ["active", "merged", "disabled"])
@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_converted_model_is_one_of_a_converted_base(name: str, when: str, tmp_path: Path) -> None:
    model = adapted()
    dtype = getattr(torch, name.removeprefix("torch."))
    with model.disable_adapter() if when == "disabled" else nullcontext():
        if when == "merged":
            model.merge_adapter()
        CONVERSIONS[name](model)
        if when == "merged":
            assert model(X.to(dtype)).dtype == dtype
            model.unmerge_adapter()
    expected = adapted(dtype=dtype).to(dtype)
    expected.load_state_dict(model.state_dict())
    assert_same(outputs(expected, tmp_path / "a"), outputs(model, tmp_path / "b"))


@pytest.mark.parametrize("when", ["active", "merged", "disabled"])
def test_a_conversion_that_cannot_be_traced_is_refused_and_changes_nothing(when: str, tmp_path: Path) -> None:
    model = adapted(net=Checked)
    expected = outputs(adapted(), tmp_path / "a")
    with model.disable_adapter() if when == "disabled" else nullcontext():
        if when == "merged":
            model.merge_adapter()
        with pytest.raises(TraceError, match=r"cannot convert the trace to torch.float16: cannot trace Checked"):
            model.half()
        if when == "merged":
            model.unmerge_adapter()
    assert_same(expected, outputs(model, tmp_path / "b"))


def test_converting_to_the_dtype_and_device_that_it_has_is_none(tmp_path: Path) -> None:
    model = adapted(dtype=torch.bfloat16)
    expected = outputs(adapted(dtype=torch.bfloat16), tmp_path / "a")
    assert model.bfloat16().to("cpu").to(torch.bfloat16).to(torch.device("cpu"), torch.bfloat16) is model
    assert model.factors("first").A.dtype == torch.bfloat16  # an adapter follows, as in any module
    assert outputs(model, tmp_path / "b").keys() == expected.keys()


class Positions(nn.Module):
    """A layer that adds positions, which it makes on the device of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + torch.arange(8, device=x.device))


def test_a_graph_that_makes_tensors_on_its_device_makes_them_where_it_is_moved() -> None:
    traced = trace(Positions(), (X,))
    model = rewrite(traced, GraloraConfig(r=4, target_modules=["layer"]))
    expected, state = model(X), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to("meta")
    with model.disable_adapter():  # torch knows no autocast there, about which an adapter asks
        assert model(X.to("meta")).is_meta
    model.to_empty(device="cpu")
    model.load_state_dict(state)
    assert torch.equal(model(X), expected)
    assert traced.to("meta")(X.to("meta")).is_meta


def test_a_move_that_makes_new_parameters_is_followed(tmp_path: Path) -> None:
    model, expected = adapted(), adapted()
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model._apply(torch.clone)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
    assert_same(outputs(expected, tmp_path / "a"), outputs(model, tmp_path / "b"))


def set_by_attribute(model: GraloraModel, name: str, value: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, nn.Parameter(value))


def set_by_data(model: GraloraModel, name: str, value: Tensor) -> None:
    model.get_parameter(name).data = value


@pytest.mark.parametrize("setter", [set_by_attribute, set_by_data])
@pytest.mark.parametrize(
    "name",
    ["gralora.default.first.gralora_A", "gralora.default.last.bias", "gralora.other.first.gralora_B", "first.weight"],
)
def test_a_parameter_that_is_replaced_is_what_everything_reads(setter: Any, name: str, tmp_path: Path) -> None:
    model, expected = adapted(), adapted()
    with torch.no_grad():
        expected.get_parameter(f"graph_module.{name}").mul_(1.5)
    setter(model, f"graph_module.{name}", model.get_parameter(f"graph_module.{name}").detach() * 1.5)
    assert_same(outputs(expected, tmp_path / "a"), outputs(model, tmp_path / "b"))


@pytest.mark.parametrize("name", ["gralora.default.first.gralora_A", "first.weight"])
@pytest.mark.parametrize("way", ["in place", "data", "attribute"])
def test_merged_weights_of_tensors_that_changed_are_not_used(way: str, name: str) -> None:
    model = adapted()
    model.merge_adapter()
    owner, _, attribute = name.rpartition(".")
    holder = model._modules["graph_module"].get_submodule(owner)
    parameter = holder.get_parameter(attribute)
    if way == "in place":
        with torch.no_grad():
            parameter.mul_(2)
    elif way == "data":
        parameter.data = parameter.data * 2
    else:
        setattr(holder, attribute, nn.Parameter(parameter.detach() * 2))
    with pytest.raises(MergeError, match="changed after default was merged, so the merged weights are not those"):
        model(X)
    model.unmerge_adapter()
    expected = model(X)
    model.merge_adapter()
    assert torch.allclose(model(X), expected, atol=1e-4)


def test_a_functional_call_reads_what_it_is_given() -> None:
    model = adapted()
    name = "graph_module.gralora.default.first.gralora_B"
    zero = {name: torch.zeros_like(model.get_parameter(name)), "graph_module.first.weight": torch.zeros(8, 8)}
    with_zeros = torch.func.functional_call(model, zero, (X,))
    before = model(X)
    assert not torch.equal(with_zeros, before)
    with torch.no_grad():
        for key, value in zero.items():
            model.get_parameter(key).copy_(value)
    assert torch.equal(model(X), with_zeros)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_a_parametrized_adapter_is_saved_and_merged_as_it_computes(tmp_path: Path) -> None:
    model, expected = adapted(), adapted()
    parametrize.register_parametrization(
        model.get_submodule("graph_module.gralora.default.first"), "gralora_A", Doubled()
    )
    with torch.no_grad():
        expected.factors("first").A.mul_(2)
    assert torch.equal(model(X), expected(X))
    assert torch.equal(merge(model)(X), merge(expected)(X))
    model.merge_adapter()
    expected.merge_adapter()
    assert torch.equal(model(X), expected(X))
    model.save_pretrained(tmp_path)
    assert torch.equal(GraloraModel.from_pretrained(expected.traced, tmp_path)(X), adapted_output(expected))
    model.unmerge_adapter()
    with pytest.raises(GraloraError, match="is the result of a parametrization here, which cannot be written"):
        model.load_adapter(tmp_path)


def adapted_output(model: GraloraModel) -> Tensor:
    model.unmerge_adapter()
    result: Tensor = model(X)
    return result


def test_a_parametrized_base_is_refused_where_its_weight_is_needed() -> None:
    model = adapted()
    parametrize.register_parametrization(model.get_submodule("graph_module.first"), "weight", Doubled())
    for change in (model.merge_adapter, lambda: merge(model), lambda: model.set_adapter("other")):
        with pytest.raises(RewriteError, match=r"first\.weight of the base model is not a parameter any more"):
            change()


def test_gradients_of_the_whole_model_reach_its_own_parameters() -> None:
    model = adapted()
    model.requires_grad_(True)
    model(X).sum().backward()
    assert model.get_parameter("graph_module.first.weight").grad is not None
    model.requires_grad_(False)
    model.set_adapter("other")
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trains == {name for name, _ in model.named_parameters() if ".other." in name}


def test_a_model_without_memory_is_filled_while_merged() -> None:
    source = adapted()
    expected = source(X)
    source.merge_adapter()
    merged = source(X)
    state = source.state_dict()
    model = adapted(seed=1)
    model.merge_adapter()
    model.to_empty(device="meta").to_empty(device="cpu")
    model.load_state_dict(state)
    assert torch.equal(model(X), merged)
    model.unmerge_adapter()
    assert torch.equal(model(X), expected)

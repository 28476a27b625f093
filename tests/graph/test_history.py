"""A model's history: passes and adopted edits hold in every form of its graph, with what they added."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from gralora_fx import GraloraConfig, GraloraModel, merge, rewrite, trace
from gralora_fx.errors import GraloraError, RewriteError
from gralora_fx.exporters import export_onnx
from gralora_fx.serving import load

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
CONFIG = GraloraConfig(r=4, gralora_k=2, target_modules="all-linear", init_weights=False)


@pytest.fixture
def model() -> GraloraModel:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
    result = rewrite(trace(net, (X,)), CONFIG)
    result.add_adapter("other", CONFIG)
    return result


def turn(graph_module: fx.GraphModule) -> None:
    """Put a layer of its own, and a factor, at the end."""
    graph_module.add_module("own", nn.Linear(8, 8))
    graph_module.register_buffer("factor", torch.full((8,), 2.0))
    output = graph_module.graph.output_node()
    (result,) = output.all_input_nodes
    with graph_module.graph.inserting_before(output):
        turned = graph_module.graph.call_module("own", (result,))
        scaled = graph_module.graph.call_function(torch.mul, (turned, graph_module.graph.get_attr("factor")))
    output.replace_input_with(result, scaled)


def turned(model: GraloraModel) -> Tensor:
    """Add the pass, give what it added other values, and return the result."""
    model.add_pass(turn)
    with torch.no_grad():
        model.get_parameter("graph_module.own.weight").copy_(torch.randn(8, 8))
    return model(X)


def edit(model: GraloraModel) -> None:
    """Put tanh in the place of relu, without compiling it."""
    (node,) = model.graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
    node.target = torch.ops.aten.tanh.default


def edited(model: GraloraModel) -> Tensor:
    edit(model)
    assert model.adopt_edits() is not None
    return model(X)


def there_and_back(model: GraloraModel) -> Any:
    model.set_adapter("other")
    model.set_adapter("default")
    return model


def in_place(model: GraloraModel) -> Any:
    model.merge_adapter()
    model(X)
    model.unmerge_adapter()
    return model


def assigned(model: GraloraModel) -> Any:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model


FORMS: dict[str, Callable[[GraloraModel], Any]] = {
    "merged": merge,
    "merged and unloaded": lambda model: model.merge_and_unload(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "train and eval": lambda model: model.train().eval(),
    "double and back": lambda model: model.double().float(),
    "switched": there_and_back,
    "unmerged": in_place,
    "assigned": assigned,
}


@pytest.mark.parametrize("change", [turned, edited])
@pytest.mark.parametrize("form", FORMS)
def test_a_pass_and_an_adopted_edit_hold_in_every_form(
    form: str, change: Callable[[GraloraModel], Tensor], model: GraloraModel
) -> None:
    before = model(X)
    expected = change(model)
    assert not torch.allclose(before, expected, atol=1e-2)
    largest = float(expected.detach().abs().max())
    torch.testing.assert_close(FORMS[form](model)(X), expected, rtol=1e-5, atol=1e-5 * largest)


@pytest.mark.parametrize("change", [turned, edited])
@pytest.mark.parametrize("adapters", ["merged", "data"])
def test_an_export_has_passes_and_adopted_edits(
    adapters: Any, change: Callable[[GraloraModel], Tensor], model: GraloraModel, tmp_path: Path
) -> None:
    expected = change(model)
    export_onnx(model, tmp_path / "out", adapters=adapters)
    named = {} if adapters == "merged" else {"adapter": "default"}
    (result,) = load(tmp_path / "out")(**{model.traced.input_names[0]: X.numpy()}, **named).values()
    torch.testing.assert_close(torch.from_numpy(result), expected.detach(), rtol=1e-4, atol=1e-5)


def test_what_a_pass_added_trains_and_goes_with_it(model: GraloraModel) -> None:
    turned(model)
    weight = model.get_parameter("graph_module.own.weight")
    model.train()(X).sum().backward()
    assert weight.grad is not None
    model.eval().remove_pass(turn)
    assert not [name for name in model.state_dict() if "own" in name or "factor" in name]


def test_a_pass_that_fails_in_a_form_is_named_with_it(model: GraloraModel) -> None:
    def needs_an_adapter(graph_module: fx.GraphModule) -> None:
        next(node for node in graph_module.graph.nodes if "gralora" in node.meta.get("custom", {}))

    model.add_pass(needs_an_adapter)
    with pytest.raises(RewriteError, match="needs_an_adapter in the merged form failed with StopIteration"):
        merge(model)


def test_a_pass_that_registers_other_sizes_later_is_refused(model: GraloraModel) -> None:
    sizes = iter([3, 4])

    def grows(graph_module: fx.GraphModule) -> None:
        graph_module.register_buffer("growing", torch.zeros(next(sizes)))

    model.add_pass(grows)
    with pytest.raises(RewriteError, match=r"registers growing with the sizes \[4\], and had registered \[3\]"):
        model.set_adapter("other")
    assert model.active_adapters == ["default"]


LOSING: dict[str, Callable[[GraloraModel, Path], Any]] = {
    "deepcopy": lambda model, _: copy.deepcopy(model),
    "pickle": lambda model, _: pickle.dumps(model),
    "merge": lambda model, _: merge(model),
    "unload": lambda model, _: model.unload(),
    "merge in place": lambda model, _: model.merge_adapter(),
    "switch": lambda model, _: model.set_adapter("other"),
    "disable": lambda model, _: model.disable_adapter().__enter__(),
    "convert": lambda model, _: model.double(),
    "add a pass": lambda model, _: model.add_pass(print),
    "save": lambda model, path: model.save_pretrained(path),
    "export": lambda model, path: export_onnx(model, path / "out", adapters="data"),
}


@pytest.mark.parametrize("recompiles", [False, True])
@pytest.mark.parametrize("losing", LOSING)
def test_an_edit_that_was_not_adopted_is_never_lost(
    losing: str, recompiles: bool, model: GraloraModel, tmp_path: Path
) -> None:
    edit(model)
    if recompiles:
        model.graph_module.recompile()
    with pytest.raises(GraloraError, match=r"edited by hand.*adopt_edits\(\)"):
        LOSING[losing](model, tmp_path)
    assert model.adopt_edits() is not None
    assert not list(tmp_path.iterdir())


def test_an_edit_that_is_removed_gives_the_graph_back(model: GraloraModel) -> None:
    before, expected = str(model.graph_module.graph), model(X)
    assert model.adopt_edits() is None
    edit(model)
    adopted = model.adopt_edits()
    assert adopted is not None
    model.remove_pass(adopted)
    assert str(model.graph_module.graph) == before
    assert torch.equal(model(X), expected)


def test_an_edit_of_an_adapters_nodes_is_refused_where_it_has_none(model: GraloraModel) -> None:
    node = next(node for node in model.nodes("0") if node.op == "call_function")
    with node.graph.inserting_after(node):
        doubled = node.graph.call_function(torch.mul, (node, 2.0))
    node.replace_all_uses_with(doubled, delete_user_cb=lambda user: user is not doubled)
    model.adopt_edits()
    expected = model(X)
    torch.testing.assert_close(there_and_back(model)(X), expected)
    torch.testing.assert_close(copy.deepcopy(model)(X), expected)
    with pytest.raises(RewriteError, match=r"in the merged form failed with .*computes the adapter otherwise"):
        merge(model)


def test_saved_adapters_lack_passes_and_a_warning_says_so(model: GraloraModel, tmp_path: Path) -> None:
    turned(model)
    with pytest.warns(UserWarning, match="do not hold the graph pass turn, nor factor, own, which passes added"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_while_adapters_are_disabled_has_them(
    copied: Callable[[GraloraModel], GraloraModel], model: GraloraModel
) -> None:
    expected = model(X)
    with model.disable_adapter(), model.disable_adapter():
        other = copied(model)
    assert other.active_adapters == ["default"]
    assert torch.equal(other(X), expected)


def test_a_parameter_of_the_root_is_adapted_at_the_first_rewrite() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.gralora = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.gralora(x), self.weight)

    traced = trace(Own().eval(), (X,))
    config = GraloraConfig(r=4, gralora_k=2, target_modules=["weight", "gralora"], init_weights=False)
    model = rewrite(traced, config)
    assert len(model.adapted_sites("default")) == 2
    torch.testing.assert_close(merge(model)(X), model(X))

"""Each graph pass on a literal graph: before, after, and back."""

from __future__ import annotations

import copy
import importlib
import inspect
import pkgutil
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from gralora_fx import GraloraConfig, GraloraModel, TracedModel, rewrite, trace
from gralora_fx.core.adapters.adapter import put
from gralora_fx.core.adapters.fold_in_place import fold_in_place
from gralora_fx.core.adapters.folded_weights import SiteUpdate, folded_weights
from gralora_fx.core.adapters.insert_adapter import InsertAdapter, Insertion
from gralora_fx.core.adapters.module_copies import RedirectParameters
from gralora_fx.core.adapters.other_parameters import OWN_WEIGHTS, SetWeights, UntieWeights
from gralora_fx.core.graph.pipeline import Pipeline
from gralora_fx.core.graph.surgery import annotate, annotated_nodes, annotation_of, remove_annotation
from gralora_fx.core.methods.gralora import Factors, GraloraSizes, initial_factors
from gralora_fx.core.methods.method import Update
from gralora_fx.core.methods.registry import GRALORA
from gralora_fx.core.tracing import normalize
from gralora_fx.errors import MergeError, RewriteError


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


BASE = """\
graph():
    %up_weight : [num_users=1] = get_attr[target=up.weight]
    %up_bias : [num_users=1] = get_attr[target=up.bias]
    %down_weight : [num_users=1] = get_attr[target=down.weight]
    %down_bias : [num_users=1] = get_attr[target=down.bias]
    %x : [num_users=1] = placeholder[target=x]
    %linear : [num_users=1] = call_function[target=torch.ops.aten.linear.default]\
(args = (%x, %up_weight, %up_bias), kwargs = {})
    %relu : [num_users=1] = call_function[target=torch.ops.aten.relu.default](args = (%linear,), kwargs = {})
    %linear_1 : [num_users=1] = call_function[target=torch.ops.aten.linear.default]\
(args = (%relu, %down_weight, %down_bias), kwargs = {})
    return (linear_1,)"""

A, B = "gralora_default_up_gralora_a", "gralora_default_up_gralora_b"
ADAPTED = f"""\
graph():
    %up_weight : [num_users=1] = get_attr[target=up.weight]
    %up_bias : [num_users=1] = get_attr[target=up.bias]
    %down_weight : [num_users=1] = get_attr[target=down.weight]
    %down_bias : [num_users=1] = get_attr[target=down.bias]
    %x : [num_users=2] = placeholder[target=x]
    %linear : [num_users=1] = call_function[target=torch.ops.aten.linear.default]\
(args = (%x, %up_weight, %up_bias), kwargs = {{}})
    %{A} : [num_users=1] = get_attr[target=gralora.default.up.gralora_A]
    %{B} : [num_users=1] = get_attr[target=gralora.default.up.gralora_B]
    %project : [num_users=1] = call_function[target=gralora_fx.core.methods.low_rank.project]\
(args = (%x, %{A}), kwargs = {{}})
    %accumulate : [num_users=1] = call_function[target=gralora_fx.core.methods.low_rank.accumulate]\
(args = (%linear, %project, %{B}, 2.0), kwargs = {{}})
    %relu : [num_users=1] = call_function[target=torch.ops.aten.relu.default](args = (%accumulate,), kwargs = {{}})
    %linear_1 : [num_users=1] = call_function[target=torch.ops.aten.linear.default]\
(args = (%relu, %down_weight, %down_bias), kwargs = {{}})
    return (linear_1,)"""


@pytest.fixture(scope="module")
def base() -> TracedModel:
    torch.manual_seed(0)
    return trace(Mlp().eval(), (torch.ones(2, 4),))


def adapted(base: TracedModel, **fields: Any) -> GraloraModel:
    torch.manual_seed(1)
    config = {"r": 2, "alpha": 4, "target_modules": {"up"}, "init_weights": False, **fields}
    return rewrite(base, GraloraConfig(**config))


# -- insert and remove --------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_the_graph_before_and_after(base: TracedModel) -> None:
    assert str(base.graph_module.graph) == BASE
    model = adapted(base)
    assert str(model.graph_module.graph) == ADAPTED
    assert str(model.unload().graph_module.graph) == BASE


@pytest.mark.parametrize(
    ("fields", "added"),
    [
        ({}, 4),
        ({"hybrid_r": 1, "alpha": 6}, 8),
        ({"gralora_dropout": 0.1}, 5),
        ({"gralora_dropout": 0.1, "hybrid_r": 1}, 10),
        ({"target_modules": ["up", "down"]}, 8),
        ({"gralora_k": 1}, 4),
    ],
    ids=str,
)
def test_the_number_of_nodes_added(base: TracedModel, fields: dict[str, Any], added: int) -> None:
    model = adapted(base, **fields)
    assert len(model.graph_module.graph.nodes) - len(base.graph_module.graph.nodes) == added
    marked = list(annotated_nodes(model.graph_module.graph, "default"))
    assert len(marked) == added


def test_marks_name_site_adapter_and_call(base: TracedModel) -> None:
    nodes = list(annotated_nodes(adapted(base).graph_module.graph, "default"))
    assert {tuple(sorted(node.meta["custom"]["gralora"].items())) for node in nodes} == {
        (("adapter", "default"), ("call", "linear"), ("site", "up"))
    }


def test_marks_survive_a_copy(base: TracedModel) -> None:
    copied = copy.deepcopy(adapted(base)).graph_module
    assert len(list(annotated_nodes(copied.graph, "default"))) == 4


@pytest.mark.parametrize("order", [["default", "b", "c"], ["c", "default", "b"], ["b", "c", "default"]])
def test_the_graph_depends_on_the_active_adapters_only(base: TracedModel, order: list[str]) -> None:
    model = adapted(base)
    for name in ("b", "c"):
        model.add_adapter(name, GraloraConfig(r=2, target_modules={"up", "down"}, init_weights=False))
    model.set_adapter(order)
    expected = str(model.graph_module.graph)
    for names in (["c"], ["b", "default"], order):
        model.set_adapter(names)
        assert {
            annotation["adapter"] for n in model.graph_module.graph.nodes if (annotation := annotation_of(n))
        } == set(names)
    assert str(model.graph_module.graph) == expected
    model.set_adapter("default")
    assert str(model.graph_module.graph) == ADAPTED
    with model.disable_adapter():
        assert str(model.graph_module.graph) == BASE


def test_a_node_that_is_gone_is_named(base: TracedModel) -> None:
    graph_module = copy.deepcopy(base.graph_module)
    node = next(node for node in graph_module.graph.nodes if node.name == "linear")
    with graph_module.graph.inserting_before(node):
        other = graph_module.graph.call_function(torch.ops.aten.linear.default, node.args)
    node.replace_all_uses_with(other)
    graph_module.graph.erase_node(node)
    before = str(graph_module.graph)
    names = {"A": "a", "B": "b"}
    with pytest.raises(RewriteError, match="up: node 'linear' is not a linear call of this graph any more; trace the"):
        InsertAdapter("default", GRALORA, (Insertion(base.sites[0], names, GraloraSizes(2, 2), 1.0),))(
            graph_module.graph
        )
    assert str(graph_module.graph) == before


# -- own ----------------------------------------------------------------------------------------------------------


def test_owned_parameters_are_read(base: TracedModel) -> None:
    graph_module = copy.deepcopy(base.graph_module)
    tree = base.tree
    parameters = dict(graph_module.named_parameters())
    tree = type(tree)(tree.types, tree.linear, tree.aliases, parameters)
    names = {f"down.{name}": f"mine.down.{name}" for name in ("weight", "bias")}
    for own in names.values():
        put(graph_module, own, nn.Parameter(torch.zeros(2, 6) if own.endswith("weight") else torch.ones(2)))
    redirection = RedirectParameters(tree, "mine", {"down": names})
    assert redirection(graph_module.graph).changed == 2
    targets = [str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"]
    assert targets == ["up.weight", "up.bias", "mine.down.weight", "mine.down.bias"]
    graph_module.recompile()
    assert torch.equal(graph_module(torch.randn(3, 4)), torch.ones(3, 2))
    assert redirection(graph_module.graph).changed == 0


@pytest.mark.parametrize(
    "module",
    [
        InsertAdapter.__module__,
        RedirectParameters.__module__,
        *(f"{normalize.__name__}.{module.name}" for module in pkgutil.iter_modules(normalize.__path__)),
    ],
)
def test_every_module_holds_passes_of_one_protocol(module: str) -> None:
    """Functions, or frozen dataclasses, from a graph to a result."""
    contents = [value for value in vars(importlib.import_module(module)).values() if hasattr(value, "contract")]
    assert contents
    for graph_pass in contents:
        signature = inspect.signature(graph_pass.__call__ if isinstance(graph_pass, type) else graph_pass)
        assert [name for name in signature.parameters if name != "self"] == ["graph"]
        assert signature.return_annotation == "PassResult[fx.Graph]"
        assert not isinstance(graph_pass, type) or graph_pass.__dataclass_params__.frozen


def test_weights_are_set_once_they_are_untied_and_before_adapters_are_inserted() -> None:
    own = frozenset({OWN_WEIGHTS})
    untie, weights, insert = UntieWeights(()), SetWeights((), {}), InsertAdapter("default", GRALORA, ())
    Pipeline("adapters", (untie, weights, insert), given=own)
    with pytest.raises(ValueError, match="the pass set_weights of adapters needs 'weights are untied', which no pass"):
        Pipeline("adapters", (weights, untie, insert), given=own)
    with pytest.raises(ValueError, match=f"untie_weights of adapters needs '{OWN_WEIGHTS}', which the pass insert_"):
        Pipeline("adapters", (insert, untie, weights), given=own)


# -- fold ---------------------------------------------------------------------------------------------------------


def update_of(seed: int = 0) -> Update:
    torch.manual_seed(seed)
    return Update(initial_factors(4, 6, GraloraSizes(4, 2), zero_update=False), 0.5)


def test_folded_weights_are_new_and_reuse_a_buffer(base: TracedModel) -> None:
    site, before = base.sites[0], base.sites[0].weight.detach().clone()
    spare = torch.empty_like(before)
    weights = folded_weights(base.graph_module, [SiteUpdate(site, (update_of(),))], spare={"up": spare})
    assert weights["up"].data_ptr() == spare.data_ptr()
    assert not torch.equal(weights["up"], before)
    assert torch.equal(site.weight, before)


def test_weights_go_in_and_out_without_a_node_changing(base: TracedModel) -> None:
    graph_module = copy.deepcopy(base.graph_module)
    weight = nn.Parameter(torch.zeros(6, 4))
    assert SetWeights(base.sites, {"up": weight})(graph_module.graph).changed == 1
    assert graph_module.up.weight is weight
    assert graph_module.down.weight is not base.graph_module.down.weight
    assert str(graph_module.graph) == BASE


def broken() -> Update:
    factors = update_of().factors
    return Update(Factors(factors.A * float("nan"), factors.B), 1.0)


def test_folding_in_place_checks_every_site_first() -> None:
    traced = trace(Mlp(), (torch.ones(2, 4),))
    up, down = traced.sites
    torch.manual_seed(0)
    second = Update(initial_factors(6, 2, GraloraSizes(2, 2), zero_update=False), float("inf"))
    before = [site.weight.detach().clone() for site in (up, down)]
    with pytest.raises(MergeError, match="the merged weight of down is not finite"):
        fold_in_place(traced.graph_module, [SiteUpdate(up, (update_of(),)), SiteUpdate(down, (second,))], safe=True)
    assert all(torch.equal(site.weight, value) for site, value in zip((up, down), before, strict=True))
    fold_in_place(traced.graph_module, [SiteUpdate(up, (update_of(),))], safe=True)
    assert not torch.equal(up.weight, before[0])


def test_an_unsafe_fold_does_not_look(base: TracedModel) -> None:
    weights = folded_weights(base.graph_module, [SiteUpdate(base.sites[0], (broken(),))])
    assert not torch.isfinite(weights["up"]).any()
    with pytest.raises(MergeError, match="the merged weight of up is not finite"):
        folded_weights(base.graph_module, [SiteUpdate(base.sites[0], (broken(),))], safe=True)


class ReadTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + self.fc.weight.sum()


def test_a_weight_that_something_else_reads_is_not_folded() -> None:
    traced = trace(ReadTwice(), (torch.ones(2, 4),))
    with pytest.raises(MergeError, match=r"the weight of fc \(read by sum_1 outside a linear call\) is shared"):
        folded_weights(traced.graph_module, [SiteUpdate(traced.sites[0], (update_of(),))])


# -- marks --------------------------------------------------------------------------------------------------------


def test_marks() -> None:
    graph = fx.Graph()
    node = graph.placeholder("x")
    assert annotation_of(node) is None
    annotate(node, adapter="a", site="s")
    assert annotation_of(node) == {"adapter": "a", "site": "s"}
    assert list(annotated_nodes(graph, "a")) == [node]
    assert list(annotated_nodes(graph, "b")) == []
    node.meta["custom"]["other"] = 1
    remove_annotation(node)
    assert node.meta["custom"] == {"other": 1}
    del node.meta["custom"]["other"]
    remove_annotation(node)
    assert "custom" not in node.meta

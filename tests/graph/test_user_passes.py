"""A user's own pass over a rewritten graph: run after every change, undone without a trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult
from traces import inputs_of, relative_error, run, traced

from gralora_fx import GraloraConfig, GraloraModel, TracedModel, merge, rewrite, trace
from gralora_fx.core.graph import pipeline
from gralora_fx.errors import RewriteError

QUERY = GraloraConfig(r=8, target_modules=["query"], init_weights=False)


@pytest.fixture
def model() -> GraloraModel:
    torch.manual_seed(0)
    result = rewrite(traced("bert"), QUERY)
    result.add_adapter("other", GraloraConfig(r=4, target_modules=["value"], init_weights=False))
    return result


def double_the_pooler(graph_module: fx.GraphModule) -> None:
    """Double what the pooler's tanh gives: an edit of the base's part of the graph."""
    (node,) = graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.tanh.default)
    with graph_module.graph.inserting_after(node):
        doubled = graph_module.graph.call_function(torch.mul, (node, 2.0))
    node.replace_all_uses_with(doubled, delete_user_cb=lambda user: user is not doubled)


def doubled(inputs: dict[str, Tensor], of: Any) -> Tensor:
    """Compute by hand what a model gives with the pass."""
    return run(of.with_pass(double_the_pooler), inputs)


def text(model: GraloraModel | TracedModel) -> str:
    return str(model.graph_module.graph)


def test_a_pass_holds_through_every_change(model: GraloraModel) -> None:
    inputs = inputs_of("bert")
    plain, merged = {}, {}
    for name in ("default", "other"):
        model.set_adapter(name)
        plain[name], merged[name] = (run(model, inputs), text(model)), merge(model)
    model.add_pass(double_the_pooler)
    for name in ("default", "other"):
        model.set_adapter(name)
        expected = doubled(inputs, merged[name])
        assert relative_error(run(merge(model), inputs), expected) < 1e-5
        assert relative_error(run(model, inputs), expected) < 1e-5
        assert relative_error(run(model, inputs), plain[name][0]) > 1e-3
        model.train()
        model.eval()
        assert relative_error(run(model, inputs), expected) < 1e-5
        model.merge_adapter()
        assert relative_error(run(model, inputs), expected) < 1e-5
        model.unmerge_adapter()
        assert relative_error(run(model, inputs), expected) < 1e-5
    with model.disable_adapter():
        assert torch.equal(run(model, inputs), doubled(inputs, traced("bert")))
    model.remove_pass(double_the_pooler)
    assert torch.equal(run(model, inputs), plain["other"][0])


def test_removing_the_pass_gives_the_graph_back(model: GraloraModel) -> None:
    before = text(model)
    model.add_pass(double_the_pooler)
    assert text(model) != before
    model.remove_pass(double_the_pooler)
    assert text(model) == before
    with pytest.raises(RewriteError, match="is not a pass of this model"):
        model.remove_pass(double_the_pooler)


def test_merging_and_unloading_give_the_bases_graph_with_the_pass(model: GraloraModel) -> None:
    assert text(merge(model)) == text(traced("bert"))
    model.add_pass(double_the_pooler)
    base = text(traced("bert").with_pass(double_the_pooler))
    assert text(merge(model)) == base
    assert text(model.unload()) == base


def test_passes_run_in_order_and_see_marked_nodes(model: GraloraModel) -> None:
    seen: list[tuple[str, int]] = []

    def note(graph_module: fx.GraphModule) -> PassResult:
        marked = [node for node in graph_module.graph.nodes if "gralora" in node.meta.get("custom", {})]
        seen.append(("first", len(marked)))
        return PassResult(graph_module, False)

    def note_again(graph_module: fx.GraphModule) -> fx.GraphModule:
        seen.append(("second", 0))
        return graph_module

    model.add_pass(note)
    model.add_pass(note_again)
    assert [name for name, _ in seen] == ["first", "first", "second"]
    assert seen[0][1] == len(model.nodes())


def test_a_probe_of_a_layers_output_sees_it_without_the_adapter(model: GraloraModel) -> None:
    """PEFT adds into the layer's output in place, which a hook on the layer then sees changed."""
    site = model.adapted_sites("default")[0].site
    seen: list[Tensor] = []

    def record(value: Tensor) -> None:
        seen.append(value)

    def probe(graph_module: fx.GraphModule) -> None:
        (call,) = (node for node in graph_module.graph.nodes if node.name == site.calls[0])
        with graph_module.graph.inserting_after(call):
            graph_module.graph.call_function(record, (call,))

    inputs = inputs_of("bert")
    with model.disable_adapter():
        model.add_pass(probe)
        run(model, inputs)
    expected = run(model, inputs)
    assert torch.equal(seen[0], seen[1])
    model.remove_pass(probe)
    assert torch.equal(run(model, inputs), expected)


def fails(graph_module: fx.GraphModule) -> None:
    double_the_pooler(graph_module)
    raise KeyError("no such node")


def breaks_the_graph(graph_module: fx.GraphModule) -> None:
    output = next(iter(reversed(graph_module.graph.nodes)))
    placeholder = next(iter(graph_module.graph.nodes))
    output.append(graph_module.graph.call_function(torch.neg, (placeholder,)))
    placeholder.prepend(next(iter(reversed(graph_module.graph.nodes))))


def gives_another(graph_module: fx.GraphModule) -> fx.GraphModule:
    return fx.GraphModule(graph_module, copy.deepcopy(graph_module.graph))


@pytest.mark.parametrize(
    ("graph_pass", "message"),
    [
        (fails, "the graph pass fails failed with KeyError: 'no such node'"),
        (breaks_the_graph, "the graph pass breaks_the_graph failed with RuntimeError"),
        (gives_another, "the graph pass gives_another returned another GraphModule; edit the given module in place"),
    ],
)
def test_a_pass_that_goes_wrong_changes_nothing(model: GraloraModel, graph_pass: Any, message: str) -> None:
    inputs = inputs_of("bert")
    model.add_pass(double_the_pooler)
    before, expected = text(model), run(model, inputs)
    with pytest.raises(RewriteError, match=message):
        model.add_pass(graph_pass)
    assert text(model) == before
    assert torch.equal(run(model, inputs), expected)
    base = text(traced("bert"))
    with pytest.raises(RewriteError, match=message):
        traced("bert").with_pass(graph_pass)
    assert text(traced("bert")) == base


def test_a_pass_that_fails_at_a_switch_leaves_the_adapter_before(model: GraloraModel) -> None:
    def only_for_default(graph_module: fx.GraphModule) -> None:
        names = {
            node.meta["custom"]["gralora"]["adapter"]
            for node in graph_module.graph.nodes
            if "custom" in node.meta and "gralora" in node.meta["custom"]
        }
        if names != {"default"}:
            raise ValueError(f"made for default, not {names}")

    inputs = inputs_of("bert")
    model.add_pass(only_for_default)
    expected = run(model, inputs)
    for change in (
        lambda: model.set_adapter("other"),
        model.merge_adapter,
        lambda: model.disable_adapter().__enter__(),
    ):
        with pytest.raises(RewriteError, match="made for default, not"):
            change()
        assert model.active_adapters == ["default"]
        assert model.merged_adapters == []
        assert torch.equal(run(model, inputs), expected)


def test_a_pass_over_a_trace_is_looked_at_again() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    def drop_first(graph_module: fx.GraphModule) -> None:
        call = graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)[0]
        call.replace_all_uses_with(call.args[0])
        graph_module.graph.erase_node(call)

    source = Net()
    result = trace(source, (torch.randn(2, 4),)).with_pass(drop_first)
    assert [len(site.calls) for site in result.sites] == [0, 1]
    x = torch.randn(3, 4)
    assert torch.equal(result(x), source.b(x))


def test_a_pass_that_goes_wrong_is_shown_with_what_it_had_changed() -> None:
    class Chain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.neg(torch.relu(x))

    def swap(graph_module: fx.GraphModule) -> None:
        x, relu, neg, _ = graph_module.graph.nodes
        relu.target = torch.tanh
        neg.args = (x,)
        graph_module.graph.erase_node(relu)
        x.prepend(graph_module.graph.call_function(torch.exp, (x,)))

    with pytest.raises(RewriteError) as caught:
        trace(fx.symbolic_trace(Chain()), (torch.ones(2),)).with_pass(swap)
    lines = str(caught.value).splitlines()
    assert "the graph pass" in lines[0]
    assert lines[0].endswith("it had changed:")
    assert lines[1:] == [
        "- relu = call_function relu(x)",
        "- neg = call_function neg(relu)",
        "+ neg = call_function neg(x)",
        "+ exp = call_function exp(x)",
    ]


def test_a_pass_of_the_packages_own_protocol_is_taken(model: GraloraModel) -> None:
    expected = model.graph_module.code

    def changes_nothing(graph_module: fx.GraphModule) -> pipeline.PassResult[fx.GraphModule]:
        return pipeline.PassResult(0)

    def returns_another(graph_module: fx.GraphModule) -> pipeline.PassResult[fx.GraphModule]:
        return pipeline.PassResult(1, graph=fx.GraphModule(graph_module, graph_module.graph))

    model.add_pass(changes_nothing)
    assert model.graph_module.code == expected
    with pytest.raises(RewriteError, match="returns_another returned another GraphModule"):
        model.add_pass(returns_another)

"""The state of a rewritten model: combinations that have no right result are refused, and errors change nothing."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from gralora_fx import GraloraConfig, GraloraModel, merge, rewrite, trace
from gralora_fx.errors import ConfigError, GraloraError, MergeError, RewriteError

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


def adapted(**fields: Any) -> GraloraModel:
    model = rewrite(
        trace(net(), (X,)), GraloraConfig(**{"r": 4, "target_modules": ["0"], "init_weights": False, **fields})
    )
    model.add_adapter("b", GraloraConfig(r=4, target_modules=["2"], init_weights=False))
    return model


def snapshot(model: GraloraModel) -> tuple[Any, ...]:
    parameters = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
    return str(model.graph_module.graph), model.active_adapters, model.merged_adapters, parameters


@pytest.mark.parametrize(
    "fields", [{"modules_to_save": ["2"]}, {"modules_to_save": ["2"], "target_modules": ["0"], "r": 2}]
)
def test_what_one_adapter_trains_whole_another_does_not_adapt_beside_it(fields: dict[str, Any]) -> None:
    model = adapted(**fields)
    before = snapshot(model)
    for call in (lambda: model.set_adapter(["default", "b"]), lambda: merge(model, ["default", "b"])):
        with pytest.raises(RewriteError, match="adapter 'b' adapts 2, of which adapter 'default' trains a copy"):
            call()
    assert snapshot(model) == before
    model.set_adapter("b")


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload", "merge"])
def test_a_name_given_twice_is_not_folded_twice(call: str) -> None:
    model = adapted()
    names = {"adapter_names": ["default", "default"]}
    before = snapshot(model)
    with pytest.raises(MergeError, match="adapter 'default' is named twice, and would be folded twice; name it once"):
        merge(model, **names) if call == "merge" else getattr(model, call)(**names)
    assert snapshot(model) == before


def test_adapters_are_not_switched_while_disabled() -> None:
    model = adapted()
    expected = model(X)
    with model.disable_adapter(), pytest.raises(RewriteError, match="cannot switch adapters within disable_adapter"):
        model.set_adapter("b")
    assert torch.equal(model(X), expected)
    model.set_adapter("b")


def test_an_adapter_deleted_while_disabled_does_not_come_back() -> None:
    model = adapted()
    with model.disable_adapter():
        model.delete_adapter("default")
        base = model(X)
    assert model.active_adapters == []
    assert torch.equal(model(X), base)


class Shared(nn.Module):
    """A tied head, and a weight that is read through a view which something else reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.hidden, self.mix = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        turned = self.mix.weight.t()
        hidden: Tensor = self.hidden(self.table(ids)) @ turned + turned.sum()
        return self.head(hidden)


def test_a_failed_untying_changes_nothing() -> None:
    ids = torch.tensor([[1, 2, 9]])
    config = GraloraConfig(r=4, gralora_k=2, target_modules=["hidden", "head", "mix"], init_weights=False)
    model = rewrite(trace(Shared(), (ids,)), config)
    model.add_pass(lambda graph_module: None)
    before = snapshot(model)
    with pytest.raises(MergeError, match="the weight of mix cannot be untied: it is read through t, which"):
        model.merge_adapter(untie=True)
    assert snapshot(model) == before


def test_a_failed_merge_into_the_base_leaves_what_is_merged() -> None:
    ids = torch.tensor([[1, 2, 9]])
    model = rewrite(trace(Shared(), (ids,)), GraloraConfig(r=4, target_modules=["head"], init_weights=False))
    model.merge_adapter(untie=True)
    expected, before = model(ids), snapshot(model)
    with pytest.raises(MergeError, match="is shared, so folding into it would change more than the layer"):
        model.merge_and_unload()
    assert snapshot(model) == before
    assert torch.equal(model(ids), expected)


def test_merging_another_adapter_beside_an_untied_one() -> None:
    ids = torch.tensor([[1, 2, 9]])
    model = rewrite(trace(Shared(), (ids,)), GraloraConfig(r=4, target_modules=["head"], init_weights=False))
    model.add_adapter("b", GraloraConfig(r=2, target_modules=["head", "hidden"], init_weights=False))
    model.set_adapter(["default", "b"])
    expected = model(ids)
    model.merge_adapter("default", untie=True)
    model.merge_adapter("b")
    assert torch.allclose(model(ids), expected, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(model(ids), expected)


def test_merging_into_the_base_while_merged() -> None:
    model = adapted()
    expected = model(X)
    model.merge_adapter()
    assert torch.allclose(model.merge_and_unload()(X), expected, atol=1e-5)


class Autoencoder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.encode = nn.Linear(8, width)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(torch.tanh(self.encode(x)), self.encode.weight.t())


@pytest.mark.parametrize("width", [8, 4])
def test_a_weight_used_both_ways_round_is_adapted_where_the_layer_is_called(width: int) -> None:
    """PEFT replaces the layer, and a use of its weight beside it reads the base's."""
    torch.manual_seed(0)
    source = Autoencoder(width)
    traced = trace(source, (X,))
    assert [(site.path, site.kind) for site in traced.sites] == [("encode", "linear"), ("encode.weight", "conv1d")]
    model = rewrite(traced, GraloraConfig(r=4, target_modules=["encode"], init_weights=False))
    hidden = functional.linear(X, source.encode.weight + model.delta_weight("encode"), source.encode.bias)
    expected = functional.linear(torch.tanh(hidden), source.encode.weight.t())
    assert torch.allclose(model(X), expected, atol=1e-5)
    with pytest.raises(MergeError, match="is shared"):
        merge(model)
    assert torch.allclose(merge(model, untie=True)(X), expected, atol=1e-5)


class Biased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.w, self.b = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(self.attn(x, x, x, need_weights=False)[0], self.w, self.b)


def test_biases_of_functional_calls_train(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 8)
    source = Biased()
    targets = ["in_proj_weight", "out_proj", "w"]
    model = rewrite(
        trace(source, (x,)), GraloraConfig(r=4, target_modules=targets, bias="gralora_only", init_weights=False)
    )
    assert set(model.plans["default"].trained_biases) == {"attn.in_proj_bias", "attn.out_proj.bias", "b"}
    model(x).sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 9
    assert all(p.grad is not None for p in trained)
    with torch.no_grad():
        for parameter in trained:
            parameter += 0.1
    model.save_pretrained(tmp_path)
    again = GraloraModel.from_pretrained(trace(source, (x,)), tmp_path)
    assert torch.equal(again(x), model(x))
    assert torch.allclose(merge(model)(x), model(x), atol=1e-4)


def test_sums_of_adapters_whose_sites_end_alike(tmp_path: Path) -> None:
    source = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)))
    model = rewrite(trace(source, (X,)), GraloraConfig(r=1, gralora_k=1, target_modules="0", init_weights=False))
    model.add_weighted_adapter(["default"], [2.0], "twice")
    assert list(model.adapter("twice").factors) == ["0"]
    model.set_adapter("twice")
    model.save_pretrained(tmp_path)
    again = GraloraModel.from_pretrained(trace(source, (X,)), tmp_path / "twice")
    assert torch.equal(again(X), model(X))


@pytest.mark.parametrize("name", ["class", "None", 'a"b', "a'b", "a\nb", "a\\b", "a/b", "a.b", "", "forward", 3])
def test_names_that_cannot_be_part_of_a_path_or_of_code(name: Any) -> None:
    model = adapted()
    before = snapshot(model)
    with pytest.raises(ConfigError, match="cannot name an adapter; use letters, digits"):
        model.add_adapter(name, GraloraConfig(r=4, target_modules=["0"]))
    assert snapshot(model) == before


def test_names_with_dashes_and_blanks_are_taken() -> None:
    model = adapted()
    model.add_adapter("my-adapter 2", GraloraConfig(r=4, target_modules=["0"], init_weights=False))
    model.set_adapter("my-adapter 2")
    assert not torch.equal(model(X), model.traced(X))


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.set_adapter(None),
        lambda model: model.set_adapter([["b"]]),
        lambda model: model.set_adapter("absent"),
        lambda model: model.delete_adapter(["b"]),
        lambda model: model.merge_adapter(3),
        lambda model: model.merge_adapter(["b"]),
        lambda model: merge(model, 3),
        lambda model: model.add_weighted_adapter(None, [1], "sum"),
        lambda model: model.add_weighted_adapter(["default"], 1, "sum"),
        lambda model: model.add_weighted_adapter(["default"], [1e300], "sum"),
        lambda model: model.adapted_sites(["b"]),
        lambda model: model.nodes("absent"),
        lambda model: model.site(None),
        lambda model: model.save_pretrained("/nowhere", 3),
    ],
)
def test_wrong_arguments_are_named_and_change_nothing(call: Callable[[GraloraModel], Any]) -> None:
    model = adapted()
    before = snapshot(model)
    with pytest.raises(GraloraError):
        call(model)
    assert snapshot(model) == before


def test_no_target_is_said_to_be_none() -> None:
    with pytest.raises(ConfigError, match="target_modules is empty; name modules, or take 'all-linear'"):
        rewrite(trace(net(), (X,)), GraloraConfig(target_modules=[]))


def test_merging_adds_no_parameters() -> None:
    model = adapted()
    before = model.get_nb_trainable_parameters()
    model.merge_adapter()
    assert model.get_nb_trainable_parameters() == before


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_follows_every_change(backend: str) -> None:
    torch._dynamo.reset()
    model = adapted(gralora_dropout=0.9)
    compiled = torch.compile(model, backend=backend)
    model.train()
    compiled(X)
    model.eval()
    with torch.no_grad():
        expected = model(X)
        assert torch.allclose(compiled(X), expected, atol=1e-6)
        model.merge_adapter()
        assert torch.allclose(compiled(X), expected, atol=1e-5)
        model.unmerge_adapter()
        with model.disable_adapter():
            assert torch.allclose(compiled(X), model.traced(X), atol=1e-6)
        model.set_adapter("b")
        assert torch.allclose(compiled(X), model(X), atol=1e-6)


def test_a_pass_that_fails_from_its_second_run_on_is_reported_once() -> None:
    model = adapted()
    runs: list[int] = []

    def fails_later(graph_module: fx.GraphModule) -> None:
        runs.append(len(runs))
        if len(runs) > 1:
            raise ValueError("not again")

    model.add_pass(fails_later)
    before = snapshot(model)
    for call in (model.merge_adapter, lambda: model.set_adapter("b"), lambda: model.disable_adapter().__enter__()):
        with pytest.raises(RewriteError, match="failed with ValueError: not again"):
            call()
        assert snapshot(model) == before


def test_a_switch_to_a_state_that_ran_before_makes_no_graph() -> None:
    model = adapted()
    graphs: dict[tuple[Any, ...], fx.GraphModule] = {}
    outputs: dict[tuple[Any, ...], Tensor] = {}
    for _ in range(2):
        for names in (["default"], ["b"], ["default", "b"], ["b", "default"]):
            for training in (True, False):
                model.set_adapter(names)
                model.train(training)
                key = (*names, training)
                assert graphs.setdefault(key, model.graph_module) is model.graph_module
                assert torch.equal(outputs.setdefault(key, model(X)), model(X))
        model.merge_adapter()
        model.unmerge_adapter()
        with model.disable_adapter():
            assert graphs.setdefault(("none",), model.graph_module) is model.graph_module
    assert len({id(graph_module) for graph_module in graphs.values()}) >= 5


def _replaced(model: GraloraModel) -> None:
    tree = model.graph_module
    tree.get_submodule("0").weight = nn.Parameter(torch.randn(8, 8))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model._apply(torch.clone),  # as `.to(device)` does
        lambda model: model.load_state_dict(
            {k: torch.randn_like(v) for k, v in model.state_dict().items()}, assign=True
        ),
        lambda model: model.adapter("default").factors["0"].A.data.mul_(2),
        lambda model: (model.delete_adapter("default"), model.add_adapter("default", TWO)),
        lambda model: model.add_pass(lambda graph_module: None),
        lambda model: (_halved(model.graph_module), model.adopt_edits()),
        _replaced,
    ],
)
def test_a_graph_that_was_kept_computes_with_the_tensors_there_are_now(change: Callable[[GraloraModel], Any]) -> None:
    """A run after a change and a switch back gives what a copy gives, whose graphs are all made anew."""
    model = adapted()
    model.set_adapter("b")
    change(model)
    model.set_adapter("default")
    assert torch.equal(model(X), copy.deepcopy(model)(X))


TWO = GraloraConfig(r=2, target_modules=["0", "2"], init_weights=False)


def _halved(graph_module: fx.GraphModule) -> None:
    """Edit the graph that runs, as a user might."""
    output = graph_module.graph.output_node()
    with graph_module.graph.inserting_before(output):
        (result,) = output.all_input_nodes
        output.replace_input_with(result, graph_module.graph.call_function(torch.mul, (result, 0.5)))
    graph_module.recompile()


def test_an_edit_stays_when_the_mode_changes_and_is_not_lost_by_a_switch() -> None:
    model = adapted()
    expected = model(X)
    _halved(model.graph_module)
    model.train()
    assert torch.equal(model(X), expected * 0.5)
    with pytest.raises(RewriteError, match=r"edited by hand.*call adopt_edits\(\)"):
        model.set_adapter("b")
    assert torch.equal(model(X), expected * 0.5)
    edit = model.adopt_edits()
    assert edit is not None
    model.set_adapter("b")
    model.set_adapter("default")
    assert torch.equal(model(X), expected * 0.5)
    model.remove_pass(edit)
    assert torch.equal(model(X), expected)


@pytest.mark.usefixtures("own_garbage")
@pytest.mark.parametrize("merges", [False, True])
def test_a_block_with_disabled_adapters_ends_with_the_graph_from_before_it(merges: bool) -> None:
    model = adapted().eval()
    model.add_pass(lambda graph_module: None)
    if merges:
        model.merge_adapter()
    before = model.graph_module
    with model.disable_adapter():
        model.train()
        model.eval()
        assert model.graph_module is not before
    assert model.graph_module is before
    reference = weakref.ref(before)
    del before
    if merges:
        model.unmerge_adapter()
    else:
        model.set_adapter("b")
    gc.collect()
    assert reference() is None  # its state may not come again, so it is not kept


def test_a_pass_runs_again_with_every_switch() -> None:
    model, runs = adapted(), []
    model.add_pass(lambda graph_module: runs.append(len(graph_module.graph.nodes)))
    for name in ("b", "default", "b"):
        model.set_adapter(name)
    assert len(runs) == 4


@pytest.mark.usefixtures("own_garbage")
def test_few_of_many_states_are_kept() -> None:
    model = adapted()
    for index in range(40):
        model.add_adapter(f"a{index}", GraloraConfig(r=2, target_modules=["0"], init_weights=False))
    seen = []
    for index in range(40):
        model.set_adapter(f"a{index}")
        seen.append(weakref.ref(model.graph_module))
    gc.collect()
    assert 1 <= sum(reference() is not None for reference in seen) <= 32

"""Linear layers in subgraphs: regions, checkpoints, leaf modules and nested graphs are adapted as PEFT adapts them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from tiny_models import text_batch, tiny_model
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from traces import traced as traced_of
from transformers import BertForSequenceClassification

from gralora_fx import GraloraConfig, GraloraModel, TracedModel, merge, plan, rewrite, trace
from gralora_fx.errors import ExportError, TargetError
from gralora_fx.exporters import export_onnx

LAYERS = ["first", "inner", "last"]


class Net(nn.Module):
    """Three layers, the second one within a region."""

    def __init__(self, region: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.drop = nn.Dropout(0.5)
        self.region = region

    def block(self, x: Tensor) -> Tensor:
        return self.drop(self.inner(x))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x + self.region(self, x).float())


def no_grad(net: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net.block(x)


def inference_mode(net: Net, x: Tensor) -> Tensor:
    with torch.inference_mode():
        result = net.block(x)
    return result.clone()


def autocast(net: Net, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return net.block(x)


def no_autocast_within_no_grad(net: Net, x: Tensor) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        y = net.block(x)
        with torch.autocast("cpu", enabled=False), torch.enable_grad():
            return y.float() + net.block(x)


def reentrant(net: Net, x: Tensor) -> Tensor:
    return checkpoint(net.block, x, use_reentrant=True)


def not_reentrant(net: Net, x: Tensor) -> Tensor:
    return checkpoint(net.block, x, use_reentrant=False)


def twice(net: Net, x: Tensor) -> Tensor:
    return net.block(x) + no_grad(net, x)


REGIONS = [no_grad, inference_mode, autocast, no_autocast_within_no_grad, reentrant, not_reentrant, twice]


def both(region: Callable[[Net, Tensor], Tensor]) -> tuple[nn.Module, GraloraModel]:
    """PEFT's model and ours with the same random adapter."""
    torch.manual_seed(0)
    net = Net(region).eval()
    theirs = peft.get_peft_model(
        copy.deepcopy(net), peft.GraloraConfig(r=4, target_modules=LAYERS, init_weights=False)
    ).eval()
    ours = rewrite(trace(net, (torch.randn(3, 8),)), GraloraConfig(r=4, target_modules=LAYERS))
    tensors = dict(theirs.named_parameters())
    with torch.no_grad():
        for path in LAYERS:
            for name in "AB":
                getattr(ours.factors(path), name).copy_(tensors[f"base_model.model.{path}.gralora_{name}.default"])
    return theirs, ours


@pytest.mark.filterwarnings("ignore:gradient checkpointing")
@pytest.mark.parametrize("region", REGIONS)
def test_a_layer_within_a_region_is_adapted_as_by_peft(region: Callable[[Net, Tensor], Tensor]) -> None:
    theirs, ours = both(region)
    x = torch.randn(5, 8)
    tolerance = 2e-2 if "autocast" in region.__name__ else 1e-5
    expected, actual = theirs(x), ours(x)
    assert (expected - actual).abs().max() <= tolerance * expected.abs().max()
    expected.square().mean().backward()
    actual.square().mean().backward()
    tensors = dict(theirs.named_parameters())
    for path in LAYERS:
        for name in "AB":
            mine = getattr(ours.factors(path), name).grad
            other = tensors[f"base_model.model.{path}.gralora_{name}.default"].grad
            assert (mine is None) == (other is None), path
            if other is not None:
                assert (mine - other).abs().max() <= max(tolerance, 1e-4) * other.abs().max(), path
    with torch.no_grad():
        assert (merge(ours)(x) - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.filterwarnings("ignore:gradient checkpointing", "ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("region", REGIONS)
def test_a_region_follows_the_mode_and_goes_in_and_out_whole(region: Callable[[Net, Tensor], Tensor]) -> None:
    net = Net(region)
    traced = trace(net, (torch.randn(3, 8),))
    model = rewrite(traced, GraloraConfig(r=4, target_modules=LAYERS, init_weights=False))
    x = torch.randn(6, 8)
    base = [(node.op, str(node.target), node.name) for node in traced.graph_module.graph.nodes]
    for training in (True, False):
        net.train(training)
        model.train(training)
        torch.manual_seed(1)
        expected = net(x)
        with model.disable_adapter():
            torch.manual_seed(1)
            assert torch.equal(model(x), expected)
    assert len(model.nodes("inner", "default")) == len(model.nodes("first", "default")) * len(
        traced.site("inner").calls
    )
    before = model(x)
    model.merge_adapter()
    assert (model(x) - before).abs().max() <= (2e-2 if "autocast" in region.__name__ else 1e-5) * before.abs().max()
    model.unmerge_adapter()
    assert torch.equal(model(x), before)
    unloaded = model.unload()
    assert [(node.op, str(node.target), node.name) for node in unloaded.graph_module.graph.nodes] == base
    assert torch.equal(unloaded(x), net(x))


@pytest.mark.parametrize("region", [no_grad, no_autocast_within_no_grad])
def test_an_error_within_a_region_leaves_the_modes_as_they_were(region: Callable[[Net, Tensor], Tensor]) -> None:
    traced = trace(Net(region).eval(), (torch.randn(3, 8),))

    def break_inner(graph_module: fx.GraphModule) -> None:
        for node in graph_module.graph.nodes:
            if node.name in traced.site("inner").calls:
                node.target, node.args = torch.mm, (node.args[0], node.args[0])

    broken = traced.with_pass(break_inner)
    with pytest.raises(RuntimeError):
        broken(torch.randn(3, 8))
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


def test_a_checkpoint_says_that_it_is_none_in_a_trace() -> None:
    with pytest.warns(UserWarning, match=r"gradient checkpointing is not part of a trace.*Net\.block"):
        trace(Net(reentrant), (torch.randn(3, 8),))


class Widths(nn.Module):
    """A layer without inputs, one without outputs, and one with both."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.none_in, self.none_out = nn.Linear(8, 8), nn.Linear(0, 4), nn.Linear(8, 0)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.wide(x), self.none_in(self.none_out(x))], -1)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("source", [Widths, lambda: fx.symbolic_trace(Widths())])
def test_a_layer_of_width_0_is_rejected_with_its_reason(source: Callable[[], nn.Module]) -> None:
    traced = trace(source(), (torch.randn(3, 8),))
    planned = plan(traced, GraloraConfig(r=4, target_modules="all-linear"))
    reasons = {entry.site.path: entry.reason for entry in planned.rejected}
    assert set(reasons) == {"none_in", "none_out"}
    assert all("widths is 0" in reason for reason in reasons.values())
    with pytest.raises(TargetError, match="widths is 0"):
        plan(traced, GraloraConfig(r=4, target_modules=["none_in", "none_out"]))
    model = rewrite(traced, planned)
    assert model(torch.randn(2, 8)).shape == merge(model)(torch.randn(2, 8)).shape == (2, 12)


# -- leaf modules of a symbolic trace --------------------------------------------------------------------------------


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(8, 16), nn.Linear(16, 8), nn.Dropout(0.5)

    def forward(self, x: Tensor, scale: float = 1.0, mask: Tensor | None = None) -> Tensor:
        x = F.dropout(F.relu(self.up(x)), 0.5, training=self.training)
        x = x if mask is None else x * mask
        return self.drop(self.down(x)) * scale


class Unmasked(FeedForward):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.down(F.relu(self.up(x))) * scale


class Branching(FeedForward):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.up(x)[..., :8] if x.sum() > 0 else super().forward(x, scale)


class TrainsOtherwise(FeedForward):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(x, scale) if self.training else self.up(x)[..., 8:] * scale


class Around(nn.Module):
    def __init__(self, leaf: nn.Module) -> None:
        super().__init__()
        self.first, self.leaf = nn.Linear(8, 8), leaf
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.GELU(), nn.Linear(8, 8)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.leaf(self.leaf(self.first(x), scale=2.0)))


class WithLeaves(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in ("leaf", "layers") or super().is_leaf_module(m, module_qualified_name)


def symbolic(model: nn.Module) -> fx.GraphModule:
    return fx.GraphModule(model, WithLeaves().trace(model))


def test_layers_of_leaf_modules_are_adapted() -> None:
    torch.manual_seed(0)
    source = symbolic(Around(FeedForward()))
    traced = trace(source, (torch.randn(3, 8),))
    calls = {site.path: len(site.calls) for site in traced.sites}
    assert calls == {"first": 1, "leaf.up": 2, "leaf.down": 2, "layers.0": 1, "layers.1.1": 1}
    x = torch.randn(4, 8)
    for training in (True, False):
        source.train(training)
        traced.train(training)
        torch.manual_seed(1)
        expected = source(x)
        torch.manual_seed(1)
        assert torch.equal(traced(x), expected)
    theirs = peft.get_peft_model(
        copy.deepcopy(Around(FeedForward())), peft.GraloraConfig(r=4, target_modules=["up"], init_weights=False)
    )
    assert set(theirs.targeted_module_names) == {
        planned.site.path for planned in plan(traced, GraloraConfig(r=4, target_modules=["up"])).selected
    }
    every_site_counts(traced, x)


def test_layers_of_a_nested_graph_are_adapted() -> None:
    inner = symbolic(Around(FeedForward()))
    traced = trace(symbolic(Around(fx.symbolic_trace(Unmasked()))), (torch.randn(3, 8),))
    assert len(traced.site("leaf.up").calls) == 2
    outer = fx.symbolic_trace(nn.Sequential(inner, nn.Linear(8, 8)))
    traced = trace(outer, (torch.randn(3, 8),))
    assert [site.path for site in traced.sites if len(site.calls) == 2] == ["0.leaf.up", "0.leaf.down"]
    every_site_counts(traced, torch.randn(4, 8))


def hooked() -> nn.Module:
    leaf = FeedForward()
    leaf.register_forward_hook(lambda module, inputs, output: output + 1)
    return leaf


@pytest.mark.parametrize(
    ("leaf", "reason"),
    [
        (Branching, "torch.fx cannot trace it"),
        (TrainsOtherwise, "differs between training and evaluation"),
        (hooked, "it has hooks"),
    ],
)
def test_layers_of_an_opaque_leaf_are_rejected_by_name(leaf: Callable[[], nn.Module], reason: str) -> None:
    source = symbolic(Around(leaf()))
    traced = trace(source, (torch.randn(3, 8),))
    planned = plan(traced, GraloraConfig(r=4, target_modules="all-linear"))
    rejected = {entry.site.path: entry.reason for entry in planned.rejected}
    assert set(rejected) == {"leaf.up", "leaf.down"}
    assert all("inside the module call leaf" in text and reason in text for text in rejected.values())
    x = torch.randn(4, 8)
    source.eval()
    assert torch.equal(traced.eval()(x), source(x))


def test_a_layer_that_is_never_called_says_so() -> None:
    net = Net(lambda net, x: x)
    planned = plan(trace(net, (torch.randn(3, 8),)), GraloraConfig(r=4, target_modules=LAYERS))
    (line,) = (line for line in str(planned).splitlines() if line.startswith("inner"))
    assert line.endswith("r=4 k=2 (the traced forward never calls it)")


def every_site_counts(traced: TracedModel, x: Tensor) -> None:
    """Each adapter changes the output of a model without dropout."""
    model = rewrite(traced.eval(), GraloraConfig(r=4, target_modules="all-linear", init_weights=False))
    before = model(x)
    for planned in model.adapted_sites():
        factors = model.factors(planned.site.path)
        kept = factors.B.data.clone()
        factors.B.data.zero_()
        assert not torch.equal(model(x), before), planned.site.path
        factors.B.data.copy_(kept)


class FrozenBody(BertForSequenceClassification):
    """A classifier that computes its features without gradients, as is done to train a head alone."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            hidden = self.bert(input_ids, attention_mask).last_hidden_state
        return self.classifier(hidden[:, 0])


@pytest.mark.parametrize("grad", [True, False])
def test_a_region_of_a_transformers_model_keeps_gradients_out_as_in_peft(grad: bool, tmp_path: Path) -> None:
    """A region keeps gradients out as in PEFT, whether or not the caller, too, has turned them off while tracing."""
    model = FrozenBody(tiny_model("bert").config).eval()
    fields = {"r": 4, "target_modules": ["query", "classifier"], "init_weights": False}
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.GraloraConfig(**fields)).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    with torch.set_grad_enabled(grad):
        traced = trace(model, text_batch())
    ours = GraloraModel.from_pretrained(traced, tmp_path / "adapter")
    expected, actual = theirs(**text_batch(2, 5)), ours(**text_batch(2, 5))
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    expected.square().mean().backward()
    actual.square().mean().backward()
    tensors = dict(theirs.named_parameters())
    for site in ours.adapter("default").factors:
        for name in "AB":
            other = tensors[f"base_model.model.{site}.gralora_{name}.default"].grad
            mine = getattr(ours.factors(site), name).grad
            assert (mine is None) == (other is None) == (site != "classifier")
            if mine is not None and other is not None:
                assert (mine - other).abs().max() <= 1e-4 * other.abs().max()
    report = export_onnx(ours, tmp_path / "onnx")
    assert report.verification is not None
    assert report.verification.passed


def test_a_region_that_no_gradient_would_pass_is_left_out() -> None:
    """The angles of positions, which transformers computes without gradients."""
    targets = {str(node.target) for node in traced_of("llama").graph_module.graph.nodes}
    assert not any("grad_mode" in target for target in targets)


@pytest.mark.parametrize("region", [autocast, no_autocast_within_no_grad])
def test_a_layer_under_autocast_is_named_by_the_export(region: Callable[[Net, Tensor], Tensor], tmp_path: Path) -> None:
    traced = trace(Net(region).eval(), (torch.randn(3, 8),))
    with pytest.raises(ExportError, match=r"inner runs under torch\.autocast \(torch\.bfloat16\)"):
        export_onnx(traced, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()

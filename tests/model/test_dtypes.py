"""Conversions of a rewritten model and of a trace: values are those of the converted model in PEFT."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from traces import fresh, fresh_trace

from gralora_fx import DoraConfig, GraloraConfig, GraloraModel, LoraConfig, TracedModel, merge, rewrite, trace
from gralora_fx.core.tracing import capture
from gralora_fx.errors import TraceError

BF16 = torch.bfloat16
CONFIGS = {
    "gralora": GraloraConfig(r=4, alpha=4, target_modules="all-linear", init_weights=False),
    "lora": LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", init_lora_weights=False),
    "dora": DoraConfig(r=4, lora_alpha=4, target_modules="all-linear", init_lora_weights=False),
}
WAYS = ("whole", "base", "autocast", "autocast over a bf16 base")
# the others add the adapter's output in another order than PEFT does, or in another dtype under autocast
BIT_EQUAL = {
    ("base", "gralora"),
    ("base", "dora"),
    ("autocast", "dora"),
    *(("autocast over a bf16 base", method) for method in CONFIGS),
}


def step(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the first output of a training step, and the gradients by PEFT's keys."""
    model.zero_grad()
    torch.manual_seed(3)
    output = model(**inputs)[0]
    output.double().square().mean().backward()
    gradients = {_key(name): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return output.detach(), gradients


def _key(name: str) -> str:
    for part in ("base_model.model.", "graph_module.gralora.", "default.", "_orig_mod."):
        name = name.replace(part, "")
    return name.replace(".default", "").removesuffix(".weight")


def distance(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the norm of a difference over that of what was expected."""
    squares = [((actual[k].double() - e.double()).norm() ** 2, e.double().norm() ** 2) for k, e in expected.items()]
    return float((sum(a for a, _ in squares) / sum(b for _, b in squares)) ** 0.5)


@functools.cache
def _half(name: str) -> Any:
    """Return a tiny model and its trace, converted by way of the trace."""
    source, traced = fresh(name)
    assert traced.to(BF16) is traced
    assert source.dtype == traced.dtype == BF16  # what shares the tensors is converted too
    return source, traced


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_values_and_gradients_are_those_of_peft_converted_alike(
    name: str, method: str, way: str, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    source, traced = fresh(name) if way in ("whole", "autocast") else copy.deepcopy(_half(name))
    ours = rewrite(traced, CONFIGS[method]).train()
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(source), str(tmp_path), is_trainable=True).train()
    if way == "whole":
        ours.to(BF16)
        theirs.to(BF16)
    inputs = traced.graph_inputs
    with torch.autocast("cpu", BF16) if "autocast" in way else nullcontext():
        (output, gradients), (their_output, their_gradients) = step(ours, inputs), step(theirs, inputs)
    assert output.dtype == BF16
    assert gradients.keys() == their_gradients.keys()
    assert {g.dtype for g in gradients.values()} == {BF16 if way == "whole" else torch.float32}
    if (way, method) in BIT_EQUAL:
        assert torch.equal(output, their_output)
        assert all(torch.equal(gradients[key], expected) for key, expected in their_gradients.items())
        return
    exact = GraloraModel.from_pretrained(fresh_trace(name), tmp_path).train()
    exact.adapter("default").requires_grad_(True)
    for wide, narrow in zip(exact.parameters(), ours.parameters(), strict=True):
        wide.data = narrow.data.to(wide.dtype)
    exact_output, exact_gradients = step(exact, inputs)
    error, their_error = (distance({"": given}, {"": exact_output}) for given in (output, their_output))
    assert error <= 2 * their_error + 1e-3
    assert distance(gradients, exact_gradients) <= 2 * distance(their_gradients, exact_gradients) + 1e-3


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["llama", "t5", "vit"])
def test_a_converted_trace_is_a_trace_of_the_converted_model(name: str, dtype: torch.dtype) -> None:
    source, traced = fresh(name)
    expected = trace(copy.deepcopy(source).to(dtype))
    given = copy.deepcopy(expected.graph_inputs)
    assert traced.to(dtype) is traced
    assert str(traced.graph_module.graph) == str(expected.graph_module.graph)
    assert [site.path for site in traced.sites] == [site.path for site in expected.sites]
    assert torch.equal(traced(**given)[0], expected(**given)[0])
    with torch.no_grad():
        assert torch.equal(source.eval()(**given)[0], expected(**given)[0])


class Softmax(nn.Module):
    """A module with an explicit float32, a cast to its own dtype, a constant, statistics, and a bound by its dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.inner(x))
        weights = torch.softmax(hidden, dim=-1, dtype=torch.float32).to(hidden.dtype)
        bound = torch.tensor(torch.finfo(hidden.dtype).max, dtype=hidden.dtype)
        return self.outer(torch.minimum(weights * torch.arange(8, dtype=x.dtype, device=x.device), bound))


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def own(config: Any = None) -> tuple[Softmax, TracedModel, GraloraModel]:
    torch.manual_seed(0)
    source = Softmax()
    traced = trace(source.train(), (X,))
    return source, traced, rewrite(traced, config or LoraConfig(r=2, target_modules=["inner", "outer"]))


def test_an_own_module_keeps_its_explicit_float32_and_shares_its_statistics() -> None:
    source, traced, model = own()
    model.bfloat16()
    assert source.inner.weight.dtype == source.norm.running_mean.dtype == BF16
    targets = [node.args[1] for node in traced.graph_module.graph.nodes if node.target is torch.ops.aten.to.dtype]
    assert targets.count(BF16) == 1
    mean = source.norm.running_mean.clone()
    with model.disable_adapter():
        output = model(X.to(BF16))
    assert not torch.equal(source.norm.running_mean, mean)
    source.norm.running_mean.copy_(mean)
    assert torch.equal(source(X.to(BF16)), output)


def test_every_model_over_a_trace_follows_its_conversion() -> None:
    source, traced, model = own()
    other = rewrite(traced, GraloraConfig(r=4, target_modules=["outer"], init_weights=False)).eval()
    model.eval().to(BF16)
    assert other(X.to(BF16)).dtype == traced(X.to(BF16)).dtype == BF16
    traced.float()
    assert model(X).dtype == torch.float32
    again = rewrite(trace(source, (X,)), GraloraConfig(r=4, target_modules=["outer"])).eval()
    again.load_state_dict(other.state_dict())
    assert torch.equal(other(X), again(X))
    assert other.traced is traced


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: copy.deepcopy(copy.deepcopy(model))])
def test_a_copy_is_converted_apart(copied: Callable[[GraloraModel], GraloraModel]) -> None:
    source, _, model = own()
    model.eval()
    expected, other = model(X), copied(model)
    assert other.to(BF16)(X.to(BF16)).dtype == BF16
    assert source.inner.weight.dtype == torch.float32
    assert torch.equal(model(X), expected)
    assert torch.equal(model.to(BF16)(X.to(BF16)), other(X.to(BF16)))


def test_what_is_merged_is_converted_with_the_weights_that_it_has() -> None:
    _, _, model = own(LoraConfig(r=2, target_modules=["inner"], init_lora_weights=False))
    merged = merge(model.eval())
    expected = merged(X)
    assert (merged.to(BF16)(X.to(BF16)) - expected).abs().max() < 0.02
    assert (model(X) - expected).abs().max() < 1e-5  # whose base is as it was


def doubled(graph_module: fx.GraphModule) -> None:
    (node,) = graph_module.graph.find_nodes(op="output")
    with graph_module.graph.inserting_before(node):
        twice = graph_module.graph.call_function(torch.add, (node.args[0][0], node.args[0][0]))
    node.args = ((twice,),)
    graph_module.recompile()


@pytest.mark.parametrize("made", ["by a pass", "by hand", "by pickle", "of a graph"])
def test_a_trace_that_cannot_be_made_again_is_refused_and_stays(made: str) -> None:
    source, traced, _ = own()
    if made == "by a pass":
        traced = traced.with_pass(doubled)
    elif made == "by hand":
        doubled(traced.graph_module)
    elif made == "by pickle":
        traced = pickle.loads(pickle.dumps(traced))
    else:
        traced = trace(torch.export.export(source, (X,)))
    model = rewrite(traced.eval(), LoraConfig(r=2, target_modules=["inner"]))
    expected = model(X)
    reason = {"by pickle": "it was read from a file", "of a graph": "it was made from a graph"}.get(
        made, "its graph was changed, or holds other weights"
    )
    remedy = r"convert the model and trace that, as in trace\(model\.to\(torch\.bfloat16\)\)"
    for convert in (traced.bfloat16, model.bfloat16, lambda: model.to("cpu", BF16)):
        with pytest.raises(TraceError, match=f"{reason}.*{remedy}"):
            convert()
    assert torch.equal(model(X), expected)


def test_a_conversion_to_what_a_model_is_traces_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _, traced, model = own()
    graph_module = traced.graph_module
    monkeypatch.setattr(capture, "capture", lambda _: pytest.fail("it is traced again"))
    assert model.to("cpu").float().to(torch.float32).cpu() is model
    assert traced.to("cpu").float() is traced
    assert traced.graph_module is graph_module


@pytest.mark.usefixtures("own_garbage")
def test_a_trace_keeps_no_tensors_of_its_model_once_it_has_others() -> None:
    source, traced, model = own()
    weight = weakref.ref(source.inner.weight)
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    assert model.traced is not traced
    del source, traced
    gc.collect()
    assert weight() is None
    assert model.bfloat16()(X.to(BF16)).dtype == BF16


@pytest.mark.parametrize("order", ["converted first", "checkpointed first"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_checkpointing_over_a_converted_model_changes_no_bit(name: str, order: str) -> None:
    model = rewrite(fresh_trace(name), CONFIGS["gralora"]).train()
    inputs = model.traced.graph_inputs
    if order == "checkpointed first":
        model.gradient_checkpointing_enable()
    output, gradients = step(model.to(BF16), inputs)
    (model.gradient_checkpointing_disable if order == "checkpointed first" else model.gradient_checkpointing_enable)()
    with torch.autocast("cpu", BF16):
        under, _ = step(model, inputs)
    other, others = step(model, inputs)
    assert torch.equal(other, output)
    assert all(torch.equal(others[key], gradient) for key, gradient in gradients.items())
    assert under.dtype == BF16
    assert list(model.blocks) == list(model.traced.blocks)


def test_a_compiled_model_follows_a_conversion() -> None:
    traced = fresh_trace("llama", num_hidden_layers=1)
    model = rewrite(traced, CONFIGS["gralora"].changed(gralora_dropout=0.0)).train()
    inputs = model.traced.graph_inputs
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    compiled(**inputs)
    compiled.to(BF16)
    expected, actual = step(model, inputs), step(compiled, inputs)
    assert torch.equal(actual[0], expected[0])
    for key, gradient in expected[1].items():  # a compiler adds up those of one input in another order
        assert (actual[1][key] - gradient).abs().max() <= 0.02 * gradient.abs().max(), key

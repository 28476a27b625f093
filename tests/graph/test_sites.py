"""Linear call sites: one for each layer, however often and in whatever way the graph calls it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import TINY, tiny_model
from torch import Tensor, fx, nn
from traces import source, traced
from transformers.pytorch_utils import Conv1D

from gralora_fx import GraloraConfig, LinearSite, TracedModel, merge, rewrite, trace
from gralora_fx.core.graph.linear_calls import match_linear_call
from gralora_fx.core.methods.forms import delta_weight


def by_path(result: TracedModel) -> dict[str, LinearSite]:
    return {site.path: site for site in result.sites}


@pytest.mark.parametrize("name", TINY)
def test_every_linear_layer_is_a_site(name: str) -> None:
    sites = by_path(traced(name))
    layers = {p: m for p, m in source(name).named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    assert sites.keys() >= layers.keys()
    for path, layer in layers.items():
        site = sites[path]
        assert site.weight is layer.weight
        assert site.bias is layer.bias
        shape = tuple(layer.weight.shape)
        is_conv1d = isinstance(layer, Conv1D)
        assert (site.kind == "conv1d") == is_conv1d
        assert (site.in_features, site.out_features) == (shape if is_conv1d else shape[::-1])
        assert site.calls


@pytest.mark.parametrize("name", TINY)
def test_calls_are_nodes_that_use_the_sites_weight(name: str) -> None:
    graph_module = traced(name).graph_module
    nodes = {node.name: node for node in graph_module.graph.nodes}
    parameters = dict(graph_module.named_parameters(remove_duplicate=False))
    seen: list[str] = []
    for site in traced(name).sites:
        for call in site.calls:
            match = match_linear_call(nodes[call])
            assert match is not None
            assert parameters[match.weight.target] is site.weight
            seen.append(call)
    assert len(seen) == len(set(seen))


def test_albert_calls_one_layer_for_each_of_its_two() -> None:
    sites = by_path(traced("albert"))
    shared = [site for path, site in sites.items() if "albert_layers.0" in path]
    assert len(shared) == 6
    assert all(len(site.calls) == 2 for site in shared)
    assert len(sites["classifier"].calls) == 1


def test_gpt2_has_conv1d_sites() -> None:
    site = by_path(traced("gpt2"))["transformer.h.0.attn.c_attn"]
    assert (site.kind, site.in_features, site.out_features) == ("conv1d", 32, 96)
    assert tuple(site.weight.shape) == (32, 96)


def test_falcon_multiplies_by_a_transpose() -> None:
    site = by_path(traced("falcon"))["transformer.h.0.self_attention.query_key_value"]
    assert (site.kind, len(site.calls)) == ("linear", 1)
    nodes = {node.name: node for node in traced("falcon").graph_module.graph.nodes}
    assert "matmul" in str(nodes[site.calls[0]].target)


@pytest.mark.parametrize("name", ["gpt2", "opt", "falcon", "t5"])
def test_a_tied_head_names_the_embedding(name: str) -> None:
    site = by_path(traced(name))["lm_head"]
    assert any("emb" in other or "wte" in other or "shared" in other for other in site.tied_with)
    assert all(not site.tied_with for path, site in by_path(traced(name)).items() if path != "lm_head")


@pytest.mark.parametrize("name", ["llama", "bert", "vit", "mistral"])
def test_untied_models_have_no_ties(name: str) -> None:
    assert not [site.path for site in traced(name).sites if site.tied_with]


# -- odd modules --------------------------------------------------------------------------------------------------


class Uncalled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(4, 6)
        self.unused = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_a_layer_that_the_forward_never_calls_is_a_site_without_calls() -> None:
    model = Uncalled()
    assert trace(model, (torch.ones(2, 4),)).sites[1] == LinearSite(
        "unused", "linear", 6, 8, model.unused.weight, model.unused.bias, calls=()
    )


def test_sites_are_equal_if_their_tensors_are_the_same_objects() -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    first, again, other = (trace(one, (torch.ones(2, 4),)).sites[0] for one in (model, model, copy.deepcopy(model)))
    assert first == again
    assert hash(first) == hash(again)
    assert first != other
    assert {first, again, other} == {first, other}


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.quick
def test_multihead_attention_has_a_packed_and_an_output_site() -> None:
    model = Attention()
    sites = by_path(trace(model, (torch.ones(2, 3, 8),)))
    packed = next(site for site in sites.values() if site.weight is model.attention.in_proj_weight)
    assert (packed.kind, packed.in_features, packed.out_features) == ("functional", 8, 24)
    assert packed.calls
    out = sites["attention.out_proj"]
    assert (out.kind, out.in_features, out.out_features) == ("linear", 8, 8)
    assert out.bias is model.attention.out_proj.bias
    assert out.calls
    assert len(sites) == 2


class Shared(nn.Module):
    """One layer under two names, and one weight under two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.alias = self.first
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.alias(self.first(x)))


def test_a_layer_registered_again_and_a_tied_weight_are_sites_of_their_own() -> None:
    model = Shared()
    traced = trace(model, (torch.ones(2, 4),))
    sites = by_path(traced)
    assert {path: len(site.calls) for path, site in sites.items()} == {"first": 1, "alias": 1, "tied": 1}
    assert "it is first, registered again" in traced.out_of_reach["alias"]  # which PEFT leaves as it is
    assert sites["first"].tied_with == ("tied.weight",)
    assert set(sites["tied"].tied_with) == {"first.weight", "alias.weight"}


class Functional(nn.Module):
    """Calls on its own parameters, without a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stored_in_out = nn.Parameter(torch.randn(4, 6))
        self.stored_out_in = nn.Parameter(torch.randn(8, 6))
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x @ self.stored_in_out, self.stored_out_in, self.bias)


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Functional()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_functional_calls_of_one_module_are_named_by_their_weights() -> None:
    model = Holder()
    sites = by_path(trace(model, (torch.ones(2, 4),)))
    assert sites.keys() == {"inner.stored_in_out", "inner.stored_out_in"}
    first, second = sites["inner.stored_in_out"], sites["inner.stored_out_in"]
    assert (first.in_features, first.out_features, first.bias) == (4, 6, None)
    assert (second.in_features, second.out_features) == (6, 8)
    assert second.bias is model.inner.bias


class NotSites(nn.Module):
    """Products that no weight update belongs to."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(2, 4, 4))
        self.register_buffer("table", torch.randn(4, 4))
        self.embedding = nn.Embedding(10, 4)
        self.conv = nn.Conv1d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = (x @ x.transpose(-1, -2)) @ x
        y = torch.bmm(y, self.experts[: y.shape[0]])
        y = y @ self.table + self.embedding.weight.sum()
        return self.conv(y.transpose(1, 2))


@pytest.mark.quick
def test_what_is_not_a_linear_layer_is_not_a_site() -> None:
    assert trace(NotSites(), (torch.ones(2, 4, 4),)).sites == ()


# -- one node -----------------------------------------------------------------------------------------------------

ATEN = torch.ops.aten
FORMS: dict[str, tuple[Any, bool]] = {
    "linear": (lambda x, w, b: nn.functional.linear(x, w, b), False),
    "linear without bias": (lambda x, w, b: nn.functional.linear(x, w), False),
    "aten linear": (lambda x, w, b: ATEN.linear.default(x, w, b), False),
    "addmm": (lambda x, w, b: ATEN.addmm.default(b, x, w), True),
    "addmm of a transpose": (lambda x, w, b: ATEN.addmm.default(b, x, ATEN.t.default(w)), False),
    "matmul": (lambda x, w, b: x @ w, True),
    "matmul of T": (lambda x, w, b: x @ w.T, False),
    "matmul of t()": (lambda x, w, b: torch.matmul(x, w.t()), False),
    "mm of a transpose": (lambda x, w, b: torch.mm(x, torch.transpose(w, 0, 1)), False),
    "matmul of a permutation": (lambda x, w, b: torch.matmul(x, torch.permute(w, (1, 0))), False),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_a_linear_call(form: str) -> None:
    call, is_stored_transposed = FORMS[form]

    class Form(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 6))
            self.b = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Any:
            return call(x, self.w, self.b)

    graph_module = fx.symbolic_trace(Form())
    matches = [match for node in graph_module.graph.nodes if (match := match_linear_call(node)) is not None]
    assert len(matches) == 1, graph_module.graph
    assert matches[0].stored_transposed is is_stored_transposed
    assert (matches[0].input.target, matches[0].weight.target) == ("x", "w")
    has_bias = "addmm" in form or form in ("linear", "aten linear")
    assert (matches[0].bias is not None) is has_bias


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w: w @ x,
        lambda x, w: x @ (w + 1),
        lambda x, w: x @ w.transpose(0, 0),
        lambda x, w: torch.addmm(w, x, x),
        lambda x, w: nn.functional.linear(w, x),
        lambda x, w: x * w,
    ],
    ids=["weight first", "computed weight", "no swap", "weight as bias", "weight as input", "product"],
)
def test_forms_that_are_no_linear_call(call: Any) -> None:
    class Form(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Any:
            return call(x, self.w)

    assert not [node for node in fx.symbolic_trace(Form()).graph.nodes if match_linear_call(node)]


def test_sites_are_in_the_order_of_the_modules() -> None:
    order = [path for path, _ in tiny_model("llama").named_modules()]
    paths = [site.path for site in traced("llama").sites]
    assert paths == sorted(paths, key=order.index)


# -- parts of a weight --------------------------------------------------------------------------------------------


class Attends(nn.Module):
    """Attention to itself (one product), to another sequence (two), or to one of another width (three weights)."""

    def __init__(self, kdim: int | None = None) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 4, kdim=kdim, vdim=kdim, batch_first=True)

    def forward(self, x: Tensor, memory: Tensor | None = None, values: Tensor | None = None) -> Tensor:
        memory = x if memory is None else memory
        result: Tensor = self.attn(x, memory, memory if values is None else values, need_weights=False)[0]
        return result


DRAWN = torch.Generator().manual_seed(0)  # with some inputs, drawn anew in each run, float32 rounds more than 1e-5
X, MEMORY = torch.randn(2, 3, 16, generator=DRAWN), torch.randn(2, 5, 16, generator=DRAWN)


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        ((X,), [None]),
        ((X, MEMORY), [(0, 16), (16, 48)]),
        ((X, MEMORY, MEMORY * 2), [(0, 16), (16, 32), (32, 48)]),
    ],
    ids=["self", "cross", "three inputs"],
)
@pytest.mark.parametrize("rank", [{"r": 8, "gralora_k": 4}, {"r": 4, "hybrid_r": 3}], ids=str)
def test_attention_multiplies_by_parts_of_one_weight(
    arguments: tuple[Tensor, ...], rows: list[Any], rank: dict[str, int]
) -> None:
    torch.manual_seed(0)
    source = Attends().eval()
    result = trace(source, arguments)
    site = by_path(result)["attn"]
    assert (site.kind, site.in_features, site.out_features) == ("functional", 16, 48)
    assert site.weight is source.attn.in_proj_weight
    assert site.bias is source.attn.in_proj_bias
    nodes = {node.name: node for node in result.graph_module.graph.nodes}
    assert [call.rows for name in site.calls if (call := match_linear_call(nodes[name]))] == rows
    # the adapter is an update of the whole weight, whichever rows a call uses
    model = rewrite(result, GraloraConfig(**rank, target_modules=["in_proj_weight"], init_weights=False))
    expected = copy.deepcopy(source)
    with torch.no_grad():
        expected.attn.in_proj_weight += delta_weight(model.adapter("default").update("attn"))
        assert torch.allclose(model(*arguments), expected(*arguments), atol=1e-5)
        assert not torch.allclose(source(*arguments), expected(*arguments), atol=1e-3)
        assert torch.allclose(merge(model)(*arguments), expected(*arguments), atol=1e-5)
    model(*arguments).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)


def test_attention_of_another_width_has_a_site_for_each_weight() -> None:
    arguments = (X, torch.randn(2, 5, 12))
    source = Attends(kdim=12).eval()
    sites = by_path(trace(source, arguments))
    assert [path for path, site in sites.items() if site.kind == "functional"] == [
        f"attn.{name}_proj_weight" for name in "qkv"
    ]
    assert sites["attn.k_proj_weight"].in_features == 12


class Parts(nn.Module):
    def __init__(self, view: str) -> None:
        super().__init__()
        self.how = view
        self.weight = nn.Parameter(torch.randn(12, 8))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "slice":
            first, second = self.weight[:4], self.weight[4:]
        elif self.how == "narrow":
            first, second = self.weight.narrow(0, 0, 5), self.weight.narrow(0, 5, 7)
        elif self.how == "chunk":
            first, second = self.weight.chunk(2)
        elif self.how == "method":
            return x.matmul(self.weight.t())
        else:
            first, second = self.weight.split(6)
        return torch.cat([nn.functional.linear(x, first), x @ second.T], dim=-1)


@pytest.mark.parametrize("view", ["slice", "narrow", "chunk", "split", "method"])
@pytest.mark.parametrize("symbolic", [False, True])
def test_ways_to_take_rows(view: str, symbolic: bool) -> None:
    torch.manual_seed(0)
    source, x = Parts(view).eval(), torch.randn(3, 8)
    result = trace(fx.symbolic_trace(source) if symbolic else source, (x,))
    (site,) = result.sites
    assert (site.in_features, site.out_features, len(site.calls)) == (8, 12, 1 if view == "method" else 2)
    model = rewrite(result, GraloraConfig(r=4, target_modules=["weight"], init_weights=False))
    with torch.no_grad():
        expected = x @ (source.weight + delta_weight(model.adapter("default").update(site.path))).T
        assert torch.allclose(model(x), expected, atol=1e-5)
        assert torch.allclose(merge(model)(x), expected, atol=1e-5)


def test_rows_that_the_graph_computes_are_no_site() -> None:
    class Gathers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 4))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight[::2]) + nn.functional.linear(x, self.weight[:, [3, 2, 1, 0]][:3])

    assert trace(Gathers(), (torch.randn(2, 4),)).sites == ()

"""The method of `examples/own_method.py`, which knows public names alone, is its dense formula wherever others are."""

from __future__ import annotations

import ast
import copy
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor, nn

from gralora_fx import GraloraModel, LoraConfig, merge, plan, rewrite, trace
from gralora_fx.errors import ExportError, RewriteError, TargetError
from gralora_fx.exporters import export_onnx, fold_onnx, merge_checkpoint
from gralora_fx.methods import METHODS, register
from gralora_fx.serving import load

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_method.py"
OWN = runpy.run_path(str(EXAMPLE))
X = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
TARGETS = ["wide", "narrow", "w", "twice"]


class Network(nn.Module):
    """A residual branch, a parameter of its own, a layer that is called twice, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow, self.twice = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 16, bias=False)
        self.w = nn.Parameter(torch.randn(16, 16) / 4)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = x + self.narrow(self.act(self.wide(x)))
        hidden = nn.functional.linear(hidden, self.w) + self.twice(hidden) * self.twice(x).tanh()
        return hidden, hidden.mean(1)


@pytest.fixture(autouse=True)
def method() -> Iterator[Any]:
    method = register(OWN["Kronecker"]())
    yield method
    METHODS.remove(method)


def config(**fields: Any) -> Any:
    return OWN["KroneckerConfig"](**{"p": 4, "q": 2, "alpha": 2.0, "init_weights": False, **fields})


def adapted() -> tuple[Network, GraloraModel]:
    torch.manual_seed(1)
    network = Network().eval()
    return network, rewrite(trace(network, (X,)), config(target_modules=TARGETS))


def dense(network: Network, model: GraloraModel) -> tuple[Network, list[Tensor]]:
    """Return the network with `W + scale * kron(A, B)` in the place of each weight, and the leaves `A`, `B`."""
    result, leaves = copy.deepcopy(network), []
    for path in TARGETS:
        A, B = (tensor.detach().clone().requires_grad_() for tensor in model.factors(path))
        leaves += [A, B]
        owner, name = (result, "w") if path == "w" else (result.get_submodule(path), "weight")
        weight = getattr(owner, name).detach()
        delattr(owner, name)
        setattr(owner, name, weight + 0.5 * torch.kron(A, B))
    return result, leaves


def test_the_example_imports_public_names_alone() -> None:
    tree = ast.parse(EXAMPLE.read_text(encoding="utf-8"))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    ours = {module for module in modules if module.startswith("gralora_fx")}
    public = {"gralora_fx", *(f"gralora_fx.{name}" for name in ("errors", "exporters", "methods", "serving"))}
    assert ours <= public


def test_evaluation_and_training_are_the_dense_formula() -> None:
    network, model = adapted()
    for mode in (model.eval, model.train):
        mode()
        reference, leaves = dense(network, model)
        x, own = X.clone().requires_grad_(), X.clone().requires_grad_()
        found, expected = model(x), reference(own)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        sum(one.square().mean() for one in found).backward()
        sum(one.square().mean() for one in expected).backward()
        mine = [tensor for path in TARGETS for tensor in model.factors(path)]
        for one, other in zip([x, *mine], [own, *leaves], strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)
            one.grad = None


def test_it_is_merged_unmerged_saved_and_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, model = adapted()
    with torch.no_grad():
        expected, base = model(X)[0], network(X)[0]
        assert not torch.allclose(expected, base, atol=1e-2)
        torch.testing.assert_close(merge(model)(X)[0], expected, rtol=1e-4, atol=1e-5)
        model.merge_adapter()
        torch.testing.assert_close(model(X)[0], expected, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        assert torch.equal(model(X)[0], expected)
        with model.disable_adapter():
            assert torch.equal(model(X)[0], base)
        model.save_pretrained(tmp_path / "adapter")
        loaded = GraloraModel.from_pretrained(model.traced, tmp_path / "adapter")
        assert torch.equal(loaded(X)[0], expected)
    export_onnx(model, tmp_path / "merged")
    export_onnx(model.traced, tmp_path / "base")
    fold_onnx(tmp_path / "base", tmp_path / "adapter", tmp_path / "folded")
    for name in ("merged", "folded"):
        first = torch.as_tensor(next(iter(load(tmp_path / name)(x=X).values())))
        torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-5)
    for title, named in (("Kronecker", "a Kronecker"), ("output scale", "an output scale")):
        monkeypatch.setattr(OWN["KroneckerConfig"], "TITLE", title)
        with pytest.raises(ExportError, match=f"is {named} adapter: its update is not of low rank"):
            export_onnx(model, tmp_path / "data", adapters="data")


def test_it_acts_beside_others_and_row_by_row() -> None:
    _, model = adapted()
    model.add_adapter("lora", LoraConfig(r=2, target_modules=["wide"], init_lora_weights=False))
    model.set_adapter(["default", "lora"])
    with torch.no_grad():
        torch.testing.assert_close(merge(model)(X)[0], model(X)[0], rtol=1e-4, atol=1e-5)
        rows = model(X, adapter_names=["default", "lora", "__base__"])[0]
        assert torch.equal(model(X, adapter_names=["default", "lora", None])[0], rows)
        for index, name in enumerate(("default", "lora")):
            model.set_adapter(name)
            torch.testing.assert_close(rows[index], model(X)[0][index], rtol=1e-4, atol=1e-5)
    with pytest.raises(RewriteError, match="its update is not of low rank, which a weighted sum needs"):
        model.add_weighted_adapter(["default", "lora"], [1.0, 1.0], "sum")


def test_dropout_acts_in_training_alone_and_misfits_are_refused() -> None:
    traced = trace(Network().eval(), (X,))
    model = rewrite(traced, config(target_modules=["wide"], dropout=0.5)).train()
    assert not torch.equal(model(X)[0], model(X)[0])
    assert torch.equal(model.eval()(X)[0], model(X)[0])
    with pytest.raises(TargetError, match="wide: p=3 has to divide out_features=32, and q=2 in_features=16"):
        plan(traced, config(target_modules=["wide"], p=3))


def test_weights_that_are_stored_transposed_are_folded_into_files(tmp_path: Path) -> None:
    """GPT-2's layers store `[in, out]`."""
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path / "base")
    rewritten = rewrite(trace(model), config(target_modules=["c_attn", "c_fc"]))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = rewritten(input_ids=ids).logits
        rewritten.save_pretrained(tmp_path / "adapter")
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
        merged = type(model).from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    rewritten.train()
    rewritten(input_ids=ids, labels=ids).loss.backward()
    assert all(tensor.grad.any() for tensor in rewritten.factors("transformer.h.0.attn.c_attn"))


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (lambda y: y.reshape(*y.shape), "cannot be iterated"),
        (lambda y: y if y.sum() > 0 else -y, "inputs to control flow"),
        (lambda y: y * len(y), "'len' is not supported"),
    ],
)
def test_a_forward_that_needs_values_or_shapes_of_proxies_is_refused(
    part: Any, reason: str, method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CONTRIBUTING warns of these."""
    own = type(method).forward
    monkeypatch.setattr(type(method), "forward", lambda *args, **options: part(own(*args, **options)))
    with pytest.raises(RewriteError, match=reason):
        rewrite(trace(Network().eval(), (X,)), config(target_modules=["wide"]))

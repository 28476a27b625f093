"""Products with a parameter are sites however they are written, and merged are the model's own with its new weight."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from traces import relative_error

from gralora_fx import GraloraConfig, LoraConfig, merge, plan, rewrite, trace
from gralora_fx.exporters import export_onnx
from gralora_fx.serving import load

IN_OUT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "einsum with an ellipsis": lambda x, w: torch.einsum("...d,de->...e", x, w),
    "einsum": lambda x, w: torch.einsum("bsd,de->bse", x, w),
    "bmm of an expanded matrix": lambda x, w: torch.bmm(x, w.expand(x.shape[0], 8, 4)),
    "bmm of an unsqueezed matrix": lambda x, w: torch.bmm(x, w.unsqueeze(0).expand(x.shape[0], -1, -1)),
    "bmm of a repeated matrix": lambda x, w: torch.bmm(x, w.repeat(x.shape[0], 1, 1)),
    "matmul of a matrix in a batch": lambda x, w: x @ w[None],
    "matmul": torch.matmul,
    "tensordot": lambda x, w: torch.tensordot(x, w, dims=1),
}
OUT_IN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "einsum of the other order": lambda x, w: torch.einsum("ed,bsd->bse", w, x),
    "bmm of a transposed matrix": lambda x, w: torch.bmm(x, w.T.unsqueeze(0).expand(x.shape[0], -1, -1)),
    "bmm of a swapped batch": lambda x, w: torch.bmm(x, w.expand(x.shape[0], 4, 8).transpose(1, 2)),
    "inner": torch.inner,
    "tensordot of the second axis": lambda x, w: torch.tensordot(x, w, dims=([2], [1])),
    "linear": nn.functional.linear,
}
OTHERS: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor], Tensor]]] = {
    "another axis": ((5, 4), lambda x, w: torch.einsum("bsd,se->bed", x, w)),
    "another order of the result": ((8, 4), lambda x, w: torch.einsum("bsd,de->bes", x, w)),
    "three axes": ((8, 2, 2), lambda x, w: torch.einsum("bsd,dhk->bshk", x, w)),
    "from the left": ((4, 5), lambda x, w: w @ x),
    "a sum": ((8, 4), lambda x, w: torch.einsum("bsd,de->be", x, w)),
}


class Multiplies(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.w = nn.Parameter(torch.randn(*shape) / 3)
        self.layer = nn.Linear(8, 8)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(torch.tanh(self.layer(x)), self.w)


@pytest.mark.parametrize("config", [GraloraConfig(r=4, gralora_k=2), LoraConfig(r=4), LoraConfig(r=4, use_dora=True)])
@pytest.mark.parametrize("name", [*IN_OUT, *OUT_IN])
def test_a_product_is_a_site(name: str, config: GraloraConfig | LoraConfig, tmp_path: Path) -> None:
    function, shape = (IN_OUT[name], (8, 4)) if name in IN_OUT else (OUT_IN[name], (4, 8))
    model = Multiplies(function, *shape).eval()
    x = torch.randn(3, 6, 8)
    base = model(x)
    traced = trace(copy.deepcopy(model), (torch.randn(2, 5, 8),))
    assert [(site.in_features, site.out_features) for site in traced.sites if site.path == "w"] == [(8, 4)]
    ours = rewrite(traced, config.changed(target_modules={"w"})).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 5)
    merged = merge(ours)
    model.w.data = dict(merged.graph_module.named_parameters())["w"].data
    expected = model(x)
    assert relative_error(expected, base) > 1e-2
    assert relative_error(ours(x), expected) < 1e-5
    assert relative_error(ours.train()(x), expected) < 1e-5
    ours.eval().merge_adapter()
    ours.unmerge_adapter()
    with ours.disable_adapter():
        assert torch.equal(ours(x), traced(x))
    if name in ("einsum", "bmm of a transposed matrix") and not isinstance(config, LoraConfig):
        export_onnx(ours, tmp_path / "onnx", adapters="data")
        assert relative_error(torch.as_tensor(load(tmp_path / "onnx")(x=x, adapter="default")[0]), expected) < 1e-5


@pytest.mark.parametrize("name", OTHERS)
def test_another_product_stays_as_it_is(name: str) -> None:
    shape, function = OTHERS[name]
    model = Multiplies(function, *shape).eval()
    traced = trace(model, (torch.randn(2, 5, 8),))
    x = torch.randn(3, 5, 8)
    assert [site.path for site in traced.sites] == ["layer"]
    assert torch.equal(traced(x), model(x))


def test_all_linear_leaves_functional_calls_of_either_order_out() -> None:
    for function, shape in ((torch.matmul, (8, 4)), (nn.functional.linear, (4, 8))):
        traced = trace(Multiplies(function, *shape), (torch.randn(2, 5, 8),))
        reasons = {e.site.path: e.reason for e in plan(traced, LoraConfig(target_modules="all-linear")).rejected}
        assert "functional call, which all-linear leaves out" in reasons["w"]

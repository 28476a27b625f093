"""Axes that PyTorch leaves as they are, or that have no values, where ONNX would fail."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from gralora_fx import trace
from gralora_fx.exporters import export_onnx
from gralora_fx.serving import load


class Odd(nn.Module):
    """Squeezes an axis that is larger than one, and gives a piece without values another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        first, rest = self.linear(x).split([4, 0], dim=-1)
        return {"squeezed": first.squeeze(0), "sums": rest.view(x.shape[0], 1, 0).sum(-1)}


def test_they_are_exported_as_pytorch_computes_them(tmp_path: Path) -> None:
    model = Odd().eval()
    x = torch.randn(3, 4)
    export_onnx(trace(model, {"x": x}, dynamic=False), tmp_path / "onnx")
    found, expected = load(tmp_path / "onnx")(x=x), model(x)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)

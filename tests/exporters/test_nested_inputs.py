"""Models whose inputs are lists, tuples, dicts and dataclasses of tensors export, verify and are served by paths."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gralora_fx import GraloraConfig, rewrite, trace
from gralora_fx.base.compat.torch_graphs import tree_leaves
from gralora_fx.errors import ExportError, ServingError, TraceError
from gralora_fx.exporters import export_onnx, verify_onnx
from gralora_fx.serving import load


@dataclasses.dataclass
class Pair:
    left: Tensor
    right: Tensor


@dataclasses.dataclass
class Result:
    total: Tensor
    parts: list[Tensor]


class Fuses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.fc = nn.Linear(8, 8)

    def forward(self, images: Any, extra: Any = None, times: int = 1, scale: Tensor | None = None) -> Result:
        x = sum(self.fc(image) for image in images) * times
        if isinstance(extra, dict):
            x = x + extra["deep"]["er"][0] * extra["deep"]["er"][1]
        elif extra is not None:
            x = x + extra.left * extra.right
        return Result(x if scale is None else x * scale, [2 * x])


def rows(count: int, seed: int) -> Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("inputs", "names"),
    [
        ({"images": [rows(2, 0), rows(2, 1)]}, ["images.0", "images.1"]),
        (
            {"images": (rows(3, 0),), "extra": {"deep": {"er": (rows(3, 1), rows(3, 2))}}, "times": 3},
            ["images.0", "extra.deep.er.0", "extra.deep.er.1"],
        ),
        (
            {"images": [rows(2, 0)] * 2, "extra": Pair(rows(2, 1), rows(2, 2)), "scale": torch.tensor(2.0)},
            ["images.0", "images.1", "extra.left", "extra.right", "scale"],
        ),
    ],
    ids=["list", "nested", "dataclass"],
)
def test_they_export_verify_and_are_served(inputs: dict[str, Any], names: list[str], tmp_path: Path) -> None:
    source = Fuses().eval()
    model = rewrite(
        trace(source, inputs), GraloraConfig(r=2, target_modules={"fc"}, init_weights=False, gralora_k=2)
    ).eval()
    report = export_onnx(model, tmp_path / "onnx")
    assert report.verification is not None
    assert report.verification.passed
    assert verify_onnx(tmp_path / "onnx", model, inputs=inputs).passed
    served = load(tmp_path / "onnx")
    assert list(served.input_names) == names
    expected = model(**inputs).total
    nested = {name: value for name, value in inputs.items() if name != "times"}
    leaves = dict(zip(names, tree_leaves(nested), strict=True))
    for feed in (nested, leaves):
        assert torch.allclose(served(**feed)[served.output_names[0]], expected, atol=1e-4)
    with pytest.raises(ServingError, match=r"unknown input images\.9|unknown input images"):
        served(**{**leaves, "images.9": rows(2, 0)})
    with pytest.raises(ServingError, match=r"input 'images' is a float; give a list, tuple or dict of its parts"):
        served(**{**nested, "images": 2.0})


def test_a_call_has_the_form_of_the_example() -> None:
    result = trace(Fuses().eval(), {"images": [rows(2, 0), rows(2, 1)], "extra": Pair(rows(2, 2), rows(2, 3))})
    images, extra = [rows(3, 0), rows(3, 1)], Pair(rows(3, 2), rows(3, 3))
    assert torch.allclose(result(images, extra).total, Fuses().eval()(images, extra).total, atol=1e-5)
    for wrong, message in (
        ((images * 2, extra), "input 'images' has 4 items, but the trace takes 2"),
        ((rows(2, 0), extra), "input 'images' is a Tensor, but the trace takes a list"),
        (([rows(3, 0), None], extra), r"input 'images\.1' is None, but the trace takes a tensor"),
        ((images, {"left": rows(3, 2)}), "input 'extra' lacks 'right'"),
        ((images, None), "input 'extra' is missing"),
    ):
        with pytest.raises(TraceError, match=message):
            result(*wrong)


def test_batches_that_need_not_agree_have_names_of_their_own(tmp_path: Path) -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, one: Tensor, output: Tensor) -> Tensor:
            return self.fc(one).sum(0) + self.fc(output).sum(0)

    model = trace(Sums().eval(), (rows(4, 0), rows(6, 1)))
    export_onnx(model, tmp_path / "onnx")
    served = load(tmp_path / "onnx")
    assert served.output_names == ("result",)
    expected = model(rows(2, 2), rows(5, 3))
    assert torch.allclose(served(one=rows(2, 2), output=rows(5, 3))["result"], expected, atol=1e-4)


def test_what_cannot_be_verified_is_said_before_anything_is_exported(tmp_path: Path) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x + torch.randn_like(x))

    class Silent(Noisy):
        def forward(self, x: Tensor) -> None:  # type: ignore[override]
            self.fc(x)

    with pytest.warns(UserWarning, match=r"draws random numbers in evaluation too \(.*randn_like.* at test_nested"):
        noisy = trace(Noisy(), (rows(2, 0),))
    with pytest.raises(ExportError, match=r"draws random numbers in evaluation \(.*make the noise an input"):
        export_onnx(noisy, tmp_path / "noisy")
    with pytest.raises(ExportError, match="the model returns no tensor, so there is nothing to export"):
        export_onnx(trace(Silent(), (rows(2, 0),)), tmp_path / "silent")


def test_a_number_beside_tensors_is_said_to_be_left_out(tmp_path: Path) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, y: Tensor) -> dict[str, Any]:
            return {"y": self.fc(y), "largest": y.max().item()}

    model = trace(Counts().eval(), (rows(2, 0),))
    with pytest.warns(UserWarning, match=r"returns numbers beside tensors \(item\), which the export leaves out"):
        export_onnx(model, tmp_path / "onnx")
    assert load(tmp_path / "onnx").input_names == ("y",)


def test_a_trace_for_one_size_is_an_export_for_one_size(tmp_path: Path) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(x)
            return y if x.shape[0] > 2 else 2 * y

    export_onnx(trace(Branches().eval(), (rows(2, 0),), dynamic=False), tmp_path / "onnx")
    with pytest.raises(ServingError, match=r"has shape \[3, 8\], but the model takes \[2, 8\]"):
        load(tmp_path / "onnx")(x=rows(3, 0))

"""The request that the page is filled with: the model of every kind of export takes it as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from served_exports import adapted, chat_tokenizer
from starlette.testclient import TestClient
from tiny_images import IMAGE_MODELS, image_model
from tiny_models import tiny_model
from torch import Tensor, nn

from gralora_fx import TracedModel, trace
from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.exporters import export_onnx
from gralora_fx.service.app import create_app


class Masked(nn.Module):
    """A mean over what a mask shows; of an empty mask it is not a number."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return (x * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)


class Convolution(nn.Module):
    """Images of at least 20 x 20."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 20)

    def forward(self, image: Tensor) -> Tensor:
        return self.convolution(image).mean((2, 3))


class Indices(nn.Module):
    """The only row of a table, and a switch."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 4))

    def forward(self, index: Tensor, is_on: Tensor) -> Tensor:
        return torch.where(is_on.unsqueeze(-1), self.table[index], 0.0)


class Logarithm(nn.Module):
    """Finite below 1 alone."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.log(1 - x)


class Inverse(nn.Module):
    """Finite at 1, and not at 0."""

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return scale / x


class Product(nn.Module):
    """Two inputs that share an axis, each at another place."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x @ y


def texts(name: str, **sizes: Any) -> Callable[[], TracedModel]:
    return lambda: trace(tiny_model(name, **sizes))


def module(model: nn.Module, *inputs: Tensor, **options: Any) -> Callable[[], TracedModel]:
    return lambda: trace(model.eval(), inputs, **options)


CASES: dict[str, Callable[[], TracedModel]] = {
    "linear": module(nn.Linear(4, 2), torch.randn(2, 4)),
    "fixed": module(nn.Linear(4, 2), torch.randn(3, 4), dynamic=False),
    "half": module(nn.Linear(4, 2).half(), torch.randn(2, 4).half()),
    "mask": module(Masked(), torch.randn(2, 5, 4), torch.ones(2, 5)),
    "convolution": module(Convolution(), torch.randn(2, 3, 32, 32)),
    "large and fixed": module(Convolution(), torch.randn(1, 3, 224, 224), dynamic=False),
    "indices": module(Indices(), torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool)),
    "logarithm": module(Logarithm(), torch.rand(2, 4) / 2),
    "inverse": module(Inverse(), torch.rand(2, 4) + 1, torch.tensor(0.5)),
    "product": module(Product(), torch.randn(2, 5, 4), torch.randn(2, 4, 3)),
    "texts": texts("bert", num_labels=3, pad_token_id=0),
    "one type": texts("bert", num_labels=3, type_vocab_size=1),
    "positions": texts("roberta", num_labels=3),
    **{
        name: lambda make=make: trace(image_model(make))
        for name, make in IMAGE_MODELS.items()
        if name in ("vit", "swin")
    },  # type: ignore[misc]
    "speech and texts": texts("whisper"),
}


def check(client: TestClient, name: str) -> dict[str, Any]:
    """POST what the page is filled with, which has every input as the model describes it."""
    described = client.get(f"/v2/models/{name}").raise_for_status().json()
    example = client.get(f"/v2/models/{name}/example").raise_for_status()
    assert client.get(f"/v2/models/{name}/versions/1/example").content == example.content
    body: dict[str, Any] = example.json()
    assert [(given["name"], given["datatype"]) for given in body["inputs"]] == [
        (wanted["name"], wanted["datatype"]) for wanted in described["inputs"]
    ]
    for given, wanted in zip(body["inputs"], described["inputs"], strict=True):
        assert all(size in (-1, actual) for size, actual in zip(wanted["shape"], given["shape"], strict=True))
    content = {"content": example.content, "headers": {"Content-Type": "application/json"}}
    answer = client.post(f"/v2/models/{name}/infer", **content)
    assert answer.status_code == 200, answer.text
    assert [output["name"] for output in answer.json()["outputs"]] == [out["name"] for out in described["outputs"]]
    return body


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_model(tmp_path: Path, case: str) -> None:
    export_onnx(CASES[case](), tmp_path / "net", verify=False)
    with TestClient(create_app(ServiceSettings(tmp_path / "net"))) as client:
        body = check(client, "net")
        masks = [given["data"] for given in body["inputs"] if "mask" in given["name"]]
        assert all(set(data) == {1} for data in masks)
        assert client.get("/v2/models/other/example").status_code == 404


@pytest.mark.parametrize("mode", ["data", "inputs"])
def test_with_adapters_and_texts(tmp_path: Path, mode: str) -> None:
    targets = ["query", "value", "dense"]
    model, _ = adapted("bert", tmp_path, targets=targets, num_labels=3, pad_token_id=0)
    export_onnx(model, tmp_path / "net", adapters=mode, verify=False, tokenizer=chat_tokenizer())  # type: ignore[arg-type]
    with TestClient(create_app(ServiceSettings(tmp_path / "net"))) as client:
        ids = chat_tokenizer()("An example")["input_ids"]
        assert check(client, "net")["inputs"][0]["data"] == ids
        check(client, "wide")


class Never(nn.Module):
    """Never finite."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 0


def test_a_model_that_takes_none(tmp_path: Path) -> None:
    export_onnx(trace(Never(), (torch.randn(2, 4),)), tmp_path / "net", verify=False)
    with TestClient(create_app(ServiceSettings(tmp_path / "net"))) as client:
        answer = client.get("/v2/models/net/example")
        assert (answer.status_code, answer.json()) == (
            400,
            {"error": "no inputs are known that the model could be tried with (no output is finite)"},
        )

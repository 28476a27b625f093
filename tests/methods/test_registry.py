"""Another method is one class in one file, and one line that registers it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from tiny_models import text_batch
from torch import Tensor
from traces import fresh_trace, main_output, relative_error, run

from gralora_fx import GraloraConfig, GraloraModel, merge, rewrite
from gralora_fx.config import AdapterConfig
from gralora_fx.errors import ConfigError
from gralora_fx.exporters import export_onnx
from gralora_fx.methods import METHODS, AdapterDims, AdapterMethod, method_of, read_config, register


@dataclass(frozen=True)
class OuterConfig(AdapterConfig):
    """An update of rank one, `scale * u v^T`."""

    target_modules: set[str] | str | None = None
    scale: float = 1.0
    exclude_modules: set[str] | str | None = None
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    dropout: float = 0.0  # type: ignore[assignment]

    PEFT_TYPE = "OUTER"
    TITLE = "outer-product"
    BIAS_MODES = ("none",)
    ADAPTED_BIASES = ""
    PATTERNS: ClassVar[dict[str, Callable[[str, Any], None]]] = {}
    PATTERN_OF: ClassVar[dict[str, str]] = {}
    SIZE_FIELDS = ("scale",)
    DROPOUT, ALPHA = "dropout", "scale"

    def check_sizes(self) -> None:
        if self.scale <= 0:
            raise ConfigError(f"scale must be positive, but got {self.scale}")


class OuterFactors(NamedTuple):
    u: Tensor
    v: Tensor

    @property
    def dims(self) -> AdapterDims:
        return AdapterDims(1)

    @property
    def features(self) -> tuple[int, int]:
        return self.v.shape[0], self.u.shape[0]

    @property
    def grid(self) -> int:
        return 1

    @property
    def is_zero(self) -> bool:
        return not bool(self.u.any())

    def products(self, rows: slice, columns: slice, shape: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        yield self.u[rows].unsqueeze(1), self.v[columns].unsqueeze(0)

    def lora_form(self) -> tuple[Tensor, Tensor]:
        return self.v.unsqueeze(0), self.u.unsqueeze(1)


class Outer(AdapterMethod):
    config = OuterConfig
    tensors = OuterFactors
    keys = {"u": "outer_u", "v": "outer_v"}  # noqa: RUF012

    def sizes(self, config: OuterConfig, value_of: Callable[[str], Any]) -> tuple[AdapterDims, float]:  # type: ignore[override]
        return AdapterDims(1), config.scale

    def shapes(self, in_features: int, out_features: int, dims: AdapterDims) -> dict[str, tuple[int, ...]]:
        return {"u": (out_features,), "v": (in_features,)}

    def initial(self, in_features: int, out_features: int, dims: AdapterDims, config: AdapterConfig) -> OuterFactors:
        return OuterFactors(torch.zeros(out_features), torch.randn(in_features))

    def forward(self, x: Tensor, y: Tensor, factors: OuterFactors, scale: float, **options: Any) -> Tensor:
        hidden = torch.sum(x * factors.v, -1, keepdim=True)
        return torch.add(y, hidden * factors.u, alpha=scale)

    def add_update(self, weight: Tensor, factors: OuterFactors, scale: float, **_: Any) -> Tensor:
        return torch.add(weight, torch.outer(factors.u, factors.v), alpha=scale)

    def text(self, dims: AdapterDims) -> str:
        return "outer product"


@pytest.fixture
def outer() -> Iterator[AdapterMethod]:
    method = register(Outer())
    yield method
    METHODS.remove(method)


@pytest.mark.usefixtures("outer")
def test_a_registered_method_does_all_that_the_others_do(tmp_path: Path) -> None:
    model = rewrite(fresh_trace("bert"), OuterConfig(target_modules={"query", "value"}, scale=2.0))
    inputs = text_batch()
    assert torch.equal(run(model, inputs), run(model.traced, inputs))
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        main_output(model(**inputs)).square().mean().backward()
        optimizer.step()
    model.eval()
    trained = run(model, inputs)
    assert not torch.equal(trained, run(model.traced, inputs))
    model.save_pretrained(tmp_path / "adapter")
    assert isinstance(read_config(tmp_path / "adapter"), OuterConfig)
    loaded = GraloraModel.from_pretrained(fresh_trace("bert"), tmp_path / "adapter")
    assert torch.equal(run(loaded, inputs), trained)
    assert relative_error(run(merge(loaded), inputs), trained) < 1e-5
    report = export_onnx(loaded, tmp_path / "onnx")
    assert report.verification is not None
    loaded.add_adapter("gralora", GraloraConfig(r=4, target_modules=["query"], init_weights=False))
    loaded.add_weighted_adapter(["default", "gralora"], [1.0, 1.0], "sum")
    loaded.set_adapter(["default", "gralora"])
    both = run(loaded, inputs)
    loaded.set_adapter("sum")
    assert relative_error(run(loaded, inputs), both) < 1e-5


def test_a_method_that_is_not_registered_is_named(tmp_path: Path) -> None:
    config = OuterConfig(target_modules={"query"})
    message = "'OUTER' .peft_type. is not registered; registered are GRALORA, LORA.*gralora_fx.methods.register"
    with pytest.raises(ConfigError, match=f"the OuterConfig: the method {message}"):
        method_of(config)
    with pytest.raises(ConfigError, match=message):
        rewrite(fresh_trace("bert"), config)
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"adapter_config.json: the method {message}"):
        read_config(tmp_path)


@pytest.mark.usefixtures("outer")
def test_a_name_is_registered_once() -> None:
    with pytest.raises(ConfigError, match="a method 'OUTER' is registered already"):
        register(Outer())

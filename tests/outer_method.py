"""A method of adaptation written from nothing, as a user would add it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from gralora_fx.core.config import AdapterConfig
from gralora_fx.core.methods import AdapterMethod, LayerCall
from gralora_fx.errors import ConfigError


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
    DROPOUT = "dropout"

    def check_sizes(self) -> None:
        if self.scale <= 0:
            raise ConfigError(f"scale must be positive, but got {self.scale}")


class OuterFactors(NamedTuple):
    u: Tensor
    v: Tensor

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

    def sizes(self, config: OuterConfig, value_of: Callable[[str], Any]) -> tuple[None, float]:
        return None, config.scale

    def shapes(self, in_features: int, out_features: int, sizes: None) -> dict[str, tuple[int, ...]]:
        return {"u": (out_features,), "v": (in_features,)}

    def initial(self, features: tuple[int, int], sizes: None, config: AdapterConfig, **_: Any) -> OuterFactors:
        return OuterFactors(torch.zeros(features[1]), torch.randn(features[0]))

    def forward(self, call: LayerCall, factors: OuterFactors, scale: float, **options: Any) -> Tensor:
        hidden = torch.sum(call.x * factors.v, -1, keepdim=True)
        return torch.add(call.y, hidden * factors.u, alpha=scale)

    def new_weight(self, weight: Tensor, factors: OuterFactors, scale: float, **_: Any) -> Tensor:
        return torch.add(weight, torch.outer(factors.u, factors.v), alpha=scale)

    def text(self, sizes: None) -> str:
        return "outer product"

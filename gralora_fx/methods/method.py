"""What a method of adaptation is made of: its tensors at a site, and what is done with them.

A method adds an update `scale * dW` to the weight of a linear layer, from a few small tensors that train. It is one
file with three parts: a configuration (`AdapterConfig`), a named tuple of tensors (`AdapterTensors`) and the methods of
`AdapterMethod`; a line in `registry.py` makes it known. Everything else in the package (plans, graph nodes, training,
checkpoints, merging, export) asks these.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from gralora_fx.config import AdapterConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class AdapterDims(NamedTuple):
    """Sizes of one adapter: rank `r`, blocks `k` in each direction, and the rank of a plain LoRA beside it."""

    r: int
    k: int = 1
    hybrid_r: int = 0


class AdapterTensors(Protocol):
    """Tensors of one adapter at one site: a named tuple, of which some fields may be None.

    Attributes:
        dims: The adapter's sizes.
        features: Widths `in` and `out` of the layer.
        grid: Number of blocks in each direction, within each of which `products` takes the same tensors.
        is_zero: Whether the update is zero for sure, as before training.
    """

    @property
    def dims(self) -> AdapterDims: ...  # noqa: D102

    @property
    def features(self) -> tuple[int, int]: ...  # noqa: D102

    @property
    def grid(self) -> int: ...  # noqa: D102

    @property
    def is_zero(self) -> bool: ...  # noqa: D102

    def products(self, rows: slice, columns: slice, shape: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of matrices whose products add up to the unscaled update on a block of the weight.

        Args:
            rows: Output features of the block, within one of the `grid`.
            columns: Input features of the block, within one of the `grid`.
            shape: `[out, in]` of the weight.
        """
        ...

    def lora_form(self) -> tuple[Tensor, Tensor]:
        """The same update as a plain LoRA pair, exactly: `A [R, in]` and `B [out, R]`, with `B @ A` the update."""
        ...

    def _asdict(self) -> dict[str, Tensor | None]: ...

    def __iter__(self) -> Iterator[Tensor | None]: ...  # noqa: D105


def first_tensor(factors: AdapterTensors) -> Tensor:
    """One of an adapter's tensors at a site; all of them have its dtype and device."""
    return next(tensor for tensor in factors if tensor is not None)


@dataclass(frozen=True)
class Update:
    """A weight update: an adapter's tensors and the factor they are scaled by."""

    factors: AdapterTensors
    scale: float

    def __repr__(self) -> str:
        """One line without tensors."""
        in_features, out_features = self.factors.features
        return f"Update({in_features} -> {out_features}, {self.factors.dims}, scale={self.scale:.4g})"


class AdapterMethod(ABC):
    """A method of adaptation.

    Attributes:
        config: Its configuration.
        tensors: The named tuple of its tensors at a site.
        keys: The rest of each tensor's key in a checkpoint, after the path of the site, by field of `tensors`. What
            comes before `.weight` is its name in the graph module.
        RUNS_ON_NUMPY: Whether `products` and `lora_form` of its tensors run on numpy arrays as on torch's tensors (see
            `arrays`), so that saved adapters are folded without torch.
    """

    config: ClassVar[type[AdapterConfig]]
    tensors: ClassVar[Callable[..., AdapterTensors]]
    keys: ClassVar[Mapping[str, str]]
    RUNS_ON_NUMPY: ClassVar[bool] = False

    @abstractmethod
    def sizes(self, config: AdapterConfig, value_of: Callable[[str], Any]) -> tuple[AdapterDims, float]:
        """Sizes and scale of the adapter at a site.

        Args:
            config: The configuration, of this method.
            value_of: The value of a field for the site, what a pattern says of it included: `value_of("r")` looks into
                `rank_pattern` first.
        """

    @abstractmethod
    def shapes(self, in_features: int, out_features: int, dims: AdapterDims) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors at a site, by field of `tensors`."""

    @abstractmethod
    def initial(self, in_features: int, out_features: int, dims: AdapterDims, config: AdapterConfig) -> AdapterTensors:
        """Fresh float32 tensors on the CPU, with an update of zero unless the configuration says otherwise."""

    @abstractmethod
    def forward(self, x: Tensor, y: Tensor, factors: Any, scale: float, **options: Any) -> Tensor:
        """`y + scale * adapter(x)`, of the shape of `y`; it runs on `torch.fx` proxies as on tensors.

        Args:
            x: The layer's input, `[..., in]`.
            y: The layer's output, `[..., out]`, contiguous; it may be overwritten as `low_rank.accumulate` does.
            factors: The adapter's tensors.
            scale: Factor of the adapter's output.
            options: `features` (widths in and out), `dims`, `dropout`, `rows` (the part of the output that `y` is) and
                `in_place` (False: `y` is read by others too).
        """

    @abstractmethod
    def add_update(
        self, weight: Tensor, factors: Any, scale: float, *, features: tuple[int, int], dims: AdapterDims
    ) -> Tensor:
        """`weight + scale * dW` for a weight `[out, in]`, on proxies too; gradients reach the factors."""

    def problems(self, in_features: int, out_features: int, dims: AdapterDims) -> list[str]:
        """Why a layer of these widths cannot have an adapter of these sizes, and what to do."""
        return []

    @abstractmethod
    def text(self, dims: AdapterDims) -> str:
        """Sizes in words, such as `r=32 k=2`."""

    def settings(self, config: Any) -> dict[str, Any]:
        """What a configuration says of its adapter by the names of its fields, for tables: sizes, scale, dropout.

        Patterns that are not used are left out; `scale` is the factor where no pattern says otherwise.
        """
        unused = set(config.PATTERNS) - set(config.used_patterns)
        names = [name for name in config.SIZE_FIELDS if name not in unused]
        _, scale = self.sizes(config, partial(getattr, config))
        return {**{name: getattr(config, name) for name in names}, "scale": scale, config.DROPOUT: config.dropout}

    def parameter_count(self, in_features: int, out_features: int, dims: AdapterDims) -> int:
        """Number of trainable values at a site."""
        return sum(math.prod(shape) for shape in self.shapes(in_features, out_features, dims).values())

    def names(self) -> dict[str, str]:
        """Names of the tensors in a graph module, below the path of the site, by field of `tensors`."""
        return {field: key.removesuffix(".weight") for field, key in self.keys.items()}

    def add_output(
        self,
        x: Tensor,
        y: Tensor,
        factors: Any,
        scale: float,
        *,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> Tensor:
        """`forward`, in the adapter's dtype where that differs from the layer's.

        Args:
            x: The layer's input.
            y: The layer's output.
            factors: The adapter's tensors.
            scale: Factor of the adapter's output.
            dtype: Dtype of the adapter, if it is another one: the input is cast to it, the adapter's output back to
                that of `y`.
            options: As for `forward`.

        Returns:
            `y + scale * adapter(x)`, of the shape and dtype of `y`.
        """
        import torch

        if dtype is None:
            return self.forward(x, y, factors, scale, **options)
        options = {name: value for name, value in options.items() if name != "in_place"}
        output = self.forward(x.to(dtype), torch.zeros_like(y, dtype=dtype), factors, 1.0, **options)
        return torch.add(y, output.type_as(y), alpha=scale)


class SummableMethod(AdapterMethod):
    """A method in which any update of low rank can be written, so that a sum of its adapters is one of them."""

    @abstractmethod
    def from_lora_form(self, A: Tensor, B: Tensor) -> AdapterTensors:
        """The tensors of this method with the update `B @ A`.

        Args:
            A: `[R, in]`.
            B: `[out, R]`.
        """

    @abstractmethod
    def config_of(self, config: Any, dims: AdapterDims) -> AdapterConfig:
        """A configuration of these sizes at every site and scale 1, otherwise as another one of this method."""

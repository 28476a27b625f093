"""The protocol of an adapter method: its tensors at a layer, and the functions over them.

A method changes a linear layer by trainable tensors: it computes the layer's new output from its input, and the layer's
new weight from the old one. It is one file with three parts: a configuration (`AdapterConfig`), a named tuple of
tensors (`AdapterTensors`) and the functions of `AdapterMethod`; a line in `registry.py` registers it. Everything else
in the package (plans, graph nodes, training, checkpoints, merging, export) calls these.

A method whose updates are plain LoRA in another form implements `LowRankTensors`. Its adapters can be data of an
export, be converted to LoRA and be summed; those of other methods are folded into weights.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, TypeGuard

from gralora_fx.base.sources import ACTING
from gralora_fx.core.config import AdapterConfig
from gralora_fx.core.methods.stacked_tensors import StackedTensors
from gralora_fx.errors import ExportError, an, command, option

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from gralora_fx.core.methods.arrays import Array

Sizes = Hashable  # a frozen record of the method's own type, such as `GraloraSizes`; equal sizes give equal shapes


class AdapterTensors(Protocol):
    """Tensors of an adapter at one layer: a named tuple, of which some fields may be None.

    Unless it has a LoRA form (`LowRankTensors`), it has `new_weight` too (`WeightTensors`).

    Attributes:
        features: Widths `in` and `out` of the layer.
        is_zero: Whether they certainly change nothing, as before training.
    """

    @property
    def features(self) -> tuple[int, int]: ...  # noqa: D102

    @property
    def is_zero(self) -> bool: ...  # noqa: D102

    def _asdict(self) -> dict[str, Tensor | None]: ...

    def __iter__(self) -> Iterator[Tensor | None]: ...


class LowRankTensors(AdapterTensors, Protocol):
    """Tensors whose update is added to the weight, and equals that of a plain LoRA.

    Attributes:
        grid: Number of blocks in each direction; within a block `products` uses the same tensors.
    """

    @property
    def grid(self) -> int: ...  # noqa: D102

    def products(self, rows: slice, columns: slice, shape: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield pairs of matrices whose products add up to the unscaled update on a block of the weight.

        Args:
            rows: Output features of the block, within one of the `grid`.
            columns: Input features of the block, within one of the `grid`.
            shape: `[out, in]` of the weight.
        """
        ...

    def lora_form(self) -> tuple[Tensor, Tensor]:
        """Return the same update as a plain LoRA pair, exactly: `A [R, in]`, `B [out, R]`; `B @ A` is the update."""
        ...


class WeightTensors(AdapterTensors, Protocol):
    """Tensors of any other update, which needs the whole weight."""

    def new_weight(self, weight: Array, scale: float) -> Array:
        """Return the layer's weight with the adapter.

        Args:
            weight: `[out, in]`, the layer's own, in float32 or better; read only.
            scale: Factor of the update.
        """
        ...


def is_low_rank(factors: AdapterTensors) -> TypeGuard[LowRankTensors]:
    """Return whether tensors have a LoRA form, by their type."""
    return hasattr(type(factors), "lora_form")


def needs_weight(factors: AdapterTensors) -> TypeGuard[WeightTensors]:
    """Return whether tensors compute the new weight from the whole old one, by their type."""
    return not is_low_rank(factors)


def first_tensor(factors: AdapterTensors) -> Tensor:
    """Return one of an adapter's tensors at a layer; all of them have its dtype and device."""
    return next(tensor for tensor in factors if tensor is not None)


@dataclass(frozen=True)
class Update:
    """An adapter's effect on a weight: its tensors and their scale.

    Attributes:
        factors: The tensors; for stacked matrices, each with an axis of the stack before the others.
        scale: The factor.
        stack: Number of matrices in a weight of 3 dimensions; None for a single one, of 2.
    """

    factors: AdapterTensors
    scale: float
    stack: int | None = None

    @property
    def is_low_rank(self) -> bool:
        """True if it is a plain LoRA in another form; then each part of a weight can be folded by itself."""
        return is_low_rank(self.factors)

    def lora_form(self) -> tuple[Tensor, Tensor]:
        """Return the unscaled update as a plain LoRA pair; call `AdapterMethod.check_lora_form` first."""
        assert is_low_rank(self.factors)
        return self.factors.lora_form()

    def matrix(self, index: int) -> Update:
        """Return the update of one matrix of a stack."""
        factors = {name: None if t is None else t[index] for name, t in self.factors._asdict().items()}
        return Update(type(self.factors)(**factors), self.scale)

    def __repr__(self) -> str:
        """Return a line without tensors."""
        in_features, out_features = self.factors.features
        shapes = " ".join(f"{name}{list(t.shape)}" for name, t in self.factors._asdict().items() if t is not None)
        return f"Update({in_features} -> {out_features}, {shapes}, scale={self.scale:.4g})"


class LayerCall(NamedTuple):
    """A call of a linear layer, as tensors or as the proxies of a graph.

    Attributes:
        x: Its input, `[..., in]`; any number of leading axes, zero rows included.
        y: Its output, `[..., out]`, contiguous, or only the columns `rows` of it.
        features: Widths `in` and `out` of the layer.
        weight: Its weight as it is stored.
        bias: The bias in `y`, `[out]`; None for none.
        is_transposed: Whether the weight is stored `[in, out]`.
        rows: Start and end of the output features in `y`; None for all.
    """

    x: Tensor
    y: Tensor
    features: tuple[int, int]
    weight: Tensor | None = None
    bias: Tensor | None = None
    is_transposed: bool = False
    rows: tuple[int, int] | None = None

    @property
    def matrix(self) -> Tensor:
        """The weight `[out, in]`."""
        assert self.weight is not None
        return self.weight.t() if self.is_transposed else self.weight

    def of_rows(self, tensor: Tensor) -> Tensor:
        """Return the part of a tensor `[out, ...]` that belongs to `y`."""
        return tensor if self.rows is None else tensor[slice(*self.rows)]

    def cast(self, dtype: torch.dtype) -> LayerCall:
        """Return the same call in another dtype."""
        weight, bias = (None if tensor is None else tensor.to(dtype) for tensor in (self.weight, self.bias))
        return self._replace(x=self.x.to(dtype), y=self.y.to(dtype), weight=weight, bias=bias)


class AdapterMethod(StackedTensors):
    """A method of adaptation; `shapes`, `initial` and those of stacks are in `StackedTensors`.

    Attributes:
        config: Its configuration class.
        tensors: The named tuple of its tensors at a layer.
        keys: The end of each tensor's key in a checkpoint, after the path of the layer, by field of `tensors`. The part
            before `.weight` is its name in the graph module.
        IS_ADDITIVE: Whether its addition to a layer's output is independent of the layer's weight and output, so that
            several adapters of a layer act beside each other in any order.
        RUNS_ON_NUMPY: Whether its tensors' own functions run on numpy arrays as on torch's tensors (see `arrays`), so
            that saved adapters are folded without torch.
    """

    config: ClassVar[type[AdapterConfig]]
    tensors: ClassVar[Callable[..., AdapterTensors]]
    keys: ClassVar[Mapping[str, str]]
    IS_ADDITIVE: ClassVar[bool] = True
    RUNS_ON_NUMPY: ClassVar[bool] = False

    @abstractmethod
    def sizes(self, config: Any, value_of: Callable[[str], Any]) -> tuple[Any, float]:
        """Return sizes and scale of the adapter at a layer.

        Args:
            config: The configuration, of this method.
            value_of: Returns a field's value for the layer, overrides by patterns included: `value_of("r")` looks into
                `rank_pattern` first.
        """

    @abstractmethod
    def forward(self, call: LayerCall, factors: Any, scale: float, *, sizes: Any, dropout: float = 0.0) -> Tensor:
        """Return the layer's output with the adapter, in the shape of `call.y`; works on `torch.fx` proxies too.

        Args:
            call: The layer's input and own output; the latter may be overwritten as `low_rank.accumulate` does.
            factors: The adapter's tensors.
            scale: Factor of its update.
            sizes: Its sizes.
            dropout: Probability of zeroing its input values in training.
        """

    @abstractmethod
    def new_weight(
        self,
        weight: Tensor,
        factors: Any,
        scale: float,
        *,
        features: tuple[int, int],
        sizes: Any,
        stack: int | None = None,
    ) -> Tensor:
        """Return the layer's weight `[out, in]` with the adapter; works on proxies, and gradients reach the adapter.

        Args:
            weight: The weight; for a stack, `[stack, out, in]`.
            factors: The adapter's tensors; for a stack, the result of `of_stack`.
            scale: Factor of its update.
            features: Widths `in` and `out`.
            sizes: The adapter's sizes.
            stack: Number of stacked matrices, or None for a single one.
        """

    def problems(self, in_features: int, out_features: int, sizes: Any) -> list[str]:
        """Describe why a layer of these widths cannot have an adapter of these sizes, and what to do."""
        return []

    @abstractmethod
    def text(self, sizes: Any) -> str:
        """Return the sizes in words, such as `r=32 k=2`."""

    def settings(self, config: Any) -> dict[str, Any]:
        """Return a configuration's sizes, scale and dropout by field name, for tables.

        Unused patterns are left out, and so are the start tokens of an adapter that acts on all tokens; `scale` is the
        factor where no pattern overrides it.
        """
        unused = set(config.PATTERNS) - set(config.used_patterns)
        names = [name for name in config.SIZE_FIELDS if name not in unused]
        _, scale = self.sizes(config, partial(getattr, config))
        acting = {ACTING: list(config.acts_from)} if config.acts_from else {}
        sizes = {name: getattr(config, name) for name in names}
        return {**sizes, "scale": scale, config.DROPOUT: config.dropout, **acting}

    def parameter_count(self, in_features: int, out_features: int, sizes: Any) -> int:
        """Return the number of trainable values at a layer."""
        return sum(math.prod(shape) for shape in self.shapes(in_features, out_features, sizes).values())

    def names(self) -> dict[str, str]:
        """Return the names of the tensors in a graph module, below the layer's path, by field of `tensors`."""
        return {field: key.removesuffix(".weight") for field, key in self.keys.items()}

    @property
    def has_lora_form(self) -> bool:
        """True if its updates are plain LoRA in another form."""
        return hasattr(self.tensors, "lora_form")

    @property
    def scales_rows(self) -> bool:
        """True if its updates are plain LoRA beside a factor for each row of the weight."""
        return hasattr(self.tensors, "scaled_form")

    def check_lora_form(self, adapter: object, purpose: str, error: type[Exception]) -> None:
        """Raise the error if updates have no LoRA form, which a purpose, such as "a weighted sum", needs."""
        if not self.has_lora_form:
            raise error(
                f"{adapter} is {an(self.config.TITLE)} adapter: its update is not of low rank, which {purpose} needs; "
                f"export it merged ({option(adapters='merged')}), or fold it into an export ({command('fold_onnx')}) "
                f"or a model's files ({command('merge_checkpoint')})"
            )

    def check_can_be_data(self, adapter: object, purpose: str) -> None:
        """Raise if no export can take updates as tensors; for arguments see `check_lora_form`."""
        if not self.scales_rows:
            self.check_lora_form(adapter, purpose, ExportError)

    def add_output(
        self, call: LayerCall, factors: Any, scale: float, *, dtype: torch.dtype | None = None, **options: Any
    ) -> Tensor:
        """Run `forward`, in the adapter's dtype if that differs from the layer's.

        Args:
            call: The layer's input and output.
            factors: The adapter's tensors.
            scale: Factor of the adapter's update.
            dtype: Dtype of the adapter, if it differs: the adapter's input is cast to it, and its output (or, if that
                depends on the layer, the whole output) is cast back to that of `y`.
            options: As for `forward`.

        Returns:
            The layer's output with the adapter, of the shape and dtype of `y`.
        """
        import torch

        if dtype is None:
            return self.forward(call, factors, scale, **options)
        if not self.IS_ADDITIVE:
            return self.forward(call.cast(dtype), factors, scale, **options).type_as(call.y)
        alone = call._replace(x=call.x.to(dtype), y=torch.zeros_like(call.y, dtype=dtype))
        return torch.add(call.y, self.forward(alone, factors, 1.0, **options).type_as(call.y), alpha=scale)


class SummableMethod(AdapterMethod):
    """A method that can express any update of low rank, so that a sum of its adapters is one of them."""

    @abstractmethod
    def from_lora_form(self, A: Tensor, B: Tensor) -> AdapterTensors:
        """Return tensors of this method with the update `B @ A`, of `A [R, in]` and `B [out, R]`."""

    @abstractmethod
    def config_of(self, config: Any, rank: int) -> AdapterConfig:
        """Return a configuration with this rank at every layer and scale 1, and the other fields of a given one."""

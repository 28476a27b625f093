"""Adapters of stacked matrices: one parameter of 3 dimensions, with an adapter for each of its matrices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor


class StackedTensors(ABC):
    """Tensors of an adapter at a stack of matrices: those of one matrix, with an axis of the stack in front."""

    # whether PEFT has adapters of parameters in this method (`target_parameters`): the keys of several in one module
    # then have their order there instead of their names (see `parameter_keys`)
    NESTS_PARAMETERS: ClassVar[bool] = False
    tensors: ClassVar[Callable[..., Any]]

    @abstractmethod
    def shapes(self, in_features: int, out_features: int, sizes: Any) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors at a layer, by field of `tensors`."""

    @abstractmethod
    def initial(
        self, features: tuple[int, int], sizes: Any, config: Any, *, weight: Callable[[], Tensor], scale: float
    ) -> Any:
        """Return new float32 tensors on the CPU, which change nothing unless the configuration says otherwise.

        Args:
            features: Widths `in` and `out` of the layer.
            sizes: The adapter's sizes.
            config: Its configuration.
            weight: Returns the layer's weight `[out, in]`, for a method that starts from it.
            scale: Factor of its update.
        """

    def stored_shapes(
        self, in_features: int, out_features: int, sizes: Any, stack: int | None
    ) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors as they train and are stored, for a stack or (None) for a single matrix."""
        shapes = self.shapes(in_features, out_features, sizes)
        return shapes if stack is None else {name: (stack, *shape) for name, shape in shapes.items()}

    def of_stack(self, factors: Any, stack: int) -> Any:
        """Return a stack's stored tensors with an axis of the stack before those of a single matrix."""
        return factors

    def initial_of_stack(
        self, features: tuple[int, int], sizes: Any, config: Any, stack: int, /, **options: Any
    ) -> Any:
        """Return new tensors of a stack of matrices, as they are stored; the other arguments are those of `initial`."""
        import torch

        drawn = [self.initial(features, sizes, config, **options) for _ in range(stack)]
        return self.tensors(*(None if t[0] is None else torch.stack(t) for t in zip(*drawn, strict=True)))

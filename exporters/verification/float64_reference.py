"""What float32 itself rounds: a model run once more in float64, where an export differs more than its tolerance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers import Cache

from gralora_fx.compat.operators import TorchDispatchMode, returns_alias
from gralora_fx.compat.pytree import tree_map, tree_map_only
from gralora_fx.errors import first_line
from gralora_fx.exporters.folded_model import base_of
from gralora_fx.exporters.reports import RoundingCheck
from gralora_fx.exporters.verification.tensor_names import last_logits
from gralora_fx.exporters.verification.tolerances import largest_gap, largest_value
from gralora_fx.graph.surgery import copy_graph
from gralora_fx.model.gralora_model import GraloraModel
from gralora_fx.tracing.inputs.decoder_cache import PAST, cache_like, empty_cache, pairs_of, positions
from gralora_fx.tracing.traced_model import TracedModel

_ALLOWED = 4  # times what float32 itself rounds
_DRAWS = 4  # of random rounding
_LARGEST = 0.01  # that rounding may explain: a model that is further off in float32 tells nothing
_BIT = torch.finfo(torch.float32).eps  # a whole one, as the sums within an operator round too, at every term


class Judge:
    """Says whether an export's values are close enough to the model's.

    They are within the tolerance; or, in a model that magnifies the last bits of float32 more than that, at most four
    times as far off as float32 itself: as PyTorch's values in float32, or those of a run in float64 whose weights and
    results are off by up to a bit of float32 each, are from float64's. An export rounds otherwise than its model
    does: a folded weight once more, a fused operator less often. Every use of the second rule is noted.

    Runs with random rounding are Monte Carlo arithmetic (Parker, "Monte Carlo Arithmetic", 1997).
    """

    def __init__(self, model: TracedModel | GraloraModel, tolerance: float, *, exact: bool) -> None:
        """Nothing is run before it is needed.

        Args:
            model: The reference, in evaluation mode and float32.
            tolerance: Largest difference, relative to the largest value or to 1 where that is smaller.
            exact: Whether the second rule holds.
        """
        self.tolerance = tolerance
        self.found: list[RoundingCheck] = []
        self._is_lost = not exact  # after a difference that nothing excuses no other is looked into
        self._models = [InFloat64(model, draw) for draw in range(_DRAWS + 1)]

    def accepts(self, where: str, expected: Tensor, actual: Tensor, exactly: Callable[[InFloat64], Tensor]) -> bool:
        """Judge one tensor.

        Args:
            where: What it is, for the report.
            expected: PyTorch's.
            actual: The export's.
            exactly: Gives the same in float64 by a model to run.
        """
        scale = max(1.0, largest_value(expected))
        difference = largest_gap(expected, actual) / scale
        if difference <= self.tolerance or self._is_lost:
            return difference <= self.tolerance
        why_not, own = "", 0.0
        try:
            exact, *others = (exactly(model).double() for model in self._models)
            own = max(largest_gap(exact, other) for other in (expected.double(), *others)) / scale
        except RuntimeError as error:  # operators without a float64 kernel
            why_not = f"no run in float64 to tell what rounding does: {first_line(error)}"
        self.found.append(RoundingCheck(where, difference, own, why_not))
        self._is_lost = not (difference <= _ALLOWED * own and own <= _LARGEST)
        return not self._is_lost


class InFloat64:
    """A model with every float32 tensor in float64: its weights, its inputs, and what it computes in float32."""

    def __init__(self, model: TracedModel | GraloraModel, draw: int = 0) -> None:
        """Copy nothing yet: the weights are copied for every run, and then given back.

        Args:
            model: The model.
            draw: 0 to round nothing; any other seeds what every weight and result is off, up to a bit of float32.
        """
        self.draw = draw
        self._model = model

    def __call__(self, **inputs: Any) -> Any:
        """What the model returns."""
        round_off = _RoundOff(self.draw)
        graph_module = _widened(self._model.graph_module, round_off)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            with torch.no_grad(), _Float64(round_off):
                return graph_module(
                    **base_of(self._model).bind((), {name: _wide(value) for name, value in inputs.items()})
                )
        finally:
            torch.set_default_dtype(before)

    def after(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits `[batch, vocabulary]` after a text that is read at once, with an empty cache.

        Args:
            ids: `[batch, length]`.
            mask: As `ids`, 0 where a position is padding.
        """
        traced = base_of(self._model)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)}
        taken = {name: value for name, value in inputs.items() if name in traced.input_names}
        cache = empty_cache(traced.example_inputs[PAST], ids.shape[0])
        return last_logits(self(**taken, past_key_values=cache)["logits"], mask)[:, -1]


class _RoundOff:
    """Puts values off by up to a bit of float32; draw 0 by nothing."""

    def __init__(self, draw: int) -> None:
        self._generator = torch.Generator().manual_seed(draw) if draw else None

    def __call__(self, values: Tensor) -> Tensor:
        if self._generator is None:
            return values
        noise = torch.rand(values.shape, generator=self._generator, dtype=torch.float32)
        return values * noise.sub_(0.5).mul_(2 * _BIT).double().add_(1.0)


class _Float64(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Makes float64 of every dtype of float32 that an operator is given, and rounds what it computes."""

    def __init__(self, round_off: _RoundOff) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._round_off = round_off

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        args, kwargs = tree_map(lambda v: torch.float64 if v is torch.float32 else v, (args, dict(kwargs or {})))
        result = func(*args, **kwargs)
        shares = returns_alias(func)
        is_computed = isinstance(result, Tensor) and result.dtype == torch.float64 and not shares
        return self._round_off(result) if is_computed else result


def _widened(graph_module: fx.GraphModule, round_off: _RoundOff) -> fx.GraphModule:
    twin = fx.GraphModule(graph_module, copy_graph(graph_module), "Float64Graph")
    made: dict[int, nn.Parameter] = {}

    def wide(parameter: nn.Parameter) -> nn.Parameter:
        if id(parameter) not in made:
            made[id(parameter)] = nn.Parameter(round_off(parameter.detach().double()), requires_grad=False)
        return made[id(parameter)]

    for module in twin.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.dtype == torch.float32:
                module._parameters[name] = wide(parameter)
        for tensors in (module._buffers, vars(module)):
            tensors |= {name: _wide(value) for name, value in tensors.items() if isinstance(value, Tensor)}
    return twin


def _wide(value: Any) -> Any:
    if isinstance(value, Cache):
        return cache_like(value, [[tensor.double() for tensor in pair] for pair in pairs_of(value)])
    return tree_map_only(Tensor, lambda tensor: tensor.double() if tensor.dtype == torch.float32 else tensor, value)

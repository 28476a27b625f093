"""Lazy parameters: on the meta device, with a source that computes their values when they are read.

A weight that is folded, cast, or read from a file only while it is written takes no memory before or after.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gralora_fx.base.compat.torch_graphs import tree_map
from gralora_fx.errors import ExportError

if TYPE_CHECKING:
    from gralora_fx.base.sources.packed_tensors import PackedTensor

_SOURCE, _STORED = "_gralora_source", "_gralora_stored"  # attributes of a parameter


def lazy_parameter(source: Callable[[], Tensor], shape: Sequence[int], dtype: torch.dtype) -> nn.Parameter:
    """Return a parameter on the meta device whose values `source` computes at every read."""
    return with_source(nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False), source)


def with_source(parameter: nn.Parameter, source: Callable[[], Tensor]) -> nn.Parameter:
    """Make an existing parameter on the meta device lazy."""
    setattr(parameter, _SOURCE, source)
    return parameter


def computed_like(parameter: Tensor, values: Callable[[], Tensor]) -> nn.Parameter:
    """Return a parameter of a float32 parameter's shape with other values, computed when it is read if that one is."""
    if is_lazy(parameter):
        return lazy_parameter(values, parameter.shape, parameter.dtype)
    return nn.Parameter(values(), requires_grad=False)


def is_lazy(tensor: Tensor) -> bool:
    """Return whether a tensor's values are computed when they are read."""
    return hasattr(tensor, _SOURCE)


def source_of(tensor: object) -> Callable[[], Tensor] | None:
    """Return the function that computes a lazy tensor's values; None for other tensors."""
    source: Callable[[], Tensor] | None = getattr(tensor, _SOURCE, None)
    return source


def copy_lazy(parameter: nn.Parameter) -> nn.Parameter:
    """Copy a lazy parameter, keeping its source."""
    return lazy_parameter(getattr(parameter, _SOURCE), parameter.shape, parameter.dtype)


def note_stored(parameter: nn.Parameter, stored: PackedTensor) -> None:
    """Note the quantized tensor that a parameter's values are read from."""
    setattr(parameter, _STORED, stored)


def stored_form_of(parameter: object) -> PackedTensor | None:
    """Return the quantized tensor that a parameter's values were read from; None for a float one."""
    stored: PackedTensor | None = getattr(parameter, _STORED, None)
    return stored


@dataclass(frozen=True)
class EntrySource:
    """A source of values along the first axis, such as stacked matrices, readable one at a time."""

    entries: Callable[[], Iterable[Tensor]]  # computes them, in order

    def __call__(self) -> Tensor:
        """Return all entries, stacked."""
        return torch.stack([entry.detach() for entry in self.entries()])


def raw_entries(tensor: Tensor, name: str) -> Iterator[Tensor]:
    """Return the entries of a tensor along its first axis in the source's dtype, one at a time if the source can."""
    source = getattr(tensor, _SOURCE, None)
    entries = source.entries() if isinstance(source, EntrySource) else raw_values_of(tensor, name)
    return map(Tensor.detach, entries)  # unlike a generator, map keeps no entry while it reads the next


def reading(module: nn.Module) -> AbstractContextManager[Any]:
    """Return a block within which PyTorch's functions get the values of lazy parameters, so that the module runs.

    Each is read for a function's call and freed after it. What asks for a dtype or a shape reads nothing.
    """
    return _Reading() if any(map(is_lazy, module.parameters())) else nullcontext()


_FACTS = frozenset(getattr(Tensor, name).__get__ for name in ("dtype", "shape", "ndim"))


class _Reading(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a function with values."""
        if func is Tensor.device.__get__ and is_lazy(args[0]):
            return torch.device("cpu")
        if func is nn.functional.embedding and (table := source_of(args[1])) is not None:
            from gralora_fx.base.sources.table_rows import looked_up

            args = args[0], looked_up(table(), args[0], args[1].dtype), *args[2:]
        if func not in _FACTS:
            args, kwargs = tree_map(_read, (tuple(args), dict(kwargs or {})))
        return func(*args, **(kwargs or {}))


def _read(value: Any) -> Any:
    source = source_of(value) if isinstance(value, nn.Parameter) else None
    if source is None:
        return value
    from gralora_fx.base.sources.reused_memory import READ

    return READ.cast(source().detach(), value.dtype)


def value_entries(tensor: Tensor, name: str) -> Iterator[Tensor]:
    """Return the same entries in the tensor's dtype."""
    return map(operator.methodcaller("to", tensor.dtype), raw_entries(tensor, name))


def sampled_values(tensor: Tensor, name: str, count: int) -> Tensor:
    """Return up to `count` evenly spread values of a tensor, in the source's dtype."""
    step = max(1, tensor.numel() // count)
    if not isinstance(getattr(tensor, _SOURCE, None), EntrySource):
        return raw_values_of(tensor, name).reshape(-1)[::step][:count]
    size = tensor[0].numel()
    parts = [  # copies: a view would keep its entry
        entry.reshape(-1)[-index * size % step :: step].clone() for index, entry in enumerate(raw_entries(tensor, name))
    ]
    return torch.cat(parts)[:count]


def values_of(tensor: Tensor, name: str) -> Tensor:
    """Return a tensor's values, or its source's cast to its dtype; they are not cached."""
    return raw_values_of(tensor, name).to(tensor.dtype)


def raw_values_of(tensor: Tensor, name: str) -> Tensor:
    """Return the values in the source's dtype; those of a file are memory-mapped."""
    if not tensor.is_meta:
        return tensor.detach()
    source: Callable[[], Tensor] | None = getattr(tensor, _SOURCE, None)
    if source is None:
        raise without_values(name)
    return source().detach()


def without_values(name: str) -> ExportError:
    """Return the error for a parameter on the meta device whose values cannot be read."""
    return ExportError(
        f"{name} is on the meta device and has no source of values; load the model with its "
        "weights, or with gralora_fx.loading.load_streamed"
    )

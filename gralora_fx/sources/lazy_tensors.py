"""Parameters whose values are made when they are read: they stand on the meta device and know their source.

A weight that is folded, cast, or read from a file only while it is written takes no memory until then, and none after.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from gralora_fx.errors import ExportError

_SOURCE = "_gralora_source"


def defer(source: Callable[[], Tensor], shape: Sequence[int], dtype: torch.dtype) -> nn.Parameter:
    """A parameter on the meta device whose values a function makes whenever they are read.

    Args:
        source: Makes the values; of any float dtype, they are cast where they are read.
        shape: Shape of the values.
        dtype: Dtype of the parameter.
    """
    return with_source(nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False), source)


def with_source(parameter: nn.Parameter, source: Callable[[], Tensor]) -> nn.Parameter:
    """Give a parameter on the meta device a source of its values, as `defer` does."""
    setattr(parameter, _SOURCE, source)
    return parameter


def is_deferred(tensor: Tensor) -> bool:
    """Whether a tensor's values are made when they are read."""
    return hasattr(tensor, _SOURCE)


def like_deferred(parameter: nn.Parameter) -> nn.Parameter:
    """Another parameter of the same source."""
    return defer(getattr(parameter, _SOURCE), parameter.shape, parameter.dtype)


def values_of(tensor: Tensor, name: str) -> Tensor:
    """The values of a tensor: its own, or its source's in its own dtype, which nothing keeps.

    Args:
        tensor: Any tensor.
        name: What it is called in an error.

    Raises:
        ExportError: It stands on the meta device and has no source.
    """
    return raw_values_of(tensor, name).to(tensor.dtype)


def raw_values_of(tensor: Tensor, name: str) -> Tensor:
    """The values in the dtype that their source has them in; a file's are mapped, and read where they are used.

    Raises:
        ExportError: The tensor stands on the meta device and has no source.
    """
    if not tensor.is_meta:
        return tensor.detach()
    source: Callable[[], Tensor] | None = getattr(tensor, _SOURCE, None)
    if source is None:
        raise ExportError(
            f"{name} stands on the meta device and nothing says where its values are; load the model with its "
            "weights, or with gralora_fx.loading.models.load_streamed"
        )
    return source().detach()

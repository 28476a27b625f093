"""Layers of a vision tower in a form that a trace records for images of any size, and ONNX Runtime computes fast.

Attention within segments of one sequence, such as windows of an image, is one product a layer. A convolution over whole
patches is a matrix product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "flash_segments"  # code of transformers passes segments to what has flash in its name


@contextmanager
def traceable_layers(model: nn.Module) -> Iterator[None]:
    """Let the layers of a model's towers compute in such a form, within the block."""
    with _attention_in_segments(model), _patches_as_rows(model):
        yield


@contextmanager
def _patches_as_rows(model: nn.Module) -> Iterator[None]:
    """Let convolutions over patches that are no larger than their kernels be matrix products, within the block."""
    with ExitStack() as changed:
        for part in model.modules():
            if isinstance(part, nn.Conv3d) and part.kernel_size == part.stride and part.groups == 1:
                changed.enter_context(patch.object(part, "forward", functools.partial(_convolve, part, part.forward)))
        yield


def _convolve(layer: nn.Conv3d, convolve: Callable[[Tensor], Tensor], patches: Tensor) -> Tensor:
    """Convolve `[patches, channels, frames, height, width]`."""
    if patches.shape[2:] != layer.kernel_size:
        return convolve(patches)
    product = linear(patches.flatten(1), layer.weight.flatten(1), layer.bias)
    return product[..., None, None, None]


@contextmanager
def _attention_in_segments(model: nn.Module) -> Iterator[None]:
    """Let the layers of a model whose attention takes `cu_seqlens` call one attention each, within the block."""
    AttentionInterface.register(NAME, _attend)  # which no model asks for but those within the block
    layers: list[Any] = [part for part in model.modules() if _takes_segments(part)]
    before = [(layer.config, layer.config._attn_implementation) for layer in layers]
    with ExitStack() as changed:
        for layer in layers:  # as it is: transformers' exporter replaces the methods of classes
            changed.enter_context(patch.object(layer, "forward", functools.partial(type(layer).forward, layer)))
            layer.config._attn_implementation = NAME
        try:
            yield
        finally:
            for config, own in reversed(before):
                config._attn_implementation = own


def _takes_segments(part: nn.Module) -> bool:
    """Return whether a module is a layer of attention that is told where segments begin."""
    code = getattr(type(part).forward, "__code__", None)
    return code is not None and {"cu_seqlens", "attention_interface"} <= {*code.co_varnames, *code.co_cellvars}


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attend within segments; `cu_seq_lens_q [segments + 1]` says where each begins."""
    ends, most = options["cu_seq_lens_q"], options["max_length_q"]

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=options.get("dropout") or 0.0,
            scale=options["scaling"],
            enable_gqa=query.shape[1] != key.shape[1],
        ).transpose(1, 2)

    if isinstance(ends.shape[0], int) and ends.shape[0] == 2:
        return attend(query, key, value, attention_mask), None
    index = ends[:-1, None] + torch.arange(most, device=ends.device)
    is_in = index < ends[1:, None]
    index = torch.where(is_in, index, 0)
    windows = [each.squeeze(0)[:, index].transpose(0, 1) for each in (query, key, value)]
    padded = attend(windows[0], windows[1], windows[2], is_in[:, None, None])
    own = torch.arange(query.shape[2], device=ends.device)
    segment = (own[:, None] >= ends[None, 1:]).sum(1)
    return padded.flatten(0, 1)[segment * most + own - ends[segment]][None], None

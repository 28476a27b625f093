"""Patches for tracing a decoder with a cache: its attention and layers become one operator each.

A model that calls its attention through transformers' interface needs nothing here. One that computes it itself has a
row in `ATTENTIONS`: the code that is recognised, and its replacement.

To infer a linear layer's shape, PyTorch runs the four operators of its decomposition on fake tensors; for a
concatenation it compares all symbolic sizes. Together that takes a third of a decoder's trace, so both are operators
here too, which only compute their shape.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel

from gralora_fx.base.compat.transformers_models import (
    AttentionMaskInterface,
    blockwise_overlay,
    causal_mask_function,
    eager_mask,
    or_masks,
    sliding_window_causal_mask_function,
)
from gralora_fx.base.features import parts
from gralora_fx.base.patches import patched_here
from gralora_fx.core.operators import NAMESPACE
from gralora_fx.core.operators.attention import Attention, Mask, MaskOfBlocks
from gralora_fx.core.operators.call import define_shape_only, is_shape_only
from gralora_fx.core.operators.layers import RmsNorm, Rotate
from gralora_fx.core.tracing.inputs.cache import tensors_of
from gralora_fx.core.tracing.inputs.input_trees import by_own_names
from gralora_fx.core.tracing.known_code import ATTENTIONS, IN_DECODERS, INDEXER, Recognised, replaced
from gralora_fx.format.cache_slots import StateKind

_Axis = tuple[int, int]  # index of a step's tensor, and one of its axes
_linear, _cat = nn.functional.linear, torch.cat


@contextmanager
def decoder_operators(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Iterator[None]:
    """Let a decoder call single operators for attention, recognised functions and products, within the block.

    Nodes get no stack traces, which take a tenth of the time; torch 2.11 has no such switch.
    """
    noted = patch.object(model, "forward", _with_noted_sizes(model.forward, _equal_sizes(inputs)))
    without_stacks = patch.object(fx.config, "do_not_emit_stack_traces", True, create=True)
    with (
        noted,
        without_stacks,
        shape_only_ops(),
        _attention_as_operators(model),
        replaced(model, (*IN_DECODERS, *_code_of_rotary_kinds(model))),
        _chosen_keys(model),
    ):
        yield


def _code_of_rotary_kinds(model: nn.Module) -> list[Recognised]:
    """Return the known code for the kinds of rotary embedding that a model has, such as `"longrope"`."""
    kinds = {kind for part in model.modules() if isinstance(kind := getattr(part, "rope_type", None), str)}
    return [code for table in parts("step code", kinds) for code in table]


def _chosen_keys(model: nn.Module) -> AbstractContextManager[None]:
    """Make the number of keys that a model's indexers choose independent of the traced sizes, within the block."""
    if not any(type(part).__name__.endswith(INDEXER) for part in model.modules()):
        return nullcontext()
    from gralora_fx.core.tracing.sparse_attention import symbolic_counts

    return symbolic_counts(model)


def _with_noted_sizes(forward: Callable[..., Any], equal: Sequence[tuple[_Axis, _Axis]]) -> Callable[..., Any]:
    """Return a step's forward that first tells the tracer which sizes are equal, so that layers need no guards."""

    @functools.wraps(forward)
    def noted(*args: Any, **inputs: Any) -> Any:
        tensors = [tensor for *_, tensor in _tensors_of(inputs)]
        for (first, first_axis), (second, second_axis) in equal:
            torch._check(tensors[first].shape[first_axis] == tensors[second].shape[second_axis])  # type: ignore[no-untyped-call]
        return forward(*args, **by_own_names(forward, inputs))

    return noted


def _equal_sizes(inputs: Mapping[str, Any]) -> list[tuple[_Axis, _Axis]]:
    """Return the pairs of a step's input axes that have one size: batch, new tokens, each layer's cached positions."""
    tensors = _tensors_of(inputs)
    cached = [(index, kind) for index, (_, kind, _) in enumerate(tensors) if kind is not None]
    new = [index for index, (name, *_) in enumerate(tensors) if name in ("input_ids", "inputs_embeds", "position_ids")]
    growing = [(index, kind.grows) for index, kind in cached if kind.grows is not None]
    axes = [((cached[0][0], 0), (index, 0)) for index, _ in cached[1:]]
    axes += [(growing[0], axis) for axis in growing[1:]]
    axes += [((new[0], 1), (index, 1)) for index in new[1:]]
    axes += [((cached[0][0], 0), (index, 0)) for index in new if cached]
    return [
        pair for pair in axes if tensors[pair[0][0]][2].shape[pair[0][1]] == tensors[pair[1][0]][2].shape[pair[1][1]]
    ]


def _tensors_of(inputs: Mapping[str, Any]) -> list[tuple[str, StateKind | None, Tensor]]:
    """Return each tensor of a step's inputs, with the input's name and, for a cache's tensor, the kind of its slot."""
    tensors: list[tuple[str, StateKind | None, Tensor]] = []
    for name, value in inputs.items():
        if isinstance(value, DynamicCache):
            tensors += [(name, slot.kind, tensor) for slot, tensor in tensors_of(value).items()]
        elif isinstance(value, Tensor):
            tensors.append((name, None, value))
    return tensors


@contextmanager
def _attention_as_operators(model: PreTrainedModel) -> Iterator[None]:
    """Let a model call `gralora::attention`, shape-only while traced, and `gralora::mask` within the block."""
    AttentionInterface.register(NAMESPACE, _attend)  # only models within the block select it
    AttentionMaskInterface.register(NAMESPACE, make_mask)
    parts = {id(part.config): part.config for part in model.modules() if _has_operator(part)}
    before = {key: config._attn_implementation for key, config in parts.items()}
    try:
        for config in parts.values():
            config._attn_implementation = NAMESPACE
        with replaced(model, ATTENTIONS):
            yield
    finally:
        for key, config in parts.items():
            config._attn_implementation = before[key]


def _has_operator(part: nn.Module) -> bool:
    """Return whether a model calls its attention through transformers' interface, or is one of `ATTENTIONS`."""
    if not isinstance(part, PreTrainedModel):
        return False
    is_own = any(code.replaces_in(module) for module in part.modules() for code in ATTENTIONS)
    return is_own or bool(part._can_set_attn_implementation())


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Compute attention for transformers' attention interface with the project's operator."""
    if options.get("sinks") is not None:  # one for each query, as Inkling 2's; the operator has one for each head
        own: tuple[Tensor, None] = sys.modules[type(module).__module__].eager_attention_forward(
            module, query, key, value, attention_mask, **options
        )
        return own
    scale, chosen = options.get("scaling"), options.get("indices")
    if attention_mask is None and getattr(module, "is_causal", True) is False:  # every query sees every key
        attention_mask = query.new_zeros(query.shape[0], 1, query.shape[2], key.shape[2])
    if chosen is not None and attention_mask is not None:
        from gralora_fx.core.tracing.sparse_attention import only_chosen

        attention_mask = only_chosen(attention_mask, chosen)
    if (bias := options.get("position_bias")) is not None:  # for each head, as Inkling's
        attention_mask = bias if attention_mask is None else attention_mask + bias
    result = Attention.compute(
        query=query,
        key=key,
        value=value,
        mask=attention_mask,
        sinks=options.get("s_aux"),
        scale=float(query.shape[-1] ** -0.5 if scale is None else scale),
        window=int(options.get("sliding_window") or 0),
        softcap=float(options.get("softcap") or 0.0),
        dropout=float(options.get("dropout") or 0.0),
    )
    return result, None


def make_mask(
    *,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    q_length: int,
    kv_length: int,
    local_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Tensor | None:
    """Compute a mask for transformers' mask interface: one operator if it is causal with at most a window."""
    window = local_size or 0
    plain = sliding_window_causal_mask_function(window) if window else causal_mask_function
    if attention_mask is not None and _is_same(mask_function, plain):
        torch._check(attention_mask.shape[1] == kv_length)  # type: ignore[no-untyped-call]
        return Mask.compute(padding=attention_mask, length=q_length, window=window, dtype=dtype)
    whole: Tensor | None = eager_mask(
        q_length=q_length,
        kv_length=kv_length,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        dtype=dtype,
        **options,
    )
    blocks = _blocks_beside(mask_function, plain)
    if attention_mask is None or blocks is None:
        return whole
    without = Mask.compute(padding=attention_mask, length=q_length, window=window, dtype=dtype)
    return MaskOfBlocks.compute(blocks=blocks, plain=without, whole=whole)


def _blocks_beside(mask_function: Any, plain: Callable[..., Any]) -> Tensor | None:
    """Return the blocks of a mask that is a plain one or'ed with attention within blocks; None for any other."""
    blocks: list[Any] = []
    for part in _closure_values(mask_function)[0] if _closure_values(mask_function) else ():
        blocks += [value for value in _closure_values(part) if isinstance(value, Tensor)]
    is_one = len(blocks) == 1 and _is_same(mask_function, or_masks(plain, blockwise_overlay(blocks[0])))
    return blocks[0] if is_one else None


def _closure_values(function: Any) -> tuple[Any, ...]:
    """Return the values in a function's closure."""
    return tuple(cell.cell_contents for cell in getattr(function, "__closure__", None) or ())


def _is_same(one: Any, other: Any) -> bool:
    """Return whether two functions have the same code and closure values, compared recursively."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_is_same, one, other))
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return one is other
    if not (inspect.isfunction(one) and inspect.isfunction(other)):
        return type(one) is type(other) and bool(one == other)
    return one.__code__ is other.__code__ and _is_same(_closure_values(one), _closure_values(other))


def norm(module: Any, hidden_states: Tensor) -> Tensor:
    """Normalize by the root mean square, in float32."""
    return RmsNorm.compute(x=hidden_states, weight=module.weight, eps=module.variance_epsilon)


def rotate_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their positions."""
    query, key = (Rotate.compute(x=x, cos=cos, sin=sin, axis=unsqueeze_dim) for x in (q, k))
    return query, key


def angles_of_grids(module: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and sines for positions in time, height and width, which are equal for text."""
    if position_ids.stride(0):  # positions of their own
        result: tuple[Tensor, Tensor] = type(module).forward(module, x, position_ids)
        return result
    angles = position_ids[0].unsqueeze(-1).float() * module.inv_freq.float()
    angles = torch.cat([angles, angles], dim=-1)
    cos, sin = (part * module.attention_scaling for part in (angles.cos(), angles.sin()))
    return cos.to(x.dtype), sin.to(x.dtype)


def falcon(
    module: Any,
    hidden_states: Tensor,
    alibi: None,
    attention_mask: Tensor | None,
    layer_past: Any = None,
    position_embeddings: Any = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute Falcon's attention with rotary embeddings; it has no dropout."""
    parts = module._split_heads(module.query_key_value(hidden_states))
    query, key, value = (part.transpose(1, 2) for part in parts)
    query, key = rotate_both(query, key, *position_embeddings)
    if layer_past is not None:
        key, value = layer_past.update(key, value, module.layer_idx)
    attended, _none = _attend(module, query, key, value, attention_mask)
    return module.dense(attended.flatten(2)), None


def _linear_shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return an empty tensor of the shape of `x @ weight.T + bias`."""
    return x.new_empty([*x.shape[:-1], weight.shape[0]])


def _cat_shape(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """Return an empty tensor of a concatenation's shape; tell the tracer that the other sizes are equal."""
    first, *others = tensors
    sizes = list(first.shape)
    for other in others:
        for axis, size in enumerate(other.shape):
            if axis == dim:
                sizes[axis] = sizes[axis] + size
            elif sizes[axis] is not size:
                torch._check(sizes[axis] == size)  # type: ignore[no-untyped-call]
    return first.new_empty(sizes)


_LINEAR = define_shape_only(
    "linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor", _linear_shape, torch.ops.aten.linear.default
)
_CAT = define_shape_only("cat(Tensor[] tensors, int dim) -> Tensor", _cat_shape, torch.ops.aten.cat.default)


def _traced_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not is_shape_only(input) or weight.ndim != 2:
        return _linear(input, weight, bias)
    result: Tensor = _LINEAR(input, weight, bias)
    return result


def _traced_cat(tensors: Sequence[Tensor], dim: int = 0, **options: Any) -> Tensor:
    parts = list(tensors)
    plain = not options and all(map(is_shape_only, parts))
    if not plain or len({(part.ndim, part.dtype) for part in parts}) != 1 or parts[0].ndim < 2:
        return _cat(parts, dim, **options)
    result: Tensor = _CAT(parts, dim % parts[0].ndim)
    return result


@contextmanager
def shape_only_ops() -> Iterator[None]:
    """Let traced code call the shape-only operators within the block; real tensors are computed as usual."""
    with patched_here(nn.functional, "linear", _traced_linear), patched_here(torch, "cat", _traced_cat):
        yield

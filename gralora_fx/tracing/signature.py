"""How a traced graph is called: inputs by name or position, with the defaults that the model itself has."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from transformers import DynamicCache

from gralora_fx.errors import TraceError
from gralora_fx.tracing.cached import PAST, positions

_OUTPUT_FLAGS = ("return_dict", "output_attentions", "output_hidden_states", "use_cache")


def bind(
    names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any], *, optional: Collection[str] = ()
) -> dict[str, Any]:
    """The inputs of one call by name, in the trace's order.

    A mask that was traced but not given is all ones, token types are zeros, positions count from zero: what the model
    takes when it is not told.

    Args:
        names: Inputs of the trace.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        optional: Inputs for which the graph has a default of its own; left out where they are not given.

    Raises:
        TraceError: An input is missing, given twice, or was not part of the trace.
    """
    if len(args) > len(names):
        raise TraceError(f"the trace takes {len(names)} inputs ({', '.join(names)}), but got {len(args)}")
    inputs = dict(zip(names, args, strict=False))
    for name, value in kwargs.items():
        if name in inputs:
            raise TraceError(f"input {name!r} was given twice, by position and by name")
        if name in names:
            inputs[name] = value
        elif not (value is None or value is False or name in _OUTPUT_FLAGS):
            raise TraceError(
                f"input {name!r} was not part of the trace, which takes {', '.join(names)}; "
                "trace again with it among the example inputs"
            )
    given = [name for name in names if name in inputs or name not in optional]
    for name in given:
        if inputs.get(name) is None:
            inputs[name] = default_input(name, inputs)
            if inputs[name] is None:
                raise TraceError(f"input {name!r} is missing; it was part of the trace")
    return {name: inputs[name] for name in given}


def default_input(name: str, inputs: Mapping[str, Any]) -> torch.Tensor | None:
    """What a model takes for an input that it is not given, or None where it needs it.

    Args:
        name: Name of the input.
        inputs: The inputs that are given; their token ids tell the shape.
    """
    ids = inputs.get("decoder_input_ids" if name.startswith("decoder_") else "input_ids")
    if not isinstance(ids, torch.Tensor):
        return None
    if isinstance(cache := inputs.get(PAST), DynamicCache):
        mask = inputs.get("attention_mask")
        if mask is None:
            mask = ids.new_ones(ids.shape[0], cache.get_seq_length() + ids.shape[1])
        return {"attention_mask": mask, "position_ids": positions(mask, ids.shape[1])}.get(name)
    if name in ("attention_mask", "decoder_attention_mask"):
        return torch.ones_like(ids)
    if name == "token_type_ids":
        return torch.zeros_like(ids)
    if name == "position_ids":
        return torch.arange(ids.shape[-1], device=ids.device).expand_as(ids)
    return None


def refuse_misshapen_step(inputs: Mapping[str, Any]) -> None:
    """Refuse a step of a decoder whose mask or cache does not fit its tokens; the graph would fail far from here.

    Args:
        inputs: The inputs of one call, all of them.

    Raises:
        TraceError: The mask is not `[batch, past + length]`, or the cache has other rows than the tokens.
    """
    ids, mask, cache = (inputs.get(name) for name in ("input_ids", "attention_mask", PAST))
    if not (isinstance(ids, torch.Tensor) and isinstance(mask, torch.Tensor) and isinstance(cache, DynamicCache)):
        return
    if ids.ndim != 2:
        raise TraceError(f"input_ids has shape {list(ids.shape)}, but a step takes [batch, length]")
    if not cache.layers:
        raise TraceError(f"{PAST} has no layers; leave it out for an empty cache, or give one that the model returned")
    keys = cache.layers[0].keys
    past, (batch, length) = keys.shape[2], ids.shape
    if keys.shape[0] != batch:
        raise TraceError(f"{PAST} has {keys.shape[0]} rows, but input_ids has shape {list(ids.shape)}; give one of it")
    if tuple(mask.shape) != (batch, past + length):
        raise TraceError(
            f"attention_mask has shape {list(mask.shape)}, but {past} cached and {length} new positions of {batch} "
            f"rows need {[batch, past + length]}; give a mask over all of them"
        )

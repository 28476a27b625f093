"""Example inputs from a user: named as the forward's arguments, and enlarged so that a trace fixes no axis."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from gralora_fx.base.compat.torch_graphs import tree_leaves, tree_map, tree_map_only
from gralora_fx.core.tracing.inputs.input_trees import has_tensor, leaf_paths
from gralora_fx.errors import TraceError, an, warn_caller
from gralora_fx.format.input_names import DECODER_INPUTS, PAST, TEXT_INPUTS

_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)

Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]  # positional and keyword arguments


def example_arguments(example_inputs: Any, kwargs: Any) -> Arguments:
    """Split example inputs, a tuple or a dict, into positional and keyword arguments."""
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TraceError(f"kwargs are {an(type(kwargs).__name__)}; give a dict of keyword arguments")
    if isinstance(example_inputs, Mapping):
        if kwargs is not None:
            raise TraceError("example_inputs are a dict of keyword arguments already; put those of kwargs into it")
        example_inputs, kwargs = (), example_inputs
    args = () if example_inputs is None else example_inputs
    if not isinstance(args, tuple):
        raise TraceError(f"example_inputs are {an(type(args).__name__)}; give a dict or a tuple of arguments")
    named = dict(kwargs or {})
    wrong = next((name for name in named if not isinstance(name, str)), None)
    if wrong is not None:
        raise TraceError(f"an example input is named {wrong!r}; give a dict whose keys are names of arguments")
    if any(isinstance(leaf, Tensor) and leaf.is_inference() for leaf in tree_leaves((args, named))):
        args, named = tree_map_only(Tensor, torch.clone, (args, named))  # a copy is no tensor of inference mode
    return args, named


def named_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return example inputs by name, in the order of the forward's parameters, without defaults of None."""
    kind = type(model).__name__
    signature = inspect.signature(model.forward)
    if "self" in kwargs:
        raise TraceError(f"an input of {kind} is named 'self', which PyTorch cannot call by name; give it another name")
    try:
        bound = signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        names = ", ".join(signature.parameters)
        raise TraceError(
            f"the example inputs do not fit {kind}.forward({names}): {error}; "
            "give a dict of its keyword arguments or a tuple of its arguments"
        ) from error
    inputs: dict[str, Any] = {}
    for name, value in bound.items():
        parameter = signature.parameters[name]
        if parameter.kind is parameter.VAR_POSITIONAL:
            if isinstance(model, PreTrainedModel):
                raise TraceError(f"{kind}.forward takes *{name}; give its arguments by name")
            rest = {rest_name(name, index): one for index, one in enumerate(value)}
            if twice := next((one for one in rest if one in signature.parameters or one in kwargs), None):
                raise TraceError(f"{kind}.forward takes *{name}, whose items are named as its argument {twice!r}")
            inputs.update(rest)
        elif parameter.kind is parameter.POSITIONAL_ONLY:
            raise TraceError(f"{kind}.forward takes {name!r} by position only; take the / out of its signature")
        elif parameter.kind is parameter.VAR_KEYWORD:
            inputs.update(value)
        elif value is not None or parameter.default is not None:
            inputs[name] = value
    return inputs


def rest_name(name: str, index: int) -> str:
    """Return the name of an item of `*name`, such as `xs_0`."""
    return f"{name}_{index}"


def by_name(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward that takes the items of its `*xs`, if it has that, by the names `xs_0`, `xs_1` and so on."""
    parameters = inspect.signature(forward).parameters.values()
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "")

    def named(**given: Any) -> Any:
        names = itertools.takewhile(given.__contains__, (rest_name(rest, index) for index in itertools.count()))
        items = [given.pop(name) for name in list(names)]
        before = (p for p in parameters if items and p.kind is p.POSITIONAL_OR_KEYWORD)
        return forward(*[given.pop(p.name, p.default) for p in before], *items, **given)

    return named if rest else forward


def split_constants(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split arguments into those with tensors, which become inputs, and constants, which become part of the graph."""
    check_leaves(inputs)
    if not any(has_tensor(value) for value in inputs.values()):
        raise TraceError(f"the example inputs of {type(model).__name__} hold no tensor; give at least one")
    constants = {name: value for name, value in inputs.items() if not has_tensor(value)}
    tensors = {name: value for name, value in inputs.items() if name not in constants}
    if isinstance(model, PreTrainedModel):
        if "labels" in tensors:
            raise TraceError(
                "labels are not part of a trace; leave them out of the example inputs, and give them to the rewritten "
                "model, which computes the loss"
            )
        use_cache = constants.pop("use_cache", None)
        if use_cache is not None and bool(use_cache) is not (PAST in tensors):
            raise TraceError(
                f"use_cache={use_cache!r} does not fit the example inputs, which hold "
                f"{'a' if PAST in tensors else 'no'} "
                f"cache; give {PAST} exactly where the trace takes one, or trace for a task that ends in -with-past"
            )
    return tensors, constants


def check_leaves(inputs: Mapping[str, Any]) -> None:
    """Check that a graph can take or hold every leaf of the inputs; dataclasses are registered with `torch.export`."""
    register_dataclasses(inputs)
    for path, leaf in leaf_paths(inputs):
        if isinstance(leaf, np.ndarray):
            raise TraceError(f"example input {path!r} is a numpy array; give torch.from_numpy of it")
        name = path.split(".", maxsplit=1)[0]
        if not isinstance(leaf, (Tensor, Cache, *_PLAIN)) and has_tensor(inputs[name]):
            raise TraceError(
                f"example input {path!r} is {an(type(leaf).__name__)}, which torch.export cannot take; give tensors, "
                "or lists, tuples, dicts or dataclasses of them"
            )


def register_dataclasses(value: Any) -> None:
    """Register every dataclass among values with `torch.export`, which requires that."""
    for leaf in tree_leaves(value):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            kind = type(leaf)
            torch.export.register_dataclass(kind, serialized_type_name=f"{kind.__module__}.{kind.__qualname__}")
            register_dataclasses(leaf)


_MASKS = {"attention_mask": "input_ids", "decoder_attention_mask": "decoder_input_ids"}


def widen(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Enlarge inputs to two rows, three positions and a padded row, since `torch.export` fixes axes of size 1."""
    sample = {name: value for name, value in inputs.items() if value is not None}
    if isinstance(model, PreTrainedModel):
        accepted = inspect.signature(model.forward).parameters
        for mask, ids in _MASKS.items():
            if mask == "attention_mask" and ids in sample and mask in accepted and mask not in sample:
                sample[mask] = torch.ones_like(sample[ids])
        for group in (TEXT_INPUTS, DECODER_INPUTS):
            sample = _with_positions(sample, group)
    tensors = [leaf for leaf in tree_leaves(sample) if isinstance(leaf, torch.Tensor) and leaf.ndim > 0]
    if tensors and all(leaf.shape[0] == 1 for leaf in tensors):
        sample = tree_map(_with_two_rows, sample)
    for name, value in sample.items():
        if isinstance(value, torch.Tensor) and value.ndim == 3 and value.shape[1] == 1:
            warn_caller(
                f"axis 1 of the example input {name!r} has size 1 and stays fixed; a longer example lets it vary"
            )
    return padded(sample)


def _with_positions(sample: dict[str, Any], group: tuple[str, ...]) -> dict[str, Any]:
    present = [name for name in group if isinstance(sample.get(name), torch.Tensor) and sample[name].ndim >= 2]
    if not present or any(sample[name].shape[1] >= 3 for name in present):
        return sample
    return {name: torch.cat([value] * 4, dim=1) if name in present else value for name, value in sample.items()}


def _with_two_rows(value: Any) -> Any:
    return torch.cat([value, value]) if isinstance(value, torch.Tensor) and value.ndim > 0 else value


def padded(sample: dict[str, Any]) -> dict[str, Any]:
    """Add a padded row to each mask that masks nothing, in place, and return the inputs."""
    for mask in _MASKS:
        value = sample.get(mask)
        if isinstance(value, torch.Tensor) and value.ndim == 2 and bool(value.all()) and value.shape[1] > 1:
            value = value.clone()
            value[-1, -1] = 0
            sample[mask] = value
    return sample


def distinct(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs with repeated tensors cloned, since `torch.export` makes them a single input."""
    seen: set[int] = set()

    def unshared(tensor: Tensor) -> Tensor:
        is_first = id(tensor) not in seen
        seen.add(id(tensor))
        return tensor if is_first else tensor.detach().clone().requires_grad_(tensor.requires_grad)

    result: dict[str, Any] = tree_map_only(Tensor, unshared, dict(inputs), is_leaf=lambda part: isinstance(part, Cache))
    return result

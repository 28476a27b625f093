"""Binds a call's arguments to the inputs of a traced graph: by name, with defaults, in the examples' structure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import Cache, EncoderDecoderCache

from gralora_fx.base.compat.torch_graphs import KeyPath, tree_flatten_with_path
from gralora_fx.core.tracing.inputs.input_trees import (
    FixedAxes,
    batch_of,
    key_text,
    kind_of,
    same_value,
    shown,
    tensor_paths,
)
from gralora_fx.core.tracing.inputs.signature import CallSignature, default_input
from gralora_fx.errors import TraceError, an, option
from gralora_fx.format.input_names import IDS, PAST, beside_ids, takes_embeddings
from gralora_fx.format.size_limits import first_problem


def bind_call(
    signature: CallSignature, examples: Mapping[str, Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Bind the arguments of a call to the inputs of a trace with these examples, in the graph's order.

    As the source's defaults say, a missing mask is all ones, missing token types zeros, and missing positions count
    from zero or continue after a cache. A missing cache is empty; a given one is put in the trace's form.
    """
    kwargs = _with_cache_name(signature.inputs, kwargs)
    example = examples.get(PAST)
    if not isinstance(example, Cache):
        return _bind(signature, examples, args, kwargs)
    from gralora_fx.core.tracing.inputs.cache import check_step_shapes, empty_cache, fitted_cache, own_cache

    if kwargs.get(PAST) is None and PAST not in signature.positional[: len(args)]:
        kwargs = {**kwargs, PAST: empty_cache(example, batch_of((*args, *kwargs.values())))}
    if isinstance(given := kwargs.get(PAST), Cache):
        others = (value for name, value in kwargs.items() if name != PAST)
        kwargs = {**kwargs, PAST: fitted_cache(given, example, batch_of((*args, *others)))}
    inputs = _bind(signature, examples, args, kwargs)
    if isinstance(cache := inputs.get(PAST), EncoderDecoderCache):
        inputs[PAST] = own_cache(cache)  # the graph contains the encoder and reads its output directly
    check_step_shapes(inputs)
    return inputs


def _bind(
    signature: CallSignature, examples: Mapping[str, Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    arguments = _by_name(signature, args, kwargs)
    for name, value in arguments.items():
        if name not in signature.inputs:
            _check_constant(signature, name, value, by_position=name not in kwargs, count=len(args))
    for name in signature.values:
        if arguments.get(name) is None:
            _check_left_out(signature, name, arguments)
    inputs = {n: arguments.get(n) for n in signature.inputs if n in arguments or n not in signature.optional}
    for name in inputs:
        if inputs[name] is None and not (name in examples and examples[name] is None):
            inputs[name] = _filled(signature, name, inputs, examples)
        if signature.facts:
            _check_facts(signature, name, inputs[name])
        if signature.has_form and name in signature.fixed:  # a tensor: torch.compile would guard the example's shape
            _check_tensor(name, inputs[name], signature.fixed[name])
        elif signature.has_form and name in examples:
            _check_form(name, examples[name], inputs[name], signature.fixed)
    if signature.limits:
        shapes = {path: tensor.shape for path, tensor in tensor_paths(inputs).items()}
        if (problem := first_problem(signature.limits, shapes)) is not None:
            raise TraceError(f"{problem}; give that, or trace again with an example of the other size")
    return inputs


def _with_cache_name(names: Sequence[str], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Rename `cache`, transformers' newer name, to the trace's name for it."""
    if "cache" not in kwargs or PAST not in names or "cache" in names:
        return kwargs
    if kwargs.get(PAST) is not None:
        raise TraceError(f"cache and {PAST} are one input; give one of them")
    return {**{name: value for name, value in kwargs.items() if name != "cache"}, PAST: kwargs["cache"]}


def _by_name(signature: CallSignature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    if len(args) > len(signature.positional):
        names = signature.inputs
        raise TraceError(f"the trace takes {len(names)} inputs ({', '.join(names)}), but got {len(args)} by position")
    arguments = dict(zip(signature.positional, args, strict=False))
    twice = [name for name in kwargs if name in arguments]
    if twice:
        raise TraceError(f"input {twice[0]!r} was given twice, by position and by name")
    return {**arguments, **kwargs}


def _check_constant(signature: CallSignature, name: str, value: Any, *, by_position: bool, count: int) -> None:
    """Check that an argument that is part of the graph has its traced value."""
    if value is None and (name in signature.nullable or (name not in signature.values and signature.takes_any)):
        return
    traced = signature.values.get(name)
    if name in signature.values and same_value(traced, value):
        return
    if traced is None:
        names = ", ".join(signature.inputs)
        if by_position:
            raise TraceError(
                f"the trace takes {len(signature.inputs)} inputs ({names}), but got {count}: {name!r} was not part of "
                "it; trace again with it among the example inputs"
            )
        raise TraceError(
            f"input {name!r} was not part of the trace, which takes {names}; "
            "trace again with it among the example inputs"
        )
    if name == "use_cache" and value is True:
        remedy = f"trace again for a task with a cache, such as {option(task='text-generation-with-past')}"
    else:
        remedy = "trace again with that value among the example inputs"
    raise TraceError(
        f"input {name!r} was {traced!r} when the model was traced and is part of the graph, so it cannot be "
        f"{shown(value)}; {remedy}"
    )


def _check_left_out(signature: CallSignature, name: str, arguments: Mapping[str, Any]) -> None:
    """Check that the default of a missing argument has the value that is part of the graph."""
    if name in arguments and name not in signature.nullable:
        return
    traced = signature.values[name]
    if name not in signature.defaults:
        raise TraceError(f"input {name!r} is missing; it was {traced!r} when the model was traced")
    if not same_value(default := signature.defaults[name], traced):
        raise TraceError(
            f"input {name!r} was {traced!r} when the model was traced and is part of the graph; left out, the model "
            f"takes {shown(default)}: give {name}={traced!r}, or trace again without it"
        )


def _check_facts(signature: CallSignature, name: str, value: Any) -> None:
    """Check an input by the facts that features record; the graph's own error would be obscure or missing."""
    for facts in signature.facts.values() if isinstance(value, Tensor) else ():
        if facts.input == name and (problem := facts.problem(value.shape, signature.fixed.get(name, ()))):
            raise TraceError(f"input {name!r} {problem}")


def _filled(signature: CallSignature, name: str, inputs: Mapping[str, Any], examples: Mapping[str, Any]) -> Tensor:
    """Return the default of a missing input."""
    known = {other: value for other, value in inputs.items() if value is not None}
    value = None
    if IDS in known and (beside := beside_ids(examples).get(name)) is not None:
        left_out: Tensor = beside.of_text(examples[name], known)
        return left_out
    if name in signature.fillable or (name == IDS and takes_embeddings(examples)):
        value = default_input(name, known, counts_padding=signature.counts_padding)
    if value is None:
        default = ""
        if name in signature.defaults:
            default = f"; the model's own default, {shown(signature.defaults[name])}, is not: give it, or trace again "
            default += "without it"
        raise TraceError(f"input {name!r} is missing; it was part of the trace{default}")
    return value


def _check_form(name: str, example: Any, value: Any, fixed: FixedAxes) -> None:
    """Check that an input has the structure of the example: containers, types of leaves, axes and constants."""
    if isinstance(example, Cache):
        if not isinstance(value, Cache):
            raise TraceError(f"input {name!r} is {kind_of(value)}, but the trace takes {an(type(example).__name__)}")
    elif isinstance(example, Tensor):
        _check_tensor(name, value, fixed.get(name))
    elif isinstance(example, (list, tuple, dict)) or _is_container(example):
        _check_container(name, example, value, fixed)
    elif not same_value(example, value):
        raise TraceError(
            f"input {name!r} was {example!r} when the model was traced and is part of the graph, so it cannot be "
            f"{shown(value)}; trace again with that value"
        )


def _check_tensor(name: str, value: Any, sizes: tuple[int | None, ...] | None) -> None:
    """Check that an input is a tensor of a size that the trace takes."""
    if not isinstance(value, Tensor):
        hint = "torch.from_numpy makes one" if type(value).__module__ == "numpy" else "torch.tensor makes one"
        raise TraceError(f"input {name!r} is {kind_of(value)}, but the trace takes a tensor; {hint}")
    if sizes is None:
        return
    shape = tuple(value.shape)
    if len(shape) != len(sizes) or any(
        size is not None and size != actual for size, actual in zip(sizes, shape, strict=True)
    ):
        accepted = ", ".join("any" if size is None else str(size) for size in sizes)
        raise TraceError(
            f"input {name!r} has shape {list(shape)}, but the trace takes [{accepted}]; give that, or trace again with "
            "an example of the other shape"
        )


def _check_container(name: str, example: Any, value: Any, fixed: FixedAxes) -> None:
    expected, actual = _children(example), _children(value)
    if actual is None or expected is None or isinstance(expected, list) is not isinstance(actual, list):
        raise TraceError(f"input {name!r} is {kind_of(value)}, but the trace takes {an(type(example).__name__)}")
    if isinstance(expected, list) and isinstance(actual, list):
        if len(expected) != len(actual):
            raise TraceError(
                f"input {name!r} has {len(actual)} items, but the trace takes {len(expected)}; trace again with an "
                "example of that length"
            )
        expected, actual = dict(enumerate(expected)), dict(enumerate(actual))
    assert isinstance(expected, dict)
    assert isinstance(actual, dict)
    other = [key for key in (*expected, *actual) if (key in expected) is not (key in actual)]
    if other:
        verb = "lacks" if other[0] in expected else "has"
        raise TraceError(
            f"input {name!r} {verb} {', '.join(map(repr, other))}, but the trace takes "
            f"{', '.join(map(repr, expected))}; give these, or trace again with an example of that form"
        )
    for key, item in expected.items():
        _check_form(f"{name}.{key}", item, actual[key], fixed)


def _children(value: Any) -> list[Any] | dict[Any, Any] | None:
    """Return the items of a container, in order or by name; None for anything else."""
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, (list, tuple)):
        return list(value)
    if not _is_container(value):
        return None
    return {key_text(keys[0]): item for keys, item in _one_level(value)}


def _is_container(value: Any) -> bool:
    """Return whether pytree sees a value as a container, such as a registered dataclass."""
    return any(keys for keys, _ in _one_level(value))


def _one_level(value: Any) -> list[tuple[KeyPath, Any]]:
    entries, _ = tree_flatten_with_path(value, is_leaf=lambda part: part is not value)
    return entries

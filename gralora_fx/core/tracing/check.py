"""Compares a trace with its model, on the example inputs and on other sizes."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from gralora_fx.base.compat.torch_graphs import tree_leaves, tree_map
from gralora_fx.base.progress.stages import quiet
from gralora_fx.base.sources.lazy_tensors import reading
from gralora_fx.core.tracing.draft import Captured, Draft
from gralora_fx.core.tracing.inputs.input_trees import by_own_names, placeholder_values, same_value, shown
from gralora_fx.core.tracing.inputs.signature import default_input, own_inputs
from gralora_fx.core.tracing.normalize.modes import set_mode
from gralora_fx.errors import TraceError, first_line, remedy
from gralora_fx.format.input_names import PAST, TEXT_INPUTS

# Largest difference from the eager model, relative to its largest output, by the dtype of that output.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
RECURRENT = {name: getattr(torch.ops.aten, name).input for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")}


def check(draft: Captured) -> Captured:
    """Return the draft with its `problem`: how the graph differs from the model in evaluation mode, or None."""
    if draft.drawn is not None and not draft.evaluates:
        return dataclasses.replace(draft, problem=f"it draws random numbers ({draft.drawn})")
    return dataclasses.replace(draft, problem=difference(draft))


def difference(draft: Captured, sample: Mapping[str, Any] | None = None) -> str | None:
    """Describe how a graph differs from the eager model in evaluation mode, with the same seed; None if it does not."""
    if not draft.has_values:
        return None
    model, sample = draft.model, draft.sample if sample is None else sample
    with _in_evaluation(model):
        try:
            expected = call_eager(model, sample)
        except Exception as error:  # a model may raise anything
            from gralora_fx.core.tracing.failures import where

            raise TraceError(
                f"{type(model).__name__} itself fails on the example inputs{where(model, error)}: {first_line(error)}"
            ) from error
        torch.manual_seed(0)
        try:
            with checked_states(draft.graph_module.graph):
                actual = draft.graph_module(**own_inputs(sample))
        except Exception as error:  # noqa: BLE001  # a graph of a fixed size raises its operators' errors
            from gralora_fx.core.tracing.failures import reason

            return f"it fails with {type(error).__name__}: {reason(error)}"
    return gap(expected, actual)


def eager_failure(model: nn.Module, sample: Mapping[str, Any]) -> str | None:
    """Return why the eager model fails on inputs in evaluation mode; None if it does not."""
    with _in_evaluation(model):
        try:
            call_eager(model, sample)
        except Exception as error:  # noqa: BLE001  # a model may raise anything
            return first_line(error)
    return None


def with_call_signature(draft: Captured) -> Captured:
    """Return the draft with a signature that records which inputs may be left out and which sizes are fixed."""
    fixed = fixed_axes(draft.graph_module.graph, draft.sample)
    fillable, counts_padding = fillable_inputs(draft)
    signature = dataclasses.replace(
        draft.signature,
        fillable=fillable,
        counts_padding=counts_padding,
        dynamic=draft.dynamic,
        fixed=fixed,
        facts=draft.facts,
        limits=draft.limits,
    )
    return dataclasses.replace(draft, signature=signature)


def fillable_inputs(draft: Draft) -> tuple[frozenset[str], bool]:
    """Return the inputs that `default_input` gives the eager model's own default for, and whether it counts padding."""
    model, sample, names = draft.model, draft.sample, draft.signature.may_be_left_out
    if not draft.has_values:
        return frozenset(names), False
    fillable, counts_padding = set(), False
    for name in names:
        rest = {other: value for other, value in sample.items() if other != name}
        with _in_evaluation(model):
            try:
                expected = call_eager(model, rest)
            except Exception:  # noqa: BLE001  # it has a default but is required
                continue
            for counts, value in _defaults(name, rest):
                torch.manual_seed(0)
                if gap(expected, call_eager(model, {**rest, name: value})) is None:
                    fillable.add(name)
                    counts_padding |= counts and name == "position_ids"
                    break
    return frozenset(fillable), counts_padding


def _defaults(name: str, rest: Mapping[str, Any]) -> Iterator[tuple[bool, Tensor]]:
    """Yield possible defaults of an input that is left out, each with whether positions count padding.

    Some models count a step's positions from zero, whatever is cached (Bamba); here they continue, as in `generate`.
    """
    value = default_input(name, rest, counts_padding=True)
    if value is None:
        return
    yield True, value
    if name == "position_ids" and PAST in rest:
        mask_alone = default_input(name, rest)
        assert mask_alone is not None
        yield False, mask_alone
        yield True, value - value[:, :1]


def fixed_axes(graph: fx.Graph, inputs: Mapping[str, Any]) -> dict[str, tuple[int | None, ...]]:
    """Return the sizes that a trace fixes for each input tensor, by path; None for an axis that may vary."""
    return {
        path: tuple(int(size) if is_concrete_int(size) else None for size in value.shape)
        for path, value in placeholder_values(graph, inputs)
    }


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, for good; within the block: no gradients, no output, a fixed random seed."""
    model.eval()
    with torch.no_grad(), quiet(), torch.random.fork_rng(devices=()), reading(model):
        torch.manual_seed(0)
        yield


def gap(expected: Any, actual: Any) -> str | None:
    """Describe how a graph's outputs differ from the model's; None if they do not."""
    expected_leaves, actual_leaves = tree_leaves(expected), tree_leaves(actual)
    if len(expected_leaves) != len(actual_leaves):
        return f"it returns {len(actual_leaves)} values, the model {len(expected_leaves)}"
    for index, (want, got) in enumerate(zip(expected_leaves, actual_leaves, strict=True)):
        if not (isinstance(want, torch.Tensor) and isinstance(got, torch.Tensor)):
            if not _is_close(want, got):
                return f"output {index} is {shown(got)}, the model's {shown(want)}"
            continue
        if want.shape != got.shape:
            return f"output {index} has shape {tuple(got.shape)}, the model's {tuple(want.shape)}"
        if not want.numel():
            continue
        if not want.is_floating_point():
            if not torch.equal(want, got.to(want.dtype)):
                return f"output {index} has other {str(want.dtype).removeprefix('torch.')} values"
            continue
        largest = want.abs().nan_to_num().max().item()
        gap = (want - got).abs().nan_to_num().max().item()
        if gap > _TOLERANCE.get(want.dtype, 1e-4) * max(largest, 1e-6):
            return f"output {index} differs by {gap:.3g} where the largest value is {largest:.3g}"
    return None


def _is_close(want: Any, got: Any) -> bool:
    """Return whether two values other than tensors are equal, floats up to rounding."""
    if isinstance(want, float) and isinstance(got, float):
        return math.isclose(want, got, rel_tol=1e-4, abs_tol=1e-6) or (math.isnan(want) and math.isnan(got))
    return type(want) is type(got) and (same_value(want, got) or not isinstance(want, (bool, int, str, type(None))))


def refuse_size(draft: Captured, description: str, problem: str) -> NoReturn:
    """Raise since a trace differs from its model on inputs of other sizes: the graph holds a branch for one."""
    from gralora_fx.core.tracing.failures import where_defined

    raise TraceError(
        f"the trace of {type(draft.model).__name__} is valid for the example's sizes only; with {description} "
        f"{problem}. The forward{where_defined(draft.model)} branches or loops on a size, or makes a number of it "
        f"(as len does): {remedy('trace', 'trace it from Python')} with dynamic=False for one size, or rewrite it"
    )


def differs_in_training(draft: Captured, sample: Mapping[str, Any]) -> bool:
    """Return whether a graph of both modes differs from the model in training mode, on inputs that it takes."""
    model, graph_module = draft.model, draft.graph_module
    if draft.evaluates:
        return False
    outputs = []
    model.train()
    for path in draft.evaluated:
        model.get_submodule(path).training = False
    with (
        quiet(),
        torch.no_grad(),
        torch.random.fork_rng(devices=()),
        reading(model),
        _in_training(graph_module),
        checked_states(graph_module.graph),
    ):
        for run in (partial(call_eager, model, sample), partial(graph_module.forward, **own_inputs(sample))):
            torch.manual_seed(0)
            try:
                outputs.append(run())
            except Exception:  # noqa: BLE001  # either may raise anything
                return bool(outputs)  # the model takes the inputs, the graph does not
    return gap(*outputs) is not None


@contextmanager
def _in_training(graph_module: fx.GraphModule) -> Iterator[None]:
    """Put a graph in training mode within the block."""
    try:
        if set_mode(graph_module.graph, True):
            graph_module.recompile()
        yield
    finally:
        if set_mode(graph_module.graph, False):
            graph_module.recompile()


def other_sizes(model: nn.Module, sample: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield inputs of other sizes to check a trace with, each with its description.

    One row, one more row, and longer sequences; with a cache, one position after a long past, and an empty cache.
    """
    if PAST in sample and isinstance(model, PreTrainedModel):
        from gralora_fx.core.tracing.inputs.cached_steps import other_steps

        yield from other_steps(model, sample)
        return
    tensors = [leaf for leaf in tree_leaves(dict(sample)) if isinstance(leaf, torch.Tensor) and leaf.ndim > 0]
    if tensors and len({leaf.shape[0] for leaf in tensors}) == 1:
        yield "one row", tree_map(lambda value: _rows(value, slice(0, 1)), dict(sample))
        yield "another row", tree_map(_with_another_row, dict(sample))
    text = [name for name in TEXT_INPUTS if isinstance(leaf := sample.get(name), Tensor) and leaf.ndim >= 2]
    if text:
        # in front, where a mask that ends or begins with padding gets no gap
        longer = {name: torch.cat([v[:, :3], v], dim=1) if name in text else v for name, v in sample.items()}
        yield "a longer sequence", longer
    elif all(leaf.ndim == 3 for leaf in tensors) and len({leaf.shape[1] for leaf in tensors}) == 1:
        yield "a longer sequence", tree_map(_with_another_position, dict(sample))


def _rows(value: Any, rows: slice) -> Any:
    return value[rows] if isinstance(value, torch.Tensor) and value.ndim > 0 else value


def _with_another_row(value: Any) -> Any:
    return torch.cat([value, value[:1]]) if isinstance(value, torch.Tensor) and value.ndim > 0 else value


def _with_another_position(value: Any) -> Any:
    return torch.cat([value, value[:, :1]], dim=1) if isinstance(value, torch.Tensor) and value.ndim > 1 else value


def call_eager(model: nn.Module, sample: Mapping[str, Any]) -> Any:
    """Run a model on inputs, leaving their cache unchanged."""
    inputs = own_inputs(sample)
    if isinstance(model, PreTrainedModel) and "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = PAST in sample
    inputs = dict(by_own_names(model.forward, inputs))
    if PAST in sample:
        from gralora_fx.base.features import parts

        if any(reads_single_tokens(model) for reads_single_tokens in parts("single tokens")):
            return _by_token(model, inputs)
    return model(**inputs)


def _by_token(model: nn.Module, inputs: dict[str, Any]) -> Any:
    """Run a step's tokens through a model one by one; return the logits of all and the last cache."""
    from gralora_fx.core.tracing.inputs.cache import cached_length, returned_cache

    tokens = {name: inputs.pop(name) for name in ("input_ids", "position_ids") if name in inputs}
    mask, cache = inputs.pop("attention_mask", None), inputs.pop("cache", inputs.pop(PAST, None))
    count, logits = tokens["input_ids"].shape[1], []
    for place in range(count):
        step: dict[str, Any] = {name: value[:, place : place + 1] for name, value in tokens.items()}
        if mask is not None and cached_length(cache) is not None:  # models with only states take masks of new tokens
            step["attention_mask"] = mask[:, : mask.shape[1] - count + place + 1]
        outputs = model(**inputs, **step, cache=cache)
        cache = returned_cache(outputs)
        logits.append(outputs["logits"])
    outputs["logits"] = torch.cat(logits, dim=1)
    return outputs


class _CheckedStates(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in RECURRENT.values():
            states, rows = [args[1]] if isinstance(args[1], Tensor) else args[1], args[0].shape[0 if args[8] else 1]
            if any(state.shape[1] != rows for state in states):
                raise ValueError(f"a recurrent layer's states are not of {rows} rows, as its input is")
        return func(*args, **(kwargs or {}))


def checked_states(graph: fx.Graph) -> AbstractContextManager[Any]:
    """Let a graph's recurrent operators raise for states of another batch than the input, which they read beyond."""
    return _CheckedStates() if any(node.target in RECURRENT.values() for node in graph.nodes) else nullcontext()

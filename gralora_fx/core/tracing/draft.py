"""The draft of a trace, which the stages of `trace` pass on: each returns the next draft."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import fx, nn
from transformers import PreTrainedModel

from gralora_fx.core.graph.kept_calls import with_own_hooks
from gralora_fx.core.graph.module_tree import kept_modes
from gralora_fx.core.graph.pipeline import PassReport
from gralora_fx.core.tracing.inputs.arguments import (
    Arguments,
    by_name,
    distinct,
    named_arguments,
    register_dataclasses,
    split_constants,
    widen,
)
from gralora_fx.core.tracing.inputs.signature import CallSignature, signature_of
from gralora_fx.errors import TraceError, first_line, warn_caller
from gralora_fx.format.input_names import PAST

if TYPE_CHECKING:  # only for models whose inputs features know
    from gralora_fx.core.tracing.size_guards import Guard
    from gralora_fx.format.input_names import InputFacts
    from gralora_fx.format.size_limits import SizeLimit

NO_CHECKPOINTS = (
    "gradient checkpointing is not part of a trace; the rewritten model has its own (gradient_checkpointing_enable), "
    "which recomputes its blocks"
)
_LAYERDROP = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")


class AppendedModules(ABC):
    """Modules that a task appends to a model's forward."""

    @abstractmethod
    def appended_to(self, model: nn.Module) -> AbstractContextManager[None]:
        """Append the modules to the model's forward within the block; the model's own modules keep their paths."""

    @abstractmethod
    def told_to(self, tokenizer: Any, config: Any) -> Any:
        """Return a copy of a tokenizer that prepares texts as the modules expect."""

    @abstractmethod
    def write(self, directory: Path) -> None:
        """Write the files that programs which read an export need for the modules."""


@dataclass(frozen=True)
class Draft:
    """A model, and the inputs to capture it with."""

    model: nn.Module  # the model, or the graph that was given for one
    sample: Mapping[str, Any]  # inputs of the graph by name
    signature: CallSignature
    constants: Mapping[str, Any] = field(default_factory=dict)  # arguments that become part of the graph
    task: str | None = None  # the task, or None
    appended: AppendedModules | None = None  # the modules that the task appends to the model, or None
    options: Mapping[str, Any] = field(default_factory=dict)  # options of `trace` that features read
    has_values: bool = True  # whether every parameter has values, so that the graph can be compared with the model
    dynamic: bool = True  # whether axes may vary
    held: Collection[str] = ()  # inputs whose batch axis alone may vary
    # whether the model is captured in evaluation mode; else in training mode, where every dropout has its probability
    evaluates: bool = False
    evaluated: tuple[str, ...] = ()  # paths of the modules that are in evaluation mode nevertheless
    kept: tuple[str, ...] = ()  # paths of the modules that the model itself keeps in evaluation mode
    keeps_all: bool = False  # whether functions of weights with a backward of their own stay one node too


class Skeleton(Draft):
    """A draft whose model is on the meta device, for a trace with its own tensors, dtypes and devices."""


def skeleton_of(source: Draft | str, memo: Mapping[int, Any] | None = None) -> Draft | str:
    """Return a source for a trace whose tensors are not the source model's, or why there is none."""
    if isinstance(source, (str, Skeleton)):
        return source
    if memo is not None and id(source.model) in memo:
        return dataclasses.replace(source, model=memo[id(source.model)])
    known: dict[int, Any] = {id(buffer): buffer for buffer in source.model.buffers()}
    for parameter in source.model.parameters():
        empty = torch.empty_like(parameter, device="meta", requires_grad=False)
        known[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    try:
        model = copy.deepcopy(source.model, known)
    except Exception as error:  # noqa: BLE001  # copying a module may raise anything; a conversion reports it
        return f"its {type(source.model).__name__} cannot be copied ({first_line(error)})"
    return Skeleton(**{**vars(source), "model": model})


@dataclass(frozen=True)
class Captured(Draft):
    """A draft with its graph."""

    graph_module: fx.GraphModule = field(kw_only=True)
    passes: tuple[PassReport, ...] = ()  # reports of the passes that normalized it
    drawn: str | None = None  # an operator of it that draws random numbers in either mode, as text, or None
    updated: tuple[str, ...] = ()  # names of the buffers that it updates in either mode
    kept_calls: bool = False  # whether it keeps calls as one node (see `kept_calls`)
    lost: tuple[str, ...] = ()  # names of what has a backward of its own that is not in the graph
    problem: str | None = None  # how it differs from the model; None if it does not, or was not compared
    # features' records of its inputs, by their names in manifests
    facts: Mapping[str, InputFacts] = field(default_factory=dict)
    guards: tuple[Guard, ...] = ()  # conditions on sizes that the export recorded
    limits: tuple[SizeLimit, ...] = ()  # those that a call must meet


def first_draft(
    model: nn.Module,
    arguments: Arguments | None,
    *,
    task: str | None,
    dynamic: bool,
    appended: AppendedModules | None,
    options: Mapping[str, Any],
    has_values: bool,
) -> Draft:
    """Return the draft of a live module: its example inputs and its call signature."""
    if isinstance(model, PreTrainedModel):
        from gralora_fx.core.tracing.inputs.samples import check_head, infer_task, inputs_for_task
        from gralora_fx.format.tasks import check_task

        if task:
            check_task(task)
        else:
            task = infer_task(model)
        check_head(model, task)
    if arguments is None:
        if not isinstance(model, PreTrainedModel) and hasattr(model, "peft_config"):
            raise TraceError(
                f"the {type(model).__name__} has PEFT's own adapters in it; save them (save_pretrained), trace the "
                "base model as it is without them, and load them with GraloraModel.from_pretrained"
            )
        if not isinstance(model, PreTrainedModel):
            raise TraceError(
                f"example_inputs are missing; {type(model).__name__} is not a transformers model, so give them"
            )
        arguments = (), inputs_for_task(model, task or "")
    tensors, constants = split_constants(model, named_arguments(model, *arguments))
    for name, value in options.items():
        tensors, constants = _option_reader(name)(model, tensors, constants, value)
    sample = distinct(_enlarged(model, tensors) if dynamic else tensors)
    return Draft(
        model,
        sample,
        signature_of(model, sample, constants, has_cache=PAST in sample),
        constants,
        task=task,
        appended=appended,
        options=options,
        has_values=has_values,
        dynamic=dynamic,
    )


def _option_reader(name: str) -> Any:
    """Return the function that turns a `trace` option of a feature into tensors and constants to trace with."""
    from gralora_fx.base.features import parts

    found = next((readers[name] for readers in parts("trace options") if name in readers), None)
    if found is None:
        raise TraceError(f"{name} has no effect, since no feature that is installed reads it; leave it out")
    return found


def _enlarged(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Enlarge example inputs so that no axis is fixed."""
    if inputs.get(PAST) is None or not isinstance(model, PreTrainedModel):
        return widen(model, inputs)
    from gralora_fx.core.tracing.inputs.cached_steps import widened_step

    return widened_step(model, {name: value for name, value in inputs.items() if value is not None})


@contextmanager
def called_as(draft: Draft) -> Iterator[None]:
    """Let a model take exactly its draft's inputs within the block; modes and buffers are restored after it."""
    model = draft.model
    forward = forward_with(model, tuple(draft.sample), draft.constants)
    with (
        with_own_hooks(model, forward) as hooked,
        patch.object(model, "forward", hooked),
        configured_cache(model, use_cache=PAST in draft.sample),
        _every_layer_runs_once(model),
        _of_transformers(model, draft.sample),
        _restored(model),
    ):
        yield


def forward_with(model: nn.Module, inputs: Collection[str], constants: Mapping[str, Any]) -> Callable[..., Any]:
    """Return a model's forward with constant arguments bound.

    A plain module's gets the inputs as its signature, and may return dataclasses and take keywords that it does not
    name.
    """
    if isinstance(model, PreTrainedModel):
        return functools.partial(model.forward, **constants) if constants else model.forward
    return _flat(functools.partial(by_name(model.forward), **constants), inputs)


def _flat(forward: Callable[..., Any], inputs: Collection[str]) -> Callable[..., Any]:
    def flat(**kwargs: Any) -> Any:
        outputs = forward(**kwargs)
        register_dataclasses(outputs)
        return outputs

    flat.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in inputs]
    )
    return flat


@contextmanager
def configured_cache(model: nn.Module, *, use_cache: bool) -> Iterator[None]:
    """Set in the configuration whether a model returns a cache, if its forward has no `use_cache` of its own."""
    configs: list[Any] = []
    if isinstance(model, PreTrainedModel) and "use_cache" not in inspect.signature(model.forward).parameters:
        configs = [model.config, model.config.get_text_config()]
    with ExitStack() as stack:
        for config in configs:
            if isinstance(getattr(config, "use_cache", None), bool):
                stack.enter_context(patch.object(config, "use_cache", use_cache))
        yield


@contextmanager
def _every_layer_runs_once(model: nn.Module) -> Iterator[None]:
    """Turn off gradient checkpointing and layerdrop within the block; warn that training will lack layerdrop."""
    with ExitStack() as changed:
        for part in model.modules():
            if getattr(part, "gradient_checkpointing", False) is True:
                changed.enter_context(patch.object(part, "gradient_checkpointing", False))
        dropped: list[str] = []
        for path, holder in [("config", getattr(model, "config", None)), *model.named_modules()]:
            for name in _LAYERDROP:
                value = getattr(holder, name, None)
                if isinstance(value, float) and value > 0:
                    changed.callback(setattr, holder, name, value)
                    setattr(holder, name, 0.0)
                    dropped.append(f"{path}.{name}={value:g}".removeprefix("."))
        if dropped:
            found = ", ".join(dropped)
            warn_caller(f"layerdrop is not part of a trace ({found}); training runs every layer in every step")
        yield


@contextmanager
def _of_transformers(model: nn.Module, sample: Mapping[str, Any]) -> Iterator[None]:
    """Give a key indexer all positions, and let features patch how a transformers model is called, within the block."""
    with ExitStack() as changed:
        if isinstance(model, PreTrainedModel):
            from gralora_fx.base.features import parts
            from gralora_fx.core.tracing.known_code import has_key_indexer

            if has_key_indexer(model):
                from gralora_fx.core.tracing.sparse_attention import known_positions

                changed.enter_context(known_positions(model))
            for patches in parts("call patches", {*sample, model.config.model_type}):
                changed.enter_context(patches(model, sample))
        yield


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if not buffer.is_meta]
    try:
        with kept_modes(model):
            yield
    finally:
        with torch.no_grad():
            for buffer, values in buffers:
                buffer.copy_(values)

"""Capture of a live model as a graph, by transformers' exporter or PyTorch's.

While it is traced, patches give what a trace cannot record a form that it can: checkpoints, inference mode, loops,
branches; and attention of a decoder with a cache, and layers of features, become one node each.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.utils import checkpoint
from transformers import PreTrainedModel

from gralora_fx.base.compat.transformers_exporters import auto_dynamic_shapes, export_program
from gralora_fx.base.progress.stages import quiet
from gralora_fx.core.tracing.draft import NO_CHECKPOINTS, Captured, Draft
from gralora_fx.core.tracing.inputs.input_trees import own_inputs
from gralora_fx.core.tracing.inputs.layouts import CacheLayout, cache_layout
from gralora_fx.errors import TraceError, warn_caller
from gralora_fx.format.input_names import PAST


def capture(draft: Draft) -> Captured:
    """The draft with the graph of its model in the model's current mode, as it was exported."""
    model, sample = draft.model, draft.sample
    try:
        with (
            quiet(),
            _as_traced(model),
            traceable_modes() as checkpoints,
        ):
            shapes = dynamic_axes(sample, draft.held) if draft.dynamic else None
            if isinstance(model, PreTrainedModel):
                program = _export_transformers_model(model, sample, shapes)
            else:
                # with gradients, so that regions without gradients are recorded
                with torch.enable_grad():
                    program = torch.export.export(model, (), dict(sample), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch.export raises errors of every type
        from gralora_fx.core.tracing.failures import reason, where

        raise TraceError(f"cannot trace {type(model).__name__}{where(model, error)}: {reason(error)}") from error
    if checkpoints:
        warn_caller(f"{NO_CHECKPOINTS} (checkpoints of {', '.join(dict.fromkeys(checkpoints))})")
    return Captured(**vars(draft), graph_module=program.module(check_guards=False))


def _export_transformers_model(
    model: PreTrainedModel, inputs: Mapping[str, Any], shapes: dict[str, Any] | None
) -> torch.export.ExportedProgram:
    """Export a transformers model in its current mode, with a cache if one is given; no axis varies without shapes."""
    own, forward = own_inputs(inputs), model.forward
    if "use_cache" in inspect.signature(forward).parameters:
        forward = functools.partial(forward, use_cache=PAST in inputs)
    with patch.object(model, "forward", forward), _steps(model, inputs):
        return export_program(model, own, shapes, dynamic=shapes is not None)


@contextmanager
def _as_traced(model: nn.Module) -> Iterator[None]:
    """Replace known code of a model by what can be traced, and layers of features by operators, within the block."""
    with ExitStack() as changed:
        if has_own_code(model):
            from gralora_fx.base.features import parts
            from gralora_fx.core.tracing.patches.known_code import IN_EVERY_MODEL
            from gralora_fx.core.tracing.patches.recognised import replaced

            for table in (IN_EVERY_MODEL, *parts("known code")):
                changed.enter_context(replaced(model, table))
        changed.enter_context(features_as_nodes(model))
        yield


@contextmanager
def features_as_nodes(model: nn.Module) -> Iterator[None]:
    """Let layers that features have operators for be one node each within the block."""
    with ExitStack() as changed:
        if has_own_code(model):
            from gralora_fx.base.features import parts

            for patches in parts("trace patches"):
                changed.enter_context(patches(model))
        yield


def has_own_code(model: nn.Module) -> bool:
    """Return whether a model has modules of other classes than torch's."""
    return any(not type(part).__module__.startswith("torch.nn.") for part in model.modules())


@contextmanager
def _steps(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Iterator[None]:
    """Let the layers of a decoder's step be one node each, if the inputs are those of one."""
    with ExitStack() as changed:
        if cache_layout(inputs) is CacheLayout.DECODER:
            from gralora_fx.base.features import parts
            from gralora_fx.core.tracing.patches.decoder_operators import decoder_operators

            changed.enter_context(decoder_operators(model, inputs))
            from gralora_fx.core.tracing.inputs.cache import attributes_of

            for patches in parts("step patches", attributes_of(inputs[PAST])):
                changed.enter_context(patches())
        yield


def dynamic_axes(inputs: Mapping[str, Any], held: Collection[str] = ()) -> dict[str, Any]:
    """Make `dynamic_shapes` for `torch.export`: all axes may vary; of caches batch and length, of `held` the batch."""
    shapes = auto_dynamic_shapes(inputs)
    shapes |= {name: {0: torch.export.Dim.AUTO} for name in held if name in shapes}
    if PAST in shapes:
        from gralora_fx.core.tracing.inputs.cached_steps import varying_axes

        varying = varying_axes(inputs)
        shapes |= {name: varying[name] for name in shapes if name in varying}
    return shapes


@contextmanager
def traceable_modes() -> Iterator[list[str]]:
    """Within the block, checkpoints call their function directly, and inference mode only turns gradients off.

    A trace would record a reentrant checkpoint as a forward without gradients, and inference mode not at all.
    """
    used: list[str] = []
    around = checkpoint._checkpoint_without_reentrant_generator

    def note(function: Any) -> None:
        used.append(getattr(function, "__qualname__", type(function).__qualname__))

    class Direct:
        """Calls a function directly, in place of `CheckpointFunction`."""

        @staticmethod
        def apply(function: Any, preserve_rng_state: bool, *args: Any) -> Any:
            note(function)
            return function(*args)

    def noted(function: Any, *args: Any, **kwargs: Any) -> Any:
        note(function)
        return around(function, *args, **kwargs)

    def enter(mode: Any) -> None:
        mode._inference_mode_context = torch.is_grad_enabled()
        torch.set_grad_enabled(not mode.mode)

    def leave(mode: Any, *_: object) -> None:
        torch.set_grad_enabled(mode._inference_mode_context)

    inference = patch.multiple(torch.inference_mode, __enter__=enter, __exit__=leave)
    direct = patch.multiple(checkpoint, CheckpointFunction=Direct, _checkpoint_without_reentrant_generator=noted)
    with direct, inference:
        yield used

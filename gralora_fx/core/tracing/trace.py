"""`trace`: from any kind of model to a clean graph over its own parameters, with its repeated blocks."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import fx, nn
from transformers import PreTrainedModel

from gralora_fx.base.patches import ONE_TRACE
from gralora_fx.base.progress.stages import gc_pause, quiet
from gralora_fx.base.sources.lazy_tensors import is_lazy
from gralora_fx.core.graph.module_tree import ModuleTree, is_within
from gralora_fx.core.graph.out_of_reach import layers_of
from gralora_fx.core.graph.surgery import ROOT, placeholder_parameters, restore_parameters
from gralora_fx.core.tracing.capture import features_as_nodes, has_own_code, trace_both_modes
from gralora_fx.core.tracing.check import with_call_signature
from gralora_fx.core.tracing.draft import NO_CHECKPOINTS, AppendedModules, Captured, Draft, called_as, first_draft
from gralora_fx.core.tracing.inputs.arguments import example_arguments
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.errors import TraceError, an, option, warn_caller

if TYPE_CHECKING:
    from gralora_fx.core.graph.checkpointing import Checkpointing

_LIST = "torch.nn.modules.container.ModuleList"
_CONTAINERS = (_LIST, "torch.nn.modules.container.Sequential")


def blocks_of(flat: fx.GraphModule, tree: ModuleTree, patterns: Sequence[str] | None) -> tuple[str, ...]:
    """Return the paths of a graph's blocks: the modules that patterns name, or for None repeated ones that can be."""
    if patterns is None:
        return _repeated_blocks(flat, tree)
    if not patterns:
        return ()
    from gralora_fx.core.tracing.named_blocks import named_blocks

    return named_blocks(flat, tree, patterns)


def _repeated_blocks(flat: fx.GraphModule, tree: ModuleTree) -> tuple[str, ...]:
    """Return the outermost repeated modules that can be blocks; inside one that cannot, those that can."""
    candidates = repeated_modules(tree)
    if not candidates:
        return ()
    from gralora_fx.core.graph.block_calls import callable_blocks

    blocks, refused = [""], set[str]()
    while blocks:
        left = [path for path in candidates if path not in refused]
        blocks = [path for path in left if not any(o != path and is_within(path, o) for o in left)]
        found, reasons = callable_blocks(flat, blocks)
        if not reasons:
            return tuple(found)
        refused |= reasons.keys()
    return ()


def repeated_modules(tree: ModuleTree) -> tuple[str, ...]:
    """Return the modules with submodules that a `ModuleList` (even of one) or `Sequential` repeats, at equal places."""
    parents = {path.rpartition(".")[0] for path in tree.types if path}
    members = collections.Counter(path.rpartition(".")[0] for path in tree.types if path)
    alike: dict[tuple[str, str], list[str]] = {}
    for path, kind in tree.types.items():
        parent, _, name = path.rpartition(".")
        if name.isdigit() and path in parents and tree.types.get(parent, _LIST) in _CONTAINERS:
            place = ".".join("*" if part.isdigit() else part for part in path.split("."))
            alike.setdefault((place, kind), []).append(path)
    repeated = set[str]()
    for paths in alike.values():
        parent = paths[0].rpartition(".")[0]
        if len(paths) > 1 or (members[parent] == 1 and tree.types.get(parent) == _LIST):
            repeated |= set(paths)
    return tuple(path for path in tree.types if path in repeated)


@contextmanager
def _apart() -> Iterator[None]:
    """Trace as outside of the caller's `inference_mode`, `autocast` and `torch.device("meta")`, one model at a time."""
    with ExitStack() as undone:
        undone.enter_context(ONE_TRACE)
        undone.enter_context(torch.inference_mode(False))
        for device in filter(torch.is_autocast_enabled, ("cpu", "cuda")):
            undone.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type == "meta":
            undone.enter_context(torch.device("cpu"))
        yield


@_apart()
def trace(
    model: nn.Module | torch.export.ExportedProgram,
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    task: str | None = None,
    dynamic: bool = True,
    sentence_modules: str | Path | None = None,
    image_size: tuple[int, int] | Literal["dynamic"] | None = None,
    blocks: Sequence[str] | None = None,
) -> TracedModel:
    """Trace a model to a `torch.fx` graph over its own parameters.

    The graph is compared with the eager model in evaluation mode on a padded sample before it is returned. A model on
    the meta device can be traced too, but has no values to compare.

    Args:
        model: A transformers model, any module, a `GraphModule` (symbolic or exported), or an `ExportedProgram`.
        example_inputs: Keyword arguments as a dict, or positional ones as a tuple. Tensors, and lists, tuples, dicts
            and dataclasses of them, become inputs; every other argument, given or not, becomes part of the graph with
            its value, and a call with another value is refused. One row is enough, and for a transformers model one
            token: batch and sequence stay dynamic nevertheless, and a padding mask stays an input. A further axis of
            size 1 of another model's input is fixed, with a warning.
        kwargs: Keyword arguments beside a tuple, as in `torch.export.export(model, args, kwargs)`.
        task: One of optimum's task names; example inputs are generated from the model's configuration if none are
            given.
        dynamic: Whether axes may vary; False fixes every size to the example's.
        sentence_modules: For `task="sentence-similarity"`: a directory or hub id whose `modules.json` lists the modules
            after the transformer, such as an adapter's; None for the source that the model was loaded from.
        image_size: For a model that takes images: a height and a width to trace with, or `"dynamic"` for images of any
            size. A model with a table of positions then interpolates it (`interpolate_pos_encoding`). None allows any
            size if the model does without further arguments, else only the example's (see `signature.image_sizes`).
        blocks: Paths or patterns of the modules that are blocks of the rewritten model, which gradient checkpointing
            recomputes and `fully_shard` takes; `*` stands for one part of a path, as in `"encoder.layers.*"`. None
            finds the repeated ones: members of one class of a `ModuleList` or `Sequential`.

    Returns:
        The traced model, in the model's mode.

    Raises:
        TraceError: The model cannot be traced (the message names the place), or not for images of any size as
            requested; or inputs are missing or do not fit.
    """
    arguments = None if example_inputs is None and kwargs is None else example_arguments(example_inputs, kwargs)
    appended = _appended_modules(model, task, sentence_modules)
    if isinstance(model, (fx.GraphModule, torch.export.ExportedProgram)):
        if image_size is not None:
            raise TraceError(
                "image_size has no effect on a graph, which was traced for the sizes that it takes; leave it out"
            )
        from gralora_fx.core.tracing.ready_graphs import trace_ready_graph, tree_of

        draft = trace_ready_graph(model, arguments, task)
        return _with_layers(draft, tree_of(draft), blocks, training=not draft.evaluates)
    if isinstance(model, TracedModel) or isinstance(getattr(model, "traced", None), TracedModel):
        raise TraceError(
            f"the {type(model).__name__} is traced already; trace its source model again, or use it as it is"
        )
    if not isinstance(model, nn.Module):
        raise TraceError(f"cannot trace {an(type(model).__name__)}; give an nn.Module, GraphModule or ExportedProgram")
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        raise TraceError(
            f"the {type(model).__name__} holds weights that bitsandbytes quantized, whose products cannot be traced; "
            "load it with gralora_fx.loading.load_model, which takes their values, or trace model.dequantize()"
        )
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if inferred := [name for name, tensor in tensors if tensor.is_inference()]:
        raise TraceError(
            f"{inferred[0]} of the {type(model).__name__} was made under torch.inference_mode, so it can never train; "
            "make the model outside of it, or trace copy.deepcopy(model)"
        )
    _check_names(model)
    model = _form_of(model, task)
    with ExitStack() as changed:
        if appended is not None:
            changed.enter_context(appended.appended_to(model))
        with placeholder_parameters(model) as originals, gc_pause():
            with features_as_nodes(model) if originals else nullcontext():  # grouped products take no placeholders
                first = first_draft(
                    model,
                    arguments,
                    task=task,
                    dynamic=dynamic,
                    appended=appended,
                    options={} if image_size is None else {"image_size": image_size},
                    has_values=all(map(is_lazy, originals.values())),
                )
            with called_as(first):
                draft = with_call_signature(_checked(first))
            if originals:
                restore_parameters(draft.graph_module, originals)
        # appended modules are still among the model's modules
        traced = _with_layers(draft, ModuleTree.of_module(model), blocks, training=model.training)
    return dataclasses.replace(
        traced, source=Draft(**{f.name: getattr(draft, f.name) for f in dataclasses.fields(Draft)})
    )


def _check_names(model: nn.Module) -> None:
    """Refuse names in the model itself that its graph module has for other things."""
    of_graphs = {*dir(fx.GraphModule({}, fx.Graph())), "_in_spec", "_out_spec"}.difference(dir(nn.Module()))
    tensors = {*model._parameters, *model._buffers}
    if taken := (of_graphs & {*model._modules, *tensors}) | ({"self", ROOT} & tensors):
        name = min(taken)
        raise TraceError(
            f"{name!r} of the {type(model).__name__} has a name that graphs have for something of their own; rename "
            f"it, or trace nn.Sequential(model), in which it is '0.{name}'"
        )


def _form_of(model: nn.Module, task: str | None) -> nn.Module:
    """Return the model that is traced: for some, the form that a feature gives it for a task, over its modules."""
    if isinstance(model, PreTrainedModel) and task is not None:
        from gralora_fx.base.features import parts

        for form_of in parts("traced forms", {model.config.model_type}):
            model = form_of(model, task)
    return model


def _appended_modules(model: object, task: str | None, source: str | Path | None) -> AppendedModules | None:
    """Return the modules that a task appends to a model, or None."""
    if task is None and source is None:
        return None
    from gralora_fx.base.features import parts

    for modules_of in parts("appended modules", {task or ""}):
        appended: AppendedModules = modules_of(model, task, source)
        return appended
    if source is not None:
        raise TraceError(
            f"sentence_modules have no effect for the task {task!r}; give {option(task='sentence-similarity')}"
        )
    return None


def _checked(draft: Draft) -> Captured:
    """Capture and check a model for both modes, or leave that to the feature that knows its inputs."""
    if has_own_code(draft.model):
        from gralora_fx.base.features import parts

        for own_trace in parts("own traces", draft.sample):
            captured: Captured = own_trace(draft)
            return captured
    return trace_both_modes(draft)


def _with_layers(draft: Captured, tree: ModuleTree, blocks: Sequence[str] | None, *, training: bool) -> TracedModel:
    """Return the traced model of a checked draft: its linear layers, and facts about the source model."""
    model, config, loss = draft.model, None, None
    if isinstance(model, PreTrainedModel):
        config = model.config
        with (
            quiet()
        ):  # of a class that is not named after its loss, transformers logs that its configuration names none
            loss = getattr(model, "loss_function", None)
    found = blocks_of(draft.graph_module, tree, blocks)
    traced = TracedModel(
        draft.graph_module,
        tree=tree,
        example_inputs={**draft.sample, **draft.constants},
        signature=draft.signature,
        **layers_of(draft.graph_module, tree)._asdict(),
        task=draft.task,
        config=config,
        generation_config=getattr(model, "generation_config", None) if config is not None else None,
        tokenizer_source=getattr(config, "_name_or_path", None) or None,
        loss_function=loss,
        shift_labels=getattr(model, "prepare_decoder_input_ids_from_labels", None),
        appended=draft.appended,
        passes=draft.passes,
        blocks=found,
        checkpointing=_checkpointing_of(model, found),
    )
    return traced.train(training)


def _checkpointing_of(model: nn.Module | torch.export.ExportedProgram, blocks: Sequence[str]) -> Checkpointing | None:
    """Return how a model recomputes its blocks in the backward pass, for the rewritten model to do the same."""
    parts = model.named_modules() if isinstance(model, nn.Module) else ()
    checkpointed = {path: part for path, part in parts if getattr(part, "gradient_checkpointing", False) is True}
    if not checkpointed:
        return None
    if not blocks:
        warn_caller(f"{NO_CHECKPOINTS}; the trace found no blocks, which its argument blocks names")
        return None
    places = [index for index, path in enumerate(blocks) if path in checkpointed]
    every = places[1] - places[0] if len(places) > 1 else 1
    from gralora_fx.core.graph import checkpointing

    function = getattr(next(iter(checkpointed.values())), "_gradient_checkpointing_func", None)
    given: dict[str, Any] = getattr(function, "keywords", {})
    return checkpointing.Checkpointing(every, tuple(sorted({"use_reentrant": False, **given}.items())))

"""A model's adapters as files in PEFT's format, gathered from processes or sharded over them, and their base."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from gralora_fx.base.sources.atomic_save import save_together
from gralora_fx.base.sources.lazy_tensors import values_of
from gralora_fx.base.sources.safetensors_files import are_same
from gralora_fx.base.sources.same_base import BaseComparison, compare_bases, is_embedding
from gralora_fx.core.adapters.adapter import ModelAdapter, checkpoint_parameters
from gralora_fx.core.adapters.adapter_files import SAVED_COPY, adapter_writers, read_adapter
from gralora_fx.core.adapters.adapter_graph import AdapterGraph
from gralora_fx.core.adapters.base import base_of, is_sharded
from gralora_fx.core.adapters.model_card import CARD_NAME, write_card
from gralora_fx.core.adapters.saved_embeddings import check_vocabulary, training
from gralora_fx.core.adapters.saved_form import saved_config
from gralora_fx.core.config import AdapterConfig
from gralora_fx.core.config.checks import KEY_PREFIX, check_adapter_name
from gralora_fx.core.graph.module_tree import ModuleTree
from gralora_fx.core.methods.arrays import to_numpy
from gralora_fx.core.planning.planner import planned_for
from gralora_fx.core.planning.rewrite_plan import RewritePlan
from gralora_fx.core.planning.targets import trains_whole_at
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.errors import CheckpointError, ConfigError, bulleted, command, warn_caller


def base_names(keys: Iterable[str]) -> set[str]:
    """Return the base's parameter names for keys of PEFT's file that hold copies of parameters."""
    return {key.removeprefix(KEY_PREFIX).replace(".base_layer.", ".") for key in keys}


def save_adapters(
    state: AdapterGraph,
    adapters: Mapping[str, ModelAdapter],
    directory: str | Path,
    model: nn.Module,
    *,
    is_main_process: bool,
    state_dict: Mapping[str, Tensor] | None,
) -> None:
    """Write a model's adapters, one folder each; if they are sharded, all processes gather and one writes."""
    is_distributed = any(is_sharded(adapter.parameters()) for adapter in adapters.values())
    if state_dict is not None and is_distributed:  # Accelerate has gathered it, and one process calls this
        if is_main_process:
            whole = {name: _whole_tensors(adapter, state_dict) for name, adapter in adapters.items()}
            _write_adapters(adapters, whole, directory, state.base.traced, model)
        return
    for adapter in adapters.values() if state_dict is not None else ():
        check_state_dict(adapter, state_dict or {})
    reshard(model)
    tensors = {name: gathered(checkpoint_parameters(adapter)) for name, adapter in adapters.items()}
    if is_main_process and (is_writer() or not is_distributed):
        _write_adapters(adapters, tensors, directory, state.traced, model)


def load_adapter(
    state: AdapterGraph, directory: str | Path, name: str, *, revision: str | None, strict_base: bool
) -> None:
    """Load a saved adapter into the model's adapter of that name and configuration, or into a new one."""
    config, tensors = read_adapter(directory, revision=revision)
    config, tensors = _with_own_embeddings(config, tensors, state.traced.tree, directory)
    base = settled_base(config, state.traced, directory, strict=strict_base)
    planned = planned_for(state.traced, config)
    if name in state.adapters:
        with state.writing():
            state.check_not_merged("load tensors")
            _check_same_config(state[name], planned)
            load_tensors(state[name], tensors, state.traced.tree, str(directory))
    else:
        check_adapter_name(name)
        state.add(name, planned)
        try:
            load_tensors(state[name], tensors, state.traced.tree, str(directory))
        except CheckpointError:
            state.discard(name)
            raise
    state.note_base(name, base)


def _check_same_config(adapter: ModelAdapter, other: RewritePlan) -> None:
    mine, theirs = (
        {planned.site.path: (planned.sizes, planned.scale) for planned in chosen.selected}
        for chosen in (adapter.plan, other)
    )
    if mine != theirs or adapter.plan.saved_modules != other.saved_modules:
        raise ConfigError(
            f"adapter {adapter.name!r} exists with another configuration; delete it first or load under another name"
        )


def load_tensors(adapter: ModelAdapter, tensors: Mapping[str, Tensor], tree: ModuleTree, origin: str) -> None:
    """Copy a checkpoint's tensors into an adapter, all or none."""
    expected = checkpoint_parameters(adapter)
    tensors, extra = _match_keys(tensors, expected, tree)
    problems = [f"missing {key}" for key in expected if key not in tensors] + extra
    for key, tensor in tensors.items():
        target = expected[key]
        if not isinstance(target, nn.Parameter):
            problems.append(f"{key} is the result of a parametrization here, which cannot be written")
        elif tensor.shape != target.shape:
            shapes = f"{list(tensor.shape)} instead of {list(target.shape)}"
            problems.append(f"{key} has shape {shapes}{_stack_at(adapter, target)}")
        elif not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            problems.append(f"{key} is {tensor.dtype}, not a float tensor")
        elif not bool(torch.isfinite(tensor.to(target.dtype)).all()):
            problems.append(f"{key} holds values that are not finite")
    if problems:
        raise CheckpointError(
            f"{origin} does not fit the adapter {adapter.name!r}; check its configuration and base model:\n"
            f"{bulleted(problems)}"
        )
    with torch.no_grad():
        for key, parameter in expected.items():
            parameter.copy_(as_sharded(tensors[key], parameter))


def _stack_at(adapter: ModelAdapter, tensor: Tensor) -> str:
    """Describe the stack of matrices at a tensor's site, for a message; empty if there is none."""
    sites = (p for p in adapter.plan.selected if any(own is tensor for own in adapter.factors[p.site.path]))
    planned = next(sites, None)
    if planned is None or planned.stack is None:
        return ""
    widths = f"{planned.site.in_features} -> {planned.site.out_features}"
    return f": {planned.site.path} has {planned.stack} matrices of {widths}, and the rank is {planned.r}"


def check_state_dict(adapter: ModelAdapter, state_dict: Mapping[str, Tensor]) -> None:
    """Check that a state dict holds the adapter's current values."""
    for path, parameter in adapter.named_parameters():
        tensor = state_dict.get(f"graph_module.{path}")
        if tensor is None or tensor.shape != parameter.shape or not torch.equal(tensor.to(parameter), parameter):
            raise CheckpointError(
                f"the state dict has {'no' if tensor is None else 'other values of'} graph_module.{path}; load it into "
                "the model first, or leave state_dict out"
            )


def _whole_tensors(adapter: ModelAdapter, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an adapter's tensors from a state dict of whole tensors, by PEFT's keys."""
    names = {id(parameter): f"graph_module.{path}" for path, parameter in adapter.named_parameters()}
    found = {key: names[id(parameter)] for key, parameter in checkpoint_parameters(adapter).items()}
    if missing := sorted(set(found.values()) - state_dict.keys()):
        raise CheckpointError(f"the state dict has no {missing[0]}; leave state_dict out, in every process")
    return {key: state_dict[name] for key, name in found.items()}


def _write_adapters(
    adapters: Mapping[str, ModelAdapter],
    tensors: Mapping[str, Mapping[str, Tensor]],
    directory: str | Path,
    traced: TracedModel,
    model: nn.Module,
) -> None:
    """Write adapters in PEFT's format, and their card, all or none.

    What means another thing there, or nothing, becomes a list of adapted layers: `all-linear`, as PEFT expands it, and
    targets with `exclude_modules`, which PEFT does not know.
    """
    configs = {name: saved_config(adapter, traced) for name, adapter in adapters.items()}
    writers = {name: adapter_writers(config, partial(dict, tensors[name])) for name, config in configs.items()}
    if writers:
        tags = [*([] if traced.config is None else ["transformers"]), *(getattr(model, "model_tags", None) or ())]
        card = partial(write_card, config=next(iter(configs.values())), tags=tags, directory=directory)
        writers[""] = {CARD_NAME: card, **writers.get("", {})}
    save_together(directory, writers, CheckpointError)
    for adapter in adapters.values():
        patterns = [name for name in adapter.config.used_patterns if name in adapter.config.BEYOND_PEFT]
        if adapter.config.target_parameters and not adapter.method.NESTS_PARAMETERS:
            warn_caller(
                f"adapter {adapter.name!r} has target_parameters, which PEFT's {adapter.config.TITLE} does not read: "
                f"what was saved loads here, but not in PEFT; {command('to_lora')} makes a LoRA of it, exactly, which "
                "PEFT loads"
            )
        if patterns:
            warn_caller(
                f"adapter {adapter.name!r} has {', '.join(patterns)}, which PEFT's {adapter.config.TITLE} does not "
                "read: what was saved loads here, but not in PEFT; a sum of it alone, "
                f"add_weighted_adapter([{adapter.name!r}], [1.0], <name>), needs none"
            )


def _match_keys(
    tensors: Mapping[str, Tensor], expected: Container[str], tree: ModuleTree
) -> tuple[dict[str, Tensor], list[str]]:
    """Match a file's tensors with the keys that an adapter expects, and describe those that do not fit.

    PEFT stores twice the weight of an adapted head, and with `bias="all"` the biases of a saved module: the base's
    below `original_module`, the trained ones below `modules_to_save`.
    """
    matched = {key: tensor for key, tensor in tensors.items() if key in expected}
    problems = []
    for key, tensor in tensors.items():
        if key in expected:
            continue
        short = (key.replace(".modules_to_save.", ".", 1), SAVED_COPY.sub(".", key, count=1))
        target = next((name for name in short if name in expected), None)
        if target is None:
            name = key.removeprefix(KEY_PREFIX).replace(".base_layer.", ".").replace(".original_module.", ".")
            base = tree.parameters.get(name)
            if base is None:
                problems.append(f"unexpected {key}")
            elif not _repeats(tensor, values_of(base, name)):
                problems.append(f"unexpected {key}, whose values are not those of the base's {name}")
        elif not _repeats(tensor, matched.setdefault(target, tensor)):
            problems.append(f"unexpected {key}, whose values are not those of {target}")
    return matched, problems


def _with_own_embeddings(
    config: AdapterConfig, tensors: Mapping[str, Tensor], tree: ModuleTree, adapter: object
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Return a file's configuration, which trains saved embeddings that are not the base's, and its other tensors."""
    own, same = [], set()
    for key, tensor in tensors.items():
        name = key.removeprefix(KEY_PREFIX)
        base = tree.parameters.get(name)
        if base is None or not is_embedding(name):
            continue
        module = key.rpartition(".")[0]
        is_adapted = any(other.startswith(f"{module}.") for other in tensors if other != key)
        if is_adapted or trains_whole_at(name.rpartition(".")[0], config.saved_module_names):
            continue
        check_vocabulary(name, tensor.shape, base.shape, adapter)
        if _repeats(tensor, values_of(base, name)):
            same.add(key)
        else:
            own.append(name)
    return training(config, own, adapter), {key: tensor for key, tensor in tensors.items() if key not in same}


def _repeats(tensor: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are the same values, perhaps in two dtypes."""
    return are_same(to_numpy(tensor), to_numpy(other))


# -- the base that an adapter was made for --------------------------------------------------------------------------


def settled_base(config: AdapterConfig, traced: TracedModel, directory: str | Path, *, strict: bool) -> BaseComparison:
    """Compare an adapter's base with a traced model; warn or raise if they are not known to be the same."""
    compared = compare_bases(config.made_for, base_of(traced))
    compared.settle(directory, strict=strict, error=CheckpointError)
    return compared


def reshard(model: nn.Module) -> None:
    """Reshard tensors that FSDP2 left gathered after a forward pass without a backward pass."""
    if (shards := getattr(model, "reshard", None)) is not None:
        shards()


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return whole tensors by name; if one is sharded, every process must make this call, in the same order."""
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in tensors.items()}


def is_writer() -> bool:
    """Return whether this process writes what all of them hold: the first one does."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def as_sharded(values: Tensor, like: Tensor) -> Tensor:
    """Return values sharded like another tensor; unchanged if it is not sharded."""
    if not is_sharded([like]):
        return values
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(values.to(like.device, like.dtype), like.device_mesh, like.placements, src_data_rank=None)

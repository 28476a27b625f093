"""Models with weights left in safetensors files, read by lazy parameters."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gralora_fx.base.compat.transformers_models import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    get_model_conversion_mapping,
    rename_source_key,
)
from gralora_fx.base.sources.lazy_tensors import EntrySource, note_stored, with_source
from gralora_fx.base.sources.packed_tensors import PackedTensor, packed_tensors
from gralora_fx.base.sources.safetensors_files import FLOATS, StoredTensor
from gralora_fx.base.sources.saved_weights import SavedWeights
from gralora_fx.errors import CheckpointError, bulleted

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class StackPart(NamedTuple):
    """A stored tensor that holds rows of one matrix of a stack."""

    key: str
    matrix: int  # the matrix's index in the stack
    start: int  # its first row in that matrix: the up projection begins below the gate


def stack_parts(
    model: PreTrainedModel, stored: Mapping[str, StoredTensor], parts: Mapping[str, str]
) -> dict[str, tuple[StackPart, ...]]:
    """Return the stored tensors of each parameter that transformers stacks from matrices, by parameter name.

    Parameters that transformers builds in other ways are left out.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    found: dict[str, dict[str, tuple[int, int]]] = {}  # key to its matrix and its row group
    for key, name in parts.items():
        _, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, model.state_dict())
        converter = next(entry for entry in converters if pattern in entry.source_patterns)
        numbers = _NUMBER.findall(key)
        place = converter.source_patterns.index(pattern) if _stacks_rows(converter) and numbers else -1
        found.setdefault(name, {})[key] = int(numbers[-1]) if numbers else 0, place
    return {
        name: tuple(StackPart(key, index, _start(keys, index, place, stored)) for key, (index, place) in keys.items())
        for name, keys in found.items()
        if all(place >= 0 for _, place in keys.values())
    }


def _stacks_rows(converter: WeightConverter) -> bool:
    """Return whether a converter stacks matrices, each made of the rows of several tensors in order."""
    first, *rest = converter.operations
    is_stack = isinstance(first, MergeModulelist) and first.dim == 0
    return is_stack and all(isinstance(entry, Concatenate) and entry.dim == 1 for entry in rest) and len(rest) < 2


def _start(keys: Mapping[str, tuple[int, int]], index: int, place: int, stored: Mapping[str, StoredTensor]) -> int:
    before = [key for key, (other, at) in keys.items() if other == index and at < place]
    return sum(stored[key].shape[0] for key in before)


def empty_model(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """Create a model with parameters on the meta device; buffers, such as rotary frequencies, have values."""
    with _parameters_on_meta():
        model = make()
    return model.eval()


def attach_shards(model: PreTrainedModel, weights: SavedWeights, supplied: Set[str] = frozenset()) -> PreTrainedModel:
    """Connect the parameters of an empty model to their values in safetensors files.

    Keys are renamed as transformers does when loading. Persistent buffers are read immediately.
    """
    tensors = by_parameter_name(model, as_in_layers(model, weights.tensors))
    problems: list[str] = []
    names: dict[int, list[str]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        names.setdefault(id(parameter), []).append(name)
    for same in names.values():
        name = next((name for name in same if name in tensors), None)
        unfit = [f"missing {same[0]}"] if name is None else _unfit(name, tensors[name], parameters[name])
        if name is None or (unfit and not supplied.isdisjoint(same)):
            with_source(parameters[same[0]], functools.partial(torch.zeros, parameters[same[0]].shape))
        else:
            with_source(parameters[name], tensors[name])
            _note_form(parameters[name], tensors[name])
        problems += unfit if supplied.isdisjoint(same) else []
    persistent = model.state_dict().keys()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in tensors:
                buffer.copy_(tensors[name]())
            elif name in persistent and buffer.is_floating_point():
                problems.append(f"missing {name}")
    if problems:
        raise CheckpointError(
            f"{weights.directory} cannot be streamed into {type(model).__name__}; load it whole instead:\n"
            f"{bulleted(problems)}"
        )
    return model


def note_forms(model: PreTrainedModel, stored: Mapping[str, StoredTensor]) -> None:
    """Note the quantized tensor that each of a loaded model's parameters was read from, if exports keep its form."""
    keys, _ = keys_by_name(model, stored)
    for name, parameter in model.named_parameters():
        if name in keys:
            _note_form(parameter, stored[keys[name]])


def _note_form(parameter: nn.Parameter, stored: StoredTensor | StackedMatrices) -> None:
    """Note a quantized tensor; of a stack, one of its matrices."""
    stored = stored.first if isinstance(stored, StackedMatrices) else stored
    if isinstance(stored, PackedTensor) and stored.quantization.is_kept:
        note_stored(parameter, stored)


def keys_by_name(model: PreTrainedModel, keys: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Map names of the model to keys of its files as transformers does when loading, and keys of parts to names."""
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    model_keys = model.state_dict()
    prefix = model.base_model_prefix
    by_name: dict[str, str] = {}
    parts: dict[str, str] = {}
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters, prefix, model_keys)
        if name not in model_keys and key in model_keys:
            name, pattern = rename_source_key(key, [], [], prefix, model_keys)
        if pattern is not None and name in model_keys:
            parts[key] = name
        by_name[name] = key
    return by_name, parts


def as_in_layers(model: PreTrainedModel, stored: Mapping[str, StoredTensor]) -> Mapping[str, StoredTensor]:
    """Return a model's tensors by key; quantized ones of `Conv1D` layers are transposed, being stored `[out, in]`."""
    if next(packed_tensors(stored), None) is None:
        return stored
    names = model.state_dict().keys()
    turned = {
        key: tensor.turned()
        for name, key in keys_by_name(model, stored)[0].items()
        if isinstance(tensor := stored[key], PackedTensor)
        and name in names
        and isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D)
    }
    return {**stored, **turned}


@dataclass(frozen=True)
class StackedMatrices(EntrySource):
    """A stack of matrices that are separate tensors in the files, read one by one."""

    shape: tuple[int, ...]
    dtype: str  # safetensors' name of its dtype
    file: Path  # the file of its first part, for messages
    first: StoredTensor  # its first part

    @classmethod
    def of(cls, parts: Sequence[StackPart], stored: Mapping[str, StoredTensor], name: str) -> StackedMatrices:
        """Build the parameter from its parts."""
        matrices: dict[int, list[StoredTensor]] = {}
        for part in sorted(parts, key=lambda part: (part.matrix, part.start)):
            matrices.setdefault(part.matrix, []).append(stored[part.key])
        shapes = {(sum(t.shape[0] for t in tensors), *tensors[0].shape[1:]) for tensors in matrices.values()}
        if len(shapes) > 1 or sorted(matrices) != list(range(len(matrices))):
            raise CheckpointError(f"the matrices of {name} are incomplete, or differ in shape; save the model again")
        first = matrices[0][0]

        def entries() -> Iterator[Tensor]:
            return (torch.cat([tensor() for tensor in tensors]) for tensors in matrices.values())

        return cls(entries, (len(matrices), *shapes.pop()), first.dtype, first.file, first)


def by_parameter_name(
    model: PreTrainedModel, stored: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor | StackedMatrices]:
    """Return stored tensors by the model's parameter names."""
    keys, parts = keys_by_name(model, stored)
    stacks = stack_parts(model, stored, parts) if parts else {}
    parts = {key: name for key, name in parts.items() if name not in stacks}
    if parts:
        texts = [f"{key} is a part of {name}" for key, name in parts.items()]
        shown = "; ".join(texts[:3]) + (f"; and {len(texts) - 3} more" if len(texts) > 3 else "")
        raise CheckpointError(
            f"{type(model).__name__} puts parameters together from several tensors of its files ({shown}), which "
            "cannot be streamed; load the model whole instead"
        )
    whole = {name: stored[key] for name, key in keys.items() if name not in stacks}
    return {**whole, **{name: StackedMatrices.of(of_name, stored, name) for name, of_name in stacks.items()}}


def _unfit(name: str, stored: StoredTensor | StackedMatrices, parameter: nn.Parameter) -> list[str]:
    if stored.shape != tuple(parameter.shape):
        return [f"{name} has shape {list(stored.shape)} in {stored.file.name} instead of {list(parameter.shape)}"]
    if stored.dtype not in FLOATS:
        return [f"{name} is {stored.dtype} in {stored.file.name}, not a float tensor; it may be quantized"]
    return []


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Let modules created in the block register parameters on the meta device; tied ones stay tied."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        original(module, name, param)

    nn.Module.register_parameter = register  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]

"""Stacked matrices in files that store each apart: which tensor is which part of which parameter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from transformers import PreTrainedModel

from gralora_fx.base.compat.transformers_models import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    get_model_conversion_mapping,
    rename_source_key,
)
from gralora_fx.base.sources.safetensors_files import StoredTensor

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class StackPart(NamedTuple):
    """A tensor of the files that holds rows of one matrix of a stack.

    Attributes:
        key: Its key.
        matrix: Its place in the stack.
        start: The first of its rows in that matrix, as of the up projection below the gate.
    """

    key: str
    matrix: int
    start: int


def stack_parts(
    model: PreTrainedModel, stored: Mapping[str, StoredTensor], parts: Mapping[str, str]
) -> dict[str, tuple[StackPart, ...]]:
    """The parts of each parameter that transformers stacks from matrices of their own, by the parameter's name.

    Those that it puts together in other ways are left out.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    found: dict[str, dict[str, tuple[int, int]]] = {}  # key to its matrix and the place of its kind among the rows
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
    """Whether a parameter is a stack of matrices, each of them the rows of several tensors in the converter's order."""
    first, *rest = converter.operations
    is_stack = isinstance(first, MergeModulelist) and first.dim == 0
    return is_stack and all(isinstance(entry, Concatenate) and entry.dim == 1 for entry in rest) and len(rest) < 2


def _start(keys: Mapping[str, tuple[int, int]], index: int, place: int, stored: Mapping[str, StoredTensor]) -> int:
    before = [key for key, (other, at) in keys.items() if other == index and at < place]
    return sum(stored[key].shape[0] for key in before)

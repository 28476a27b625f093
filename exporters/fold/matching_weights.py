"""The model's weight that an initializer holds, in other programs' exports too: by name, or by values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gralora_fx.base.sources.base_quantization import BaseQuantization
from gralora_fx.base.sources.model_directories import resolve_directory
from gralora_fx.base.sources.same_base import read_config_fields
from gralora_fx.base.sources.saved_weights import read_weights
from gralora_fx.errors import CheckpointError, MergeError, TraceError
from gralora_fx.exporters.rules.products.initializers import ProductWeight, parameter_names
from gralora_fx.exporters.rules.products.stored_rows import dtype_of, read_rows, rows_and_columns

# Names that onnxruntime-genai's builder gives to the parts of a path, beside those of transformers.
_SYNONYMS = {"self_attn": "attn", "self_attention": "attn", "attention": "attn"}
_FILLERS = ("MatMul", "Gemm")
# Weights that are stored as one under a new name, in this order.
_JOINT = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_ALIKE = (("k_proj", "v_proj"), ("gate_proj", "up_proj"))  # projections of equal width
_WEIGHT = ".weight"
_TABLES = ("embed_tokens", "wte", "word_embeddings", "shared", "embed_in", "tok_embeddings")
_READ_AT_ONCE = 2**22  # bytes


def foreign_names(value: ir.Value) -> list[tuple[str, ...]]:
    """Return the parameters that another exporter's initializer may hold, as `parameter_names`, names `reduced`."""
    readings = []
    for names in parameter_names(value):
        last = names[0].removesuffix(_WEIGHT).split(".")
        while last and last[-1] in _FILLERS:
            last.pop()
        if len(names) == 1 and last and last[-1] in _JOINT:
            owner = ".".join(last[:-1])
            readings.append(tuple(reduced(f"{owner}.{part}{_WEIGHT}") for part in _JOINT[last[-1]]))
        readings.append(tuple(map(reduced, names)))
    return readings


def reduced(name: str) -> str:
    """Return a parameter's name without the parts that exporters change: the operator's name, `self_attn` or `attn`."""
    parts = [_SYNONYMS.get(part, part) for part in name.split(".") if part not in _FILLERS]
    return ".".join(parts)


def ranges(names: Sequence[str], total: int, width_of: Callable[[str], int | None]) -> Iterator[tuple[int, int]]:
    """Yield the first and last output feature of each part of an initializer; nothing if widths are unknown."""
    widths = dict(zip(names, _widths(names, total, width_of), strict=True))
    if len(widths) < len(names) or sum(width or total for width in widths.values()) != total:
        return
    start = 0
    for name in names:
        stop = start + (widths[name] or 0)
        yield start, stop
        start = stop


def _widths(names: Sequence[str], total: int, width_of: Callable[[str], int | None]) -> list[int | None]:
    """Return the known widths, and those that follow from the total or from a projection of equal width."""
    widths: dict[str, int | None] = {name: width_of(name) for name in names}
    twins = _twins(names)
    for name, other in twins.items():
        widths[name] = widths[name] or widths[other]
    unknown = [name for name, width in widths.items() if width is None]
    rest = total - sum(width or 0 for width in widths.values())
    is_pair = len(unknown) == 2 and twins.get(unknown[0]) == unknown[1]
    if len(unknown) == 1 or is_pair:
        widths |= dict.fromkeys(unknown, rest // len(unknown) if rest > 0 else None)
    return [widths[name] for name in names]


def _twins(names: Sequence[str]) -> Mapping[str, str]:
    """Map each part to the part of equal width, if it has one."""
    layers = {name.removesuffix(_WEIGHT).rpartition(".")[2]: name for name in names}
    pairs = [(layers[a], layers[b]) for a, b in _ALIKE if a in layers and b in layers]
    return {one: other for pair in pairs for one, other in (pair, pair[::-1])}


class BaseWeights:
    """The safetensors files of a base model; a tensor is read on demand."""

    def __init__(self, base: str | Path, rounding: BaseQuantization | None = None) -> None:
        self._rounding = rounding
        self.directory = resolve_directory(base, CheckpointError)
        self._stored = read_weights(self.directory).tensors
        config = read_config_fields(self.directory) or {}
        self._is_tied = bool(config.get("tie_word_embeddings", True))

    def weight(self, path: str, features: tuple[int, int]) -> NDArray[Any]:
        """Return the weight `[out, in]` of a layer."""
        inputs, outputs = features
        key = self._key(f"{path}.weight", outputs)
        if key is None:
            raise MergeError(f"{self.directory} holds no {path}.weight; give the base model of the adapter")
        values = self._stored[key].array()
        if tuple(values.shape) == (outputs, inputs):
            return self._as_exported(path, values)
        if tuple(values.shape) == (inputs, outputs):  # transformers' Conv1D
            return self._as_exported(path, values.T)
        raise MergeError(
            f"{key} of {self.directory} has shape {list(values.shape)}, but the adapter is for a layer of {inputs} "
            f"inputs and {outputs} outputs; give the base model of the adapter"
        )

    def equal_to(self, path: str, features: tuple[int, int]) -> list[str]:
        """Return the keys of other matrices with the values of a layer's weight."""
        own = self._key(f"{path}.weight", features[1])
        assert own is not None
        alike = [key for key, stored in self._stored.items() if key != own and stored.shape == self._stored[own].shape]
        return [key for key in alike if np.array_equal(self._stored[key].array(), self._stored[own].array())]

    def _as_exported(self, path: str, values: NDArray[Any]) -> NDArray[Any]:
        if self._rounding is None or path not in self._rounded_paths:
            return values
        return self._rounding.rounded(values, f"{self.directory}, {path}.weight")

    @cached_property
    def _rounded_paths(self) -> Set[str]:
        """The layers whose weights are rounded."""
        from gralora_fx.core.loading.models import make_empty  # they import transformers
        from gralora_fx.core.loading.quantized_layers import quantized_layers

        assert self._rounding is not None
        return quantized_layers(make_empty(self.directory, None), self._rounding).keys()

    def _key(self, name: str, outputs: int) -> str | None:
        return self._key_among({key: key for key in self._stored}, name, outputs) or self._key_among(
            self._renamed, name, outputs
        )

    @cached_property
    def _renamed(self) -> Mapping[str, str]:
        """The keys by the names that transformers gives the tensors when it loads the model, without merged parts."""
        from gralora_fx.base.sources.streamed_models import keys_by_name
        from gralora_fx.core.loading.models import make_empty  # it imports transformers

        try:
            model = make_empty(self.directory, None)
        except TraceError:
            return {}
        keys, parts = keys_by_name(model, self._stored)
        return {name: key for name, key in keys.items() if key not in parts}

    def _key_among(self, keys: Mapping[str, str], name: str, outputs: int) -> str | None:
        """Return the key of a weight among keys by their names, or None."""
        if name in keys:
            return keys[name]
        ends = [key for other, key in keys.items() if other.endswith(f".{name}") or name.endswith(f".{other}")]
        if not ends and self._is_tied and name.count(".") == 1:  # a head: its weight is that of the embedding
            names = tuple(f"{table}.weight" for table in _TABLES)
            tables = [key for other, key in keys.items() if other.endswith(names)]
            ends = [key for key in tables if self._stored[key].shape[0] == outputs]
        return ends[0] if len(ends) == 1 else None


def find_values(weights: Iterable[ProductWeight], values: NDArray[Any]) -> Iterator[tuple[ProductWeight, int]]:
    """Yield the float weights that hold a matrix `[out, in]`, each with its first output feature there."""
    outputs, inputs = values.shape
    for weight in weights:
        if weight.storage == "float" and weight.in_features == inputs and weight.out_features >= outputs:
            first = values[:, 0].astype(dtype_of(weight.value))
            starts = _starts(_first_input(weight), first)
            yield from ((weight, start) for start in starts if holds(weight, start, values))


def holds(weight: ProductWeight, start: int, values: NDArray[Any]) -> bool:
    """Return whether a float weight holds `values [out, in]`, rounded to its dtype, from output feature `start` on."""
    stored, first, features = values, start, slice(None)
    if weight.transposed:
        stored, first, features = values.T, 0, slice(start, start + len(values))
    dtype = dtype_of(weight.value)
    _, columns = rows_and_columns(weight.value)
    step = max(1, _READ_AT_ONCE // (columns * dtype.itemsize))
    for row in range(0, len(stored), step):
        part = stored[row : row + step].astype(dtype)
        if not np.array_equal(read_rows(weight.value, first + row, first + row + len(part))[:, features], part):
            return False
    return True


def _first_input(weight: ProductWeight) -> NDArray[Any]:
    if weight.transposed:
        return read_rows(weight.value, 0, 1)[0]  # type: ignore[no-any-return]
    step = max(1, _READ_AT_ONCE // (weight.in_features * dtype_of(weight.value).itemsize))
    rows = range(0, weight.out_features, step)
    parts = [read_rows(weight.value, row, min(row + step, weight.out_features))[:, 0].copy() for row in rows]
    return np.concatenate(parts)


def _starts(row: NDArray[Any], part: NDArray[Any]) -> list[int]:
    """Return the positions at which a vector occurs in another."""
    last = len(row) - len(part) + 1
    candidates: list[int] = np.flatnonzero(row[:last] == part[0]).tolist()
    return [start for start in candidates if np.array_equal(row[start : start + len(part)], part)]

"""An export's weights and settings beside the model's own, value by value: faults too small to show in outputs."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, fx

from gralora_fx.base.compat.torch_graphs import OpOverload, is_mutable, returns_alias
from gralora_fx.base.sources.lazy_tensors import raw_entries, raw_values_of
from gralora_fx.base.sources.rewriting import as_tensor
from gralora_fx.core.graph.linear_calls import tensor_at
from gralora_fx.core.model.gralora_model import GraloraModel
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.exporters.artifact.program_files import write_program_files
from gralora_fx.exporters.kinds.conversion import base_trace, fold_adapters
from gralora_fx.exporters.rules.products.initializers import (
    FOLDED_FROM,
    initializers,
    parameter_names,
    product_weights,
)
from gralora_fx.exporters.rules.products.stored_rows import read_rows, tensor_of
from gralora_fx.exporters.translation.export_graphs import DTYPES
from gralora_fx.format.manifest import Manifest

Models = Mapping[str, ir.Model]
_AT_ONCE = 2**20  # values compared at once
_NOISE = 4e-6  # of a weight's largest value: what two programs may differ by in the sum of a fold
_TINY = 2.0**-25  # half of float16's smallest step
# entries that say how a model was made or loaded, rather than what it is
_UNSAID = {"transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype", "type"}


def differences(
    directory: Path,
    manifest: Manifest,
    model: TracedModel | GraloraModel,
    write_files: Callable[[Path, TracedModel, Models], None],
) -> tuple[str, ...]:
    """Return what an export's files hold otherwise than its model, each in words.

    Every weight under a parameter's name has to be that parameter, rounded as the export's format rounds it, and every
    setting what the model's configuration writes; `write_files` is the export kind's.
    """
    traced = fold_adapters(model, untie=True) if manifest.adapter_inputs is None else base_trace(model)
    models = {path.stem: ir.load(path) for path in sorted(directory.glob("*.onnx"))}
    return (*_settings(directory, models, traced, write_files), *_weights(models, manifest, traced))


def _weights(models: Models, manifest: Manifest, traced: TracedModel) -> Iterator[str]:
    # initializers are called after the graph's: a tied or untied layer's may have another's name there; a companion's
    # are not read in it
    graph_module, read = traced.graph_module, {node.target for node in traced.graph_module.graph.nodes if node.users}
    named = dict(graph_module.named_parameters(remove_duplicate=False))
    named |= {name: of_model for name, of_model in traced.tree.parameters.items() if name not in read}
    written = _written(graph_module)
    parameters = {name: parameter for name, parameter in named.items() if id(parameter) not in written}
    roundings = 1 + sum(entry.rounded_again for entry in manifest.adapters.values())
    kinds = (manifest.quantization, *(companion.quantization for companion in manifest.companions.values()))
    digests = {name: digest for kind in kinds if kind is not None for name, digest in kind.digests.items()}
    seen = set()
    for file, model in models.items():
        products = {id(weight.value): weight for weight in product_weights(model.graph)}
        for value in initializers(model.graph):
            tensor, weight = tensor_of(value), products.get(id(value))
            place = (tensor.path, tensor.offset) if isinstance(tensor, ir.ExternalTensor) else id(tensor)
            names = next((names for names in parameter_names(value) if parameters.keys() >= set(names)), ())
            if not names or place in seen:
                continue
            seen.add(place)
            if value.dtype is None or (weight is None and not value.dtype.is_floating_point()):
                continue  # a table of blocks that a product of another graph reads
            is_named = value.name in names or str(value.name).startswith("_to_copy")
            if not is_named and (weight is None or FOLDED_FROM in value.metadata_props):
                continue  # computed from the parameter, as a gate's tanh
            if weight is None or weight.storage == "float":
                is_same = _is_near(value, names, parameters, roundings, DTYPES[manifest.precision])
            else:
                from gralora_fx.exporters.fold.requantize import is_rounded_from

                readings = _readings([parameters[name] for name in names], names)
                rounded = (reading.to(DTYPES[manifest.precision]).float().numpy() for reading in readings)
                digest = digests.get(weight.name) if roundings == 1 else None
                is_same = is_rounded_from(weight, rounded, digest, is_fresh=roundings == 1)
            if not is_same:
                yield f"{value.name} of {file}.onnx is not the model's weight as the export's format rounds it"


def _written(graph_module: fx.GraphModule) -> set[int]:
    """Return the ids of parameters that calls change, as those of `nn.Embedding(max_norm=1)`; files may be older."""
    found = set()
    for node in graph_module.graph.nodes:
        source = node.args[0] if is_mutable(node.target) and node.args else None
        while isinstance(source, fx.Node) and isinstance(source.target, OpOverload) and returns_alias(source.target):
            source = source.args[0]
        if isinstance(source, fx.Node) and source.op == "get_attr":
            found.add(id(tensor_at(graph_module, str(source.target))))
    return found


def _readings(parameters: Sequence[Tensor], names: Sequence[str]) -> Iterator[Tensor]:
    """Yield the ways in which parameters may lie in one tensor: side by side along either axis, and transposed."""
    values = [raw_values_of(*pair) for pair in zip(parameters, names, strict=True)]
    for axis in (0, -1)[: values[0].ndim]:
        if len({value.shape[1:] if axis == 0 else value.shape[:-1] for value in values}) == 1:
            whole = torch.cat(values, axis) if len(values) > 1 else values[0]
            yield from (whole, whole.t()) if whole.ndim == 2 else (whole,)


def _is_near(
    value: ir.Value, names: Sequence[str], parameters: Mapping[str, Tensor], roundings: int, dtype: torch.dtype
) -> bool:
    """Return whether a float initializer is its parameters, rounded; what has another shape is not known."""
    sizes, at = [int(size) for size in tensor_of(value).shape.numpy()], None
    if len(sizes) == 3:
        from gralora_fx.exporters.fold.stack_locations import arrangement_of

        at = arrangement_of(value)
    if at is not None:
        own = parameters[names[0]]
        turned = own.shape[1:] != at.as_modelled(np.empty(sizes[1:], np.bool_)).shape
        stack = (read_rows(value, index, index + 1).reshape(sizes[1:]) for index in range(sizes[0]))
        pairs = zip(stack, raw_entries(own, names[0]), strict=True)
        equal = ((as_tensor(at.as_modelled(one).copy()), other) for one, other in pairs)
        return all(
            _is_equal(one, other.t() if turned else other, roundings)
            or (own.shape[1] == own.shape[2] and _is_equal(one, other.t(), roundings))
            for one, other in equal
        )
    readings = _readings([parameters[name] for name in names], names)
    fitting = [reading for reading in readings if list(reading.shape) == sizes]
    # most are equal; only then is each looked at for how far it is, and as rounded before it was stored
    ways = [(0, None), (roundings, None), (0, dtype)]
    return not fitting or any(_holds(value, reading.to(how), count) for count, how in ways for reading in fitting)


def _holds(value: ir.Value, expected: Tensor, roundings: int) -> bool:
    rows = expected.reshape(1, -1) if expected.ndim < 2 else expected.flatten(1)
    step = max(1, _AT_ONCE // max(1, rows.shape[1]))
    parts = ((first, rows[first : first + step]) for first in range(0, len(rows), step))
    return all(_is_equal(as_tensor(read_rows(value, at, at + len(own))), own, roundings) for at, own in parts)


def _is_equal(stored: Tensor, own: Tensor, roundings: int) -> bool:
    """Return whether stored values are others, to the bit or after some roundings."""
    if torch.equal(own.to(stored.dtype), stored):
        return True
    noise = _NOISE * own.abs().max().double() + _TINY
    allowed = stored.double().abs() * (roundings * torch.finfo(stored.dtype).eps / 2) + noise
    return roundings > 0 and bool(((stored.double() - own.double()).abs() <= allowed).all())


def _settings(
    directory: Path, models: Models, traced: TracedModel, write_files: Callable[[Path, TracedModel, Models], None]
) -> Iterator[str]:
    """Compare the files of settings with those that an export would write now, in a copy of the directory."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for path in directory.glob("*.*"):
            (copy / path.name).write_bytes(path.read_bytes() if path.suffix == ".json" else b"")
        write_program_files(copy, traced)
        write_files(copy, traced, models)
        for path in sorted(copy.glob("*.json")):
            there, now = (
                json.loads(file.read_bytes()) if file.is_file() else {} for file in (directory / path.name, path)
            )
            if isinstance(there, dict) and isinstance(now, dict):
                yield from (f"{path.name}: {text}" for text in _other_entries(there, now))
            elif there != now:
                yield f"{path.name} is not what the model's export writes"


def _other_entries(there: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """Yield the entries that differ; of another version of transformers, only those that both have."""
    is_same_version = there.get("transformers_version") == now.get("transformers_version")
    for key in sorted((there.keys() | now.keys() if is_same_version else there.keys() & now.keys()) - _UNSAID):
        one, other = there.get(key), now.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from _other_entries(one, other, f"{where}{key}.")
        elif one != other:
            yield f"{where}{key} is {one!r:.80}, where the model has {other!r:.80}"

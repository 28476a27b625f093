"""Conventional names for the inputs, outputs and axes of an exported graph."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import onnx_ir as ir
from torch import Tensor

from gralora_fx.base.features import parts
from gralora_fx.core.graph.pipeline import PassResult
from gralora_fx.core.tracing.inputs.input_trees import leaf_paths
from gralora_fx.core.tracing.traced_model import TracedModel
from gralora_fx.errors import ExportError
from gralora_fx.format.cache_slots import slot_of
from gralora_fx.format.export_directory import LOGITS_INDICES, PAST_SEQLENS
from gralora_fx.format.input_names import IDS, PAST_PREFIX, beside_ids

_TEXT = ("batch_size", "sequence_length")
_DECODER = ("batch_size", "decoder_sequence_length")
_ENCODED = ("batch_size", "encoder_sequence_length", "hidden_size")
_BUFFER = {"past_sequence_length": "capacity"}  # for a cache that is input and output at once
AXES: Mapping[str, tuple[str, ...]] = {
    "input_ids": _TEXT,
    "attention_mask": _TEXT,
    "token_type_ids": _TEXT,
    "position_ids": _TEXT,
    "inputs_embeds": _TEXT,
    "decoder_input_ids": _DECODER,
    "decoder_attention_mask": _DECODER,
    "encoder_hidden_states": _ENCODED,
    "encoder_attention_mask": _ENCODED,
    "input_features": ("batch_size", "feature_size", "frames"),
    LOGITS_INDICES: ("num_logits",),
}
_NOWHERE = "_empty_nn_module_stack"  # torch.export's module name for nodes outside any module


def name_axes(model: ir.Model) -> PassResult[ir.Model]:
    """Name the symbolic axes of a graph as other programs expect them.

    Before: `input_ids [s72, s53] -> logits [s72, 5]`
    After:  `input_ids [batch_size, sequence_length] -> logits [batch_size, 5]`
    """
    names: dict[str, str] = {}
    inputs = {str(value.name) for value in model.graph.inputs}
    has_cache = any(name.startswith(PAST_PREFIX) for name in inputs)
    cache = _BUFFER if PAST_SEQLENS in inputs else {}
    known = {**AXES, **{name: axes for table in parts("input axes", inputs) for name, axes in table.items()}}
    if has_cache:  # inputs of a step that also cover earlier positions
        over_all = ("attention_mask", *(each.name for each in beside_ids(inputs).values() if each.follows != IDS))
        known |= dict.fromkeys(over_all, ("batch_size", "total_sequence_length"))
    for value in model.graph.inputs:
        for axis, symbol in enumerate(_symbols(value)):
            if symbol is not None and not symbol.isdigit() and symbol not in names:
                names[symbol] = _axis_name(str(value.name), axis, names.values(), known, cache if has_cache else None)
    inner = (value for node in model.graph for value in (*node.inputs, *node.outputs) if value is not None)
    for renamed in (*model.graph.inputs, *inner, *model.graph.outputs):
        _rename(renamed, names)
    return PassResult(len(names))


def input_names(inputs: Mapping[str, Any]) -> list[str]:
    """Return the names of a graph's inputs, in order: `pairs.0`, `options.scales.left`."""
    paths = [path for path, leaf in leaf_paths(inputs) if isinstance(leaf, Tensor)]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice is not None:
        raise ExportError(f"two nested inputs of the model are called {twice!r}; name their keys without dots")
    return paths


def name_outputs(model: ir.Model) -> PassResult[ir.Model]:
    """Name a plain module's outputs `output`, or `output_0` and so on (`result` if an input is called so)."""
    outputs = model.graph.outputs
    taken = {value.name for value in model.graph.inputs}
    stem = "output" if taken.isdisjoint({"output", *(f"output_{index}" for index in range(len(outputs)))}) else "result"
    nameless = [index for index, value in enumerate(outputs) if not value.name or not str(value.name).isidentifier()]
    for index in nameless:
        outputs[index].name = stem if len(outputs) == 1 else f"{stem}_{index}"
    return PassResult(len(nameless))


def _axis_name(
    name: str, axis: int, taken: Collection[str], known: Mapping[str, tuple[str, ...]], cache: Mapping[str, str] | None
) -> str:
    slot = slot_of(name)
    if cache is not None and slot is not None:
        named = slot.kind.axes[axis] if axis < len(slot.kind.axes) else None
        return cache.get(named, named) if named is not None else f"{slot.kind.name}_axis_{axis}"
    own = f"{name}_axis_{axis}"
    if name not in known:  # another symbol: it may have another number of rows
        return "batch_size" if axis == 0 and "batch_size" not in taken else own
    return known[name][axis] if axis < len(known[name]) else own


def _symbols(value: ir.Value) -> list[str | None]:
    if value.shape is None:
        return []
    return [_symbol(dim) for dim in value.shape]


def _symbol(dim: object) -> str | None:
    """Return a symbolic axis's text, with the terms of a sum sorted; None for a number."""
    text = dim.value if isinstance(dim, ir.SymbolicDim) else None
    return None if text is None else " + ".join(sorted(text.split(" + ")))


def _rename(value: ir.Value, names: Mapping[str, str]) -> None:
    if value.shape is None or value.const_value is not None:
        return
    dims: list[int | str | None] = []
    for dim in value.shape:
        symbol = _symbol(dim)
        if symbol is None:
            dims.append(dim if isinstance(dim, int) else None)
        elif symbol.isdigit():  # an axis that turned out to be fixed
            dims.append(int(symbol))
        else:
            dims.append(names.get(symbol) or " + ".join(names.get(term, term) for term in symbol.split(" + ")))
    value.shape = ir.Shape(dims)


def layer_of(node: ir.Node) -> str:
    """Return the path of the module in which a node was traced, or the node's name."""
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
    names = [name.strip(" '\"[]") for name in scopes.split(",")]
    return next((name for name in reversed(names[:-1]) if name and not name.startswith(_NOWHERE)), str(node.name))


def traced_sizes(model: TracedModel) -> dict[str, list[str]]:
    """Return each input's sizes as the trace's numbers and expressions, by path."""
    placeholders = model.graph_module.graph.find_nodes(op="placeholder")
    return {
        path: [str(size) for size in getattr(node.meta.get("val"), "shape", ())]
        for (path, _), node in zip(leaf_paths(model.graph_inputs), placeholders, strict=False)
    }


def axes_of_rows(model: TracedModel) -> dict[str, tuple[int, ...]]:
    """Return which axes of each input have the size of some input's first axis, which may vary, by path."""
    shapes = traced_sizes(model)
    rows = {sizes[0] for sizes in shapes.values() if sizes and not sizes[0].isdigit()}
    return {path: tuple(axis for axis, size in enumerate(s) if size in rows) for path, s in shapes.items()}

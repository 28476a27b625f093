"""The ecosystem's names for the inputs, outputs and axes of an exported graph."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

_TEXT = ("batch_size", "sequence_length")
_DECODER = ("batch_size", "decoder_sequence_length")
_ENCODED = ("batch_size", "encoder_sequence_length", "hidden_size")
_PAST = ("batch_size", "num_key_value_heads", "past_sequence_length", "head_size")
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
    "pixel_values": ("batch_size", "num_channels", "height", "width"),
    "input_features": ("batch_size", "feature_size", "frames"),
}


def name_axes(model: ir.Model) -> None:
    """Give the symbolic axes of a graph the names that tools look for.

    Before: `input_ids [s72, s53] -> logits [s72, 5]`
    After:  `input_ids [batch_size, sequence_length] -> logits [batch_size, 5]`

    Args:
        model: The model; its values are renamed in place.
    """
    names: dict[str, str] = {}
    has_cache = any(str(value.name).startswith("past_key_values.") for value in model.graph.inputs)
    for value in model.graph.inputs:
        for axis, symbol in enumerate(_symbols(value)):
            if symbol is not None and not symbol.isdigit():
                names.setdefault(symbol, _axis_name(str(value.name), axis, has_cache=has_cache))
    inner = (value for node in model.graph for value in (*node.inputs, *node.outputs) if value is not None)
    for found in (*model.graph.inputs, *inner, *model.graph.outputs):
        _rename(found, names)


def name_outputs(model: ir.Model) -> None:
    """Name the outputs of a plain module `output`, or `output_0` and on; those of a transformers model are named."""
    outputs = model.graph.outputs
    for index, value in enumerate(outputs):
        if not value.name or not str(value.name).isidentifier():
            value.name = "output" if len(outputs) == 1 else f"output_{index}"


def _axis_name(name: str, axis: int, *, has_cache: bool = False) -> str:
    if name.startswith("past_key_values."):
        return _PAST[axis]
    if has_cache and name == "attention_mask" and axis == 1:
        return "total_sequence_length"
    known = AXES.get(name, ("batch_size",))
    return known[axis] if axis < len(known) else f"{name}_axis_{axis}"


def _symbols(value: ir.Value) -> list[str | None]:
    if value.shape is None:
        return []
    return [_symbol(dim) for dim in value.shape]


def _symbol(dim: object) -> str | None:
    """The text of a symbolic axis, a sum with its terms in order; None for a number."""
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

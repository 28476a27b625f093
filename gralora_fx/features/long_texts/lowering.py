"""The lengths of texts in an ONNX model: of its batch, or of each row."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from gralora_fx.core.graph.pipeline import PassResult
from gralora_fx.exporters.rules.builder import Builder, add_input
from gralora_fx.exporters.rules.rows.row_tokens import RowTokens
from gralora_fx.exporters.translation.operators import DomainNode
from gralora_fx.features.long_texts.operators import TextLength
from gralora_fx.format.export_directory import TEXT_SEQLENS, TEXT_SWITCH


class TextLengthNode(DomainNode, TextLength[ir.Value]):
    """`TextLength`: as `gralora::text_length`; `rereads` is 0 or 1."""

    op_type = "TextLength"


NODES = (TextLengthNode,)


def lower_text_lengths(model: ir.Model) -> PassResult[ir.Model]:
    """Compute the length of the longest text of a batch.

    Before: `y = TextLength(position_ids)`
    After:  `y = Expand(Max(ReduceMax(position_ids) + 1, ReduceMax(text_seqlens)), Shape(position_ids))`
    """
    nodes = list(TextLengthNode.all_in(model.graph))
    if not nodes:
        return PassResult(0)
    known = _known_lengths(model, nodes[0][1])
    for node, taken in nodes:
        build = Builder(model.graph)
        longest = build("Add", build("ReduceMax", taken.positions, keepdims=0), 1)
        longest = build("Max", longest, build("ReduceMax", known, keepdims=0))
        _replace(build, node, build("Expand", longest, build("Shape", taken.positions)))
    return PassResult(len(nodes))


FORM_PASSES = (lower_text_lengths,)


class TextRows:
    """Lengths of texts in a graph whose rows differ in length (see `CachedLayers`)."""

    readers: Collection[str] = ()

    def __init__(self, model: ir.Model) -> None:
        self._model = model

    def drop_padding_mask(self, mask: ir.Value, ids: ir.Value) -> None:
        """Leave the mask as it is: positions do not depend on it."""

    def values_of_rows(self) -> set[ir.Value]:
        """Return no values."""
        return set()

    def rewrite(self, tokens: RowTokens) -> int:
        """Give each token the length of its row's text.

        Before: `y = TextLength(positions)`, of the tokens that count
        After:  `y = Gather(Max(past_seqlens + query_seqlens, text_seqlens), tokens / length)`
        """
        nodes = list(TextLengthNode.all_in(self._model.graph))
        known = _known_lengths(self._model, nodes[0][1])
        for node, _ in nodes:
            build = Builder(self._model.graph)
            read = build("Add", build("Cast", tokens.cached, to=ir.DataType.INT64), 1)
            row = build("Div", tokens.tokens, build.size(tokens.token_at, 1))
            _replace(build, node, build("Gather", build("Max", read, known), row))
        return len(nodes)


def _known_lengths(model: ir.Model, taken: TextLengthNode) -> ir.Value:
    """Add the input of lengths that are known beforehand; return it as int64."""
    model.metadata_props[TEXT_SWITCH] = f"{taken.switch} {'anew' if taken.rereads else 'goes on'}"
    ids = next(value for value in model.graph.inputs if value.name == "input_ids")
    assert ids.shape is not None
    known = add_input(model.graph, TEXT_SEQLENS, ir.DataType.INT32, [ids.shape[0]])
    build = Builder(model.graph)
    lengths = build("Cast", known, to=ir.DataType.INT64)
    build.insert_before(model.graph[0])
    return lengths


def _replace(build: Builder, node: ir.Node, value: ir.Value) -> None:
    value.shape, value.type = node.outputs[0].shape, node.outputs[0].type
    build.replace(node, value)

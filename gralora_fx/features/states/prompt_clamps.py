"""Limits of numbers in prompts alone, as transformers limits the time steps of Mamba2's layers (see `PromptClamp`)."""

from __future__ import annotations

import onnx_ir as ir

from gralora_fx.core.graph.pipeline import PassResult
from gralora_fx.exporters.rules.builder import Builder, replace_value
from gralora_fx.exporters.rules.rows.row_tokens import RowTokens
from gralora_fx.features.states.lowering import PromptClampNode
from gralora_fx.format.export_directory import TOKENS_APART


def lower_prompt_clamps(model: ir.Model) -> PassResult[ir.Model]:
    """Limit numbers where there are several tokens, or no state before them.

    Before: `y = PromptClamp(x, state)`
    After:  `y = Where(Or(Shape(x)[1] > 1, ReduceL1(state) == 0), Clip(x), x)`, and metadata that say so
    """
    changed = 0
    for node, taken in PromptClampNode.all_in(model.graph):
        build = Builder(model.graph)
        count = build("Squeeze", build("Shape", taken.x, start=1, end=2), build.ints(0))
        rank = len(taken.state.shape or ())
        sums = build("ReduceL1", taken.state, build.ints(*range(1, rank)), keepdims=0)
        is_new = build("Equal", sums, build.tensor(0.0, taken.state.dtype or ir.DataType.FLOAT))
        is_prompt = build("Or", is_new, build("Greater", count, build.scalar(1)))
        _clamp(build, node, taken, build("Unsqueeze", is_prompt, build.ints(1, 2)))
        changed += 1
    if changed:
        model.metadata_props[TOKENS_APART] = "1"
    return PassResult(changed)


def clamp_rows(model: ir.Model, tokens: RowTokens) -> None:
    """The same in a graph whose rows have lengths of their own: where a row reads several tokens, or its first one."""
    is_prompt: ir.Value | None = None
    for node, taken in PromptClampNode.all_in(model.graph):
        build = Builder(model.graph)
        if is_prompt is None:
            zero, one = (build.tensor(number, ir.DataType.INT32) for number in (0, 1))
            of_row = build("Or", build("Greater", tokens.query, one), build("Equal", tokens.cached, zero))
            by_place = build("And", tokens.is_read(build), build("Unsqueeze", of_row, build.ints(1, 2)))
            is_prompt = tokens.of_rows(build, by_place)  # [1, tokens, 1]
            model.metadata_props[TOKENS_APART] = "1"
        _clamp(build, node, taken, is_prompt)


def _clamp(build: Builder, node: ir.Node, taken: PromptClampNode, is_prompt: ir.Value) -> None:
    dtype = taken.x.dtype or ir.DataType.FLOAT
    limits = (build.tensor(limit, dtype) for limit in (taken.least, taken.largest))
    y = build("Where", is_prompt, build("Clip", taken.x, *limits), taken.x)
    y.shape, y.type = taken.x.shape, taken.x.type
    replace_value(y, node.outputs[0])
    build.insert_before(node)
    build.graph.remove(node, safe=True)

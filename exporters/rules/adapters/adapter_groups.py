"""The input of a linear layer in groups that share an adapter each, their stack, and the function that applies it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from gralora_fx.exporters.rules.branches import add_function
from gralora_fx.exporters.rules.builder import Builder, Operand, add_input
from gralora_fx.exporters.rules.rows.flatten_tokens import FlatTokens
from gralora_fx.exporters.rules.rows.graph_ends import give_default
from gralora_fx.exporters.rules.rows.row_tokens import NUM_TOKENS
from gralora_fx.exporters.rules.rows.token_groups import TokenGroups, highest_id, token_tiles, tokens_of_adapters
from gralora_fx.format.adapter_inputs import ADAPTER_IDS, BIAS, FIRST_ADAPTER, AdapterSite
from gralora_fx.format.export_directory import QUERY_SEQLENS

NAME = "Adapter"


def adapter_function(model: ir.Model, k: int, num_axes: int) -> str:
    """Return the name of the ONNX function that computes an adapter's output, added to the model if it is missing.

    `blocks, general = Adapter(x, A, B, A_general, B_general, *shapes)` with

        x [..., in], A [k, in/k, r], B [k, r, out/k], A_general [in, hybrid_r], B_general [hybrid_r, out]
        shapes of `shapes_of_blocks`, which all calls share: a copy of them at each layer would take time to read
        blocks [..., out], general [..., out]

    The output is `blocks + general`, kept apart so that one `Sum` adds both to the layer's. Every rank may be 0. LoRA's
    form is `general = Adapter(x, A_general, B_general)`.
    """
    name = f"{NAME}_k{k}_{num_axes}d" if k else f"{NAME}_lora"
    if k:
        shapes = [f"shape_{number}" for number in range(len(shapes_of_blocks(k, num_axes)))]
        inputs = ["x", "A", "B", "A_general", "B_general", *shapes]
        add_function(model, name, inputs, functools.partial(_gralora, num_axes))
    else:
        add_function(model, name, ["x", "A_general", "B_general"], _lora)
    return name


def _lora(build: Builder, x: ir.Value, A_general: ir.Value, B_general: ir.Value) -> dict[str, ir.Value]:
    return {"general": build("MatMul", build("MatMul", x, A_general), B_general)}


def shapes_of_blocks(k: int, num_axes: int) -> list[list[int]]:
    """Return the shapes by which GraLoRA's blocks divide an input of some axes, exchange parts, and join again."""
    kept = [0] * (num_axes - 1)
    return [[*kept, k, -1], [*kept, 0, k, -1], [*kept, 0, -1], [*kept, -1]]


def _gralora(
    num_axes: int,
    build: Builder,
    x: ir.Value,
    A: ir.Value,
    B: ir.Value,
    A_general: ir.Value,
    B_general: ir.Value,
    *shapes: ir.Value,
) -> dict[str, ir.Value]:
    return {"blocks": _blocks(build, x, A, B, shapes, num_axes - 2), **_lora(build, x, A_general, B_general)}


def _blocks(build: Builder, x: ir.Value, A: ir.Value, B: ir.Value, shapes: Sequence[Operand], lead: int) -> ir.Value:
    """Return the output of GraLoRA's blocks, `[..., tokens, out]`; `lead` counts the axes of `x` before the tokens."""
    divided, exchanged, joined, whole = shapes
    front = list(range(lead))
    swap = [*front, lead + 1, lead]  # of blocks and tokens, before the features
    blocks = build("Reshape", x, divided)  # [..., tokens, input block, in/k]
    blocks = build("Transpose", blocks, perm=[*swap, lead + 2])
    hidden = build("MatMul", blocks, A)  # [..., input block, tokens, r]
    hidden = build("Reshape", hidden, exchanged)  # [..., input block, tokens, output block, s]
    hidden = build("Transpose", hidden, perm=[*front, lead + 2, lead + 1, lead, lead + 3])
    hidden = build("Reshape", hidden, joined)  # [..., output block, tokens, r]
    output = build("MatMul", hidden, B)  # [..., output block, tokens, out/k]
    return build("Reshape", build("Transpose", output, perm=[*swap, lead + 2]), whole)


def batched_adapter_function(model: ir.Model, site: AdapterSite, k: int, *, chooses: bool) -> str:
    """Return the name of the ONNX function for a stack of adapters over groups of tokens, added if it is missing.

    `output = BatchedAdapter(x, ids, A, B, A_general, B_general, bias)`, with those tensors that the layer has:

        x [groups, length, in], ids [groups], A [adapters, k, in/k, r], B [adapters, k, r, out/k],
        A_general [adapters, in, hybrid_r], B_general [adapters, hybrid_r, out], bias [adapters, out]
        output [groups, length, out]

    Unless `chooses`, `ids` is left out: each adapter of the stack has one group, in its order. With `ids`, each group's
    tensors are copied: multiplying by all adapters and masking took 1.6 to 2.2 times as long for eight rows with an
    adapter each (SmolLM2-135M's layers, r = 8 and 32).
    """
    k = site.blocks(k)
    form = f"k{k}" if k else "lora" if site.form != BIAS else "no_factors"
    name = f"Batched{NAME}_{form}{'_bias' if site.has_bias else ''}{'' if chooses else '_in_order'}"
    tensors = [tensor.rpartition(".gralora_")[2] for tensor in site.names(k)]

    def body(build: Builder, x: ir.Value, *others: ir.Value) -> dict[str, ir.Value]:
        own = dict(zip(tensors, others[-len(tensors) :], strict=True))
        if chooses:
            own = {tensor: build("Gather", value, others[0], axis=0) for tensor, value in own.items()}
        parts = []
        if k:
            parts.append(_blocks(build, x, own["A"], own["B"], shapes_of_blocks(k, 3), lead=1))
        if site.form != BIAS:
            parts.append(build("MatMul", build("MatMul", x, own["A_general"]), own["B_general"]))
        if site.has_bias:
            parts.append(_bias_of_groups(build, x, own["bias"]))
        return {"output": _total(build, parts)}

    add_function(model, name, ["x", *(["ids"] if chooses else []), *tensors], body)
    return name


def _bias_of_groups(build: Builder, x: ir.Value, bias: ir.Value) -> ir.Value:
    """Broadcast a bias of each group, `[groups, out]`, to `[groups, length, out]`."""
    shape = build("Concat", build("Shape", x, end=2), [1], axis=0)
    return build("Expand", build("Unsqueeze", bias, [1]), shape)


def _total(build: Builder, parts: Sequence[ir.Value]) -> ir.Value:
    if len(parts) == 1:
        return parts[0]
    return build("Add", *parts) if len(parts) == 2 else build("Sum", *parts)


class Groups(NamedTuple):
    """The input of a layer in groups."""

    # `[groups]`, the adapter of each; None where each adapter of the stack has one group, in its order
    ids: ir.Value | None
    x: ir.Value  # `[groups, length, features]`
    # gives an output `[groups, length, width]` the axes of the layer's output
    restored: Callable[[Builder, ir.Value], ir.Value]


@dataclass
class Grouping:
    """Groups inputs of layers by the adapter of each row.

    With branches, a stack may begin with another adapter than the base (see `FIRST_ADAPTER`): a step whose rows all
    have an adapter does not multiply by the base's zeros.

    Attributes:
        ids: The place of each row's adapter in the stack.
        ids_by_axes: The adapter of each row of values, by their axes before the features (see `ids_of_outputs`).
    """

    model: ir.Model
    branches: bool  # whether adapters are applied in branches, which needs rows with their own lengths
    # scalar: whether any row that reads tokens in this step has an adapter; None without branches
    is_any: ir.Value | None = field(default=None, init=False)
    # scalar: whether one group for each adapter is faster than tiles in this step; None without branches
    is_short: ir.Value | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        """Add the input that says which adapter each row has, unless the model has it."""
        graph = self.model.graph
        self._groups: dict[ir.Value, Groups | str] = {}
        self.ids_by_axes: dict[tuple[str, ...], ir.Value] = {}
        self.batch = next((value.shape[0] for value in graph.inputs if value.shape), None)
        inputs = {str(value.name): value for value in graph.inputs}
        ids = inputs.get(ADAPTER_IDS)
        self.ids = ids or add_input(graph, ADAPTER_IDS, ir.DataType.INT64, [self.batch or 1])
        self._tiles: TokenGroups | None = None
        self._of_adapters: TokenGroups | None = None
        if QUERY_SEQLENS in inputs:
            build, given = Builder(graph), self.ids
            if self.branches:
                highest = build("Squeeze", highest_id(build, inputs[QUERY_SEQLENS], given), [0])
                self.is_any = build("Greater", highest, 0)
                first = add_input(graph, FIRST_ADAPTER, ir.DataType.INT64, [1])
                give_default(graph, first, np.zeros(1, np.int64))
                self.ids = build("Sub", given, first)
            self._tiles = token_tiles(build, inputs["input_ids"], inputs[QUERY_SEQLENS], self.ids)
            build.insert_before(graph[0])

    def count(self, stacked: ir.Value) -> None:
        """Build the groups by adapter, once the stack and so the number of adapters is known."""
        if self.is_any is None or self._of_adapters is not None:
            return
        graph = self.model.graph
        inputs = {str(value.name): value for value in graph.inputs}
        build = Builder(graph)
        adapters = build.size(stacked, 0)
        self._of_adapters, self.is_short = tokens_of_adapters(
            build, inputs["input_ids"], inputs[QUERY_SEQLENS], self.ids, adapters
        )
        build.insert_after(self.ids)

    def of(self, x: ir.Value) -> Groups | str:
        """Return an input in groups, built once after the input, or the reason why its rows cannot be told apart."""
        if x not in self._groups:
            build = Builder(self.model.graph)
            self._groups[x] = self.within(build, x)
            build.insert_after(x)
        return self._groups[x]

    def within(self, build: Builder, x: ir.Value, *, by_adapter: bool = False) -> Groups | str:
        """Build the groups of an input in the given builder (a branch); otherwise as `of`."""
        if x.shape is None:
            return "the shape of its input is not known"
        if not isinstance(self.batch, ir.SymbolicDim):
            return f"the batch has a fixed size of {self.batch}; trace the model with dynamic=True"
        flat: FlatTokens | None = self.model.meta.get(FlatTokens.META, {}).get(str(x.shape[0]))
        tokens = self._of_adapters if by_adapter else self._tiles
        if tokens is not None and is_tokens(x):
            return _groups_of_tokens(build, x, tokens)
        if flat is not None:
            return _rows_of_matrix(build, x, flat, self.ids)
        if str(x.shape[0]) == str(self.batch):
            return _rows(build, x, self.ids)
        return f"the first axis of its input {_shown(x)} is not the batch"


def is_tokens(x: ir.Value) -> bool:
    """Return whether an input is `[1, tokens, features]` or `[tokens, features]`."""
    assert x.shape is not None
    lead = [str(size) for size in x.shape[:-1]]
    return lead in (["1", NUM_TOKENS], [NUM_TOKENS])


def _groups_of_tokens(build: Builder, x: ir.Value, groups: TokenGroups) -> Groups:
    assert x.shape is not None
    is_matrix = len(x.shape) == 2

    def restored(build: Builder, output: ir.Value) -> ir.Value:
        whole = groups.restored(build, output)
        return build("Squeeze", whole, [0]) if is_matrix else whole

    return Groups(groups.ids, groups.grouped(build, x), restored)


def _rows_of_matrix(build: Builder, x: ir.Value, flat: FlatTokens, ids: ir.Value) -> Groups | str:
    if not flat.is_batch:
        return "the rows of its input are not those of the batch"
    parts = [part for part in (flat.tokens, flat.row_at, flat.sizes) if part is not None]
    if any(part.producer() is None or part.producer().graph is None for part in parts):  # type: ignore[union-attr]
        return "the positions of its input are not known any more"
    assert x.shape is not None
    if flat.row_at is None:
        shape = build("Concat", flat.sizes, [x.shape[-1]], axis=0)
        rows = build("Reshape", x, shape)
    else:
        rows = build("Gather", x, flat.row_at, axis=0)

    def restored(build: Builder, output: ir.Value) -> ir.Value:
        matrix = build("Flatten", output, axis=2)
        return matrix if flat.tokens is None else build("Gather", matrix, flat.tokens, axis=0)

    return Groups(ids, rows, restored)


def _rows(build: Builder, x: ir.Value, ids: ir.Value) -> Groups:
    """Group an input of two axes or more whose first axis is the batch, one row a group."""
    assert x.shape is not None
    if len(x.shape) == 3:
        return Groups(ids, x, lambda build, output: output)
    rows = build("Reshape", x, [0, -1, x.shape[-1]])

    def restored(build: Builder, output: ir.Value) -> ir.Value:
        if len(x.shape or ()) == 2:
            return build("Squeeze", output, [1])
        lead = build("Shape", x, end=-1)
        return build("Reshape", output, build("Concat", lead, [-1], axis=0))

    return Groups(ids, rows, restored)


def _shown(x: ir.Value) -> str:
    return f"[{', '.join(map(str, x.shape or ()))}]"

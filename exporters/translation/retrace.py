"""Replacement of calls without an ONNX form: retraced without writes, decomposed, or computed as numbers."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import dropwhile
from typing import Any

import torch
from torch import Tensor, func, fx
from torch.fx.experimental.proxy_tensor import make_fx

from gralora_fx.base.compat.torch_graphs import (
    FakeTensor,
    FixedSize,
    OpOverload,
    detect_fake_mode,
    is_mutable,
    schema_of,
    sizes_of_slices,
    without_fixed_sizes,
    without_new_symbols,
)
from gralora_fx.base.progress.stages import quiet
from gralora_fx.core.graph.kept_calls import KeptCall, averaging_norm
from gralora_fx.core.graph.pipeline import PassResult, contract
from gralora_fx.errors import ExportError, first_line, listed
from gralora_fx.exporters.rules.onnx_pipeline import FUNCTIONAL, NOTED_VALUES, UNSHARED_WRITES
from gralora_fx.exporters.translation.decompositions import DECOMPOSITIONS, is_decomposed
from gralora_fx.exporters.translation.matching import expression

Function = Callable[..., Any]
Table = Mapping[Any, Function]  # replacements by operator


def _broadcast(x: Tensor, shape: Sequence[Any], axes: Sequence[int]) -> Tensor:
    """Broadcast `x` to a shape, its axes at `axes`."""
    sizes = [x.shape[axes.index(axis)] if axis in axes else 1 for axis in range(len(shape))]
    return x.reshape(sizes).expand(shape)


# used by PyTorch's own decompositions, but not supported by functionalization
_BASIC: dict[Any, Function] = {torch.ops.prims.broadcast_in_dim.default: _broadcast}


# in-place operators whose rule fails while writes are functionalized with dynamic sizes, by the argument written
_UNTRACEABLE: dict[Any, Function] = {torch.ops.aten.clamp_.default: torch.ops.aten.clamp.default}


def retrace(nodes: Sequence[fx.Node], table: Table | None = None, written: Sequence[fx.Node] = ()) -> None:
    """Replace calls in a graph by a retrace of their computation without in-place writes."""
    inside = set(nodes)
    inputs = list(dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source not in inside))
    outputs = [node for node in nodes if any(user not in inside for user in node.users)]

    def compute(*values: Any) -> list[Any]:
        computed = dict(zip(inputs, values, strict=True))
        computed |= {node: computed[node].clone() for node in written}
        for node in nodes:
            args, kwargs = fx.map_arg((node.args, node.kwargs), computed.__getitem__)
            computed[node] = _call(node.target, args, kwargs)
        results = [computed[node] for node in (*outputs, *written)]
        if any(result is None for result in results):
            raise NotImplementedError("one of its results is not computed")
        return results

    mode = detect_fake_mode([node.meta["val"] for node in nodes[0].graph.nodes if "val" in node.meta])
    assert mode is not None
    values = [node.meta["val"] for node in inputs]
    noted = [_as_fake(value, mode) for value in values]
    try:
        with quiet(), without_fixed_sizes(mode), mode, torch.no_grad(), without_new_symbols(mode), sizes_of_slices():
            noted = [v.contiguous() if isinstance(v, Tensor) else v for v in noted]  # ONNX has no other layout
            parts = make_fx(compute, decomposition_table={**_BASIC, **(table or {})})(*noted)
            parts = make_fx(func.functionalize(parts))(*noted)
    except Exception as error:
        calls = [node for node in nodes if isinstance(node.target, OpOverload)]
        if isinstance(error, FixedSize):
            raise without_form(calls, " for other sizes than the example's", "trace with dynamic=False") from error
        raise without_form(calls, f" ({first_line(error)})") from error
    graph, end = nodes[-1].graph, nodes[-1].next
    copies: dict[fx.Node, fx.Node] = dict(zip(parts.graph.find_nodes(op="placeholder"), inputs, strict=True))
    with graph.inserting_before(end):
        for part in parts.graph.nodes:
            if part.op == "call_function":
                copies[part] = graph.node_copy(part, copies.__getitem__)
                copies[part].meta = {**nodes[-1].meta, "val": part.meta.get("val")}
    (results,) = next(iter(reversed(parts.graph.nodes))).args
    for node, result in zip(outputs, results, strict=False):
        node.replace_all_uses_with(copies[result], delete_user_cb=lambda user: user not in inside)
    after = _from(end)
    for node, result in zip(written, results[len(outputs) :], strict=True):
        node.replace_all_uses_with(copies[result], delete_user_cb=lambda user: user in after)
    for node in reversed(nodes):
        graph.erase_node(node)


def without_form(nodes: Sequence[fx.Node], why: str = "", otherwise: str = "outside of the model") -> ExportError:
    """Return the error that calls have no ONNX form, which names them with their lines."""
    from gralora_fx.core.tracing.failures import call_named

    calls = listed(dict.fromkeys(map(call_named, nodes)), 4)
    return ExportError(f"there is no ONNX form of {calls}{why}: compute it with other operators, or {otherwise}")


def spell_out(graph: fx.Graph) -> None:
    """Replace calls that a trace has kept as one node by the operators of their forward, in place, without hooks."""
    for node in [node for node in reversed(graph.nodes) if isinstance(node.target, KeptCall)]:
        node.target, node.args = node.target.alone(), node.args[: node.target.count]
        for part in [part for part in node.users if not part.users and part.op != "output"]:  # the record of hooks
            graph.erase_node(part)
    for node in list(graph.nodes):
        if isinstance(node.target, KeptCall) or node.target is averaging_norm:
            retrace([node, *sorted(user for user in node.users if user.target is operator.getitem)])


def _call(target: Any, args: Any, kwargs: Any) -> Any:
    """Return an operator's result; it may write into its first argument."""
    functional, target = _UNTRACEABLE.get(target), DECOMPOSITIONS.get(target, target)
    return target(*args, **kwargs) if functional is None else args[0].copy_(functional(*args, **kwargs))


@contract(leaves={NOTED_VALUES})
def note_values(graph: fx.Graph) -> PassResult[fx.Graph]:
    """Set `meta["val"]` of every call that a pass added without it, by PyTorch's own shape rules."""
    added = [node for node in graph.nodes if node.op == "call_function" and "val" not in node.meta]
    if not added:
        return PassResult(0)
    mode = detect_fake_mode([node.meta["val"] for node in graph.nodes if "val" in node.meta])
    assert mode is not None

    with mode, torch.no_grad(), without_new_symbols(mode), sizes_of_slices():
        for node in added:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: _as_fake(source.meta["val"], mode))
            node.meta["val"] = node.target(*args, **kwargs)
    return PassResult(len(added))


def _as_fake(value: Any, mode: Any) -> Any:
    """Return a tensor, such as a weight, as a fake one with static sizes; other values unchanged."""
    is_real = isinstance(value, Tensor) and not isinstance(value, FakeTensor)
    return mode.from_tensor(value, static_shapes=True) if is_real else value


def _from(first: fx.Node) -> set[fx.Node]:
    return set(dropwhile(lambda node: node is not first, first.graph.nodes))


@contract(needs={NOTED_VALUES}, leaves={UNSHARED_WRITES})
def functionalize(graph: fx.Graph) -> PassResult[fx.Graph]:
    """Functionalize writes into shared memory, such as into a slice of a tensor that is read afterwards.

    Before: `y = new_empty(...); part = slice(y, ...); copy_(part, x); z = y + 1`
    After:  `y = new_empty(...); written = slice_scatter(y, x, ...); z = written + 1`; `out_of_place` takes the others
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    families: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if (root := _root(node)) is not None:
            families.setdefault(root, [root]).append(node)
    spans = []
    for root, members in families.items():
        writes = [node for node in members if _writes(node)]
        if writes and any(not _writes(node) for node in members[1:]):
            begin = root if _is_computed(root) else members[1]
            spans.append((order[begin], order[writes[-1]], root))
    nodes = list(graph.nodes)
    for first, last, roots in _joined(spans):
        span = nodes[first : last + 1]
        calls = [node for node in span if _is_computed(node) or _shares_with(node) is not None]
        outer = [root for root in roots if root not in calls]
        retrace(calls, written=outer)
    return PassResult(len(spans))


def _joined(spans: list[tuple[int, int, fx.Node]]) -> list[tuple[int, int, list[fx.Node]]]:
    joined: list[tuple[int, int, list[fx.Node]]] = []
    for begin, end, root in sorted(spans, key=lambda span: span[:2]):
        if joined and begin <= joined[-1][1]:
            first, last, roots = joined.pop()
            joined.append((first, max(last, end), [*roots, root]))
        else:
            joined.append((begin, end, [root]))
    return joined


def _is_computed(node: fx.Node) -> bool:
    """Return whether a node computes a tensor, rather than selecting one of several results."""
    return node.op == "call_function" and node.target is not operator.getitem


def _root(node: fx.Node) -> fx.Node | None:
    """Return the tensor whose memory a node's result may alias; None if it has its own."""
    source = node
    while (earlier := _shares_with(source)) is not None:
        source = earlier
    return source if source is not node else None


def _shares_with(node: fx.Node) -> fx.Node | None:
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if node.target is operator.getitem:
        return source if _shares_with(source) is not None else None
    if not isinstance(node.target, OpOverload):
        return None
    returns = schema_of(node.target).returns
    return source if returns and returns[0].alias_info is not None else None


def _writes(node: fx.Node) -> bool:
    return is_mutable(node.target)


@contract(needs={FUNCTIONAL, NOTED_VALUES})
@dataclass(frozen=True)
class Decompose:
    """Replace every unsupported operator by PyTorch's decomposition, if it has one.

    Before: `y = square(x)`
    After:  `y = pow(x, 2)`
    """

    known: Collection[Any]  # operators to keep
    # returns decompositions that PyTorch does not apply by default; called only if an operator is unsupported
    decompositions: Callable[[], Table]

    def __call__(self, graph: fx.Graph) -> PassResult[fx.Graph]:
        """Replace them in place, in a graph whose nodes all have their traced values."""
        calls = [node for node in graph.nodes if isinstance(node.target, OpOverload)]
        unknown = [n for n in calls if n.target not in self.known or is_decomposed(n.target, n.args)]
        table = self.decompositions() if unknown else {}
        count = 0
        for node in unknown:
            if node.target in table or is_decomposed(node.target, node.args) or node.target._can_decompose():
                parts = [user for user in node.users if user.target is operator.getitem]
                retrace([node, *sorted(parts)], table=table)
                count += 1
        return PassResult(count)


@dataclass(frozen=True)
class FoldNumbers:
    """Replace every unsupported operator that computes a scalar from constants by that scalar.

    Before: `y = erf_inv(sub(full([], 1.9), 1))`
    After:  `y = full([], 1.163...)`
    """

    known: Collection[Any]  # operators to keep
    # returns a tensor of the graph's module by its path; None for one that may change
    value_at: Callable[[str], Tensor | None]

    def __call__(self, graph: fx.Graph) -> PassResult[fx.Graph]:
        """Replace them in place, in a graph whose nodes all have their traced values."""
        numbers: dict[fx.Node, Tensor | None] = {}
        count = 0
        for node in list(graph.nodes):
            if not isinstance(node.target, OpOverload) or node.target in self.known:
                continue
            number = self._number(node, numbers)
            if number is not None:
                node.target, node.args = torch.ops.aten.full.default, (list(number.shape), number.item())
                node.kwargs = {"dtype": number.dtype}
                count += 1
        return PassResult(count)

    def _number(self, node: fx.Node, numbers: dict[fx.Node, Tensor | None]) -> Tensor | None:
        """Return the scalar value of a node that depends on constants only; None for other nodes."""
        if node not in numbers:
            numbers[node] = self._computed(node, numbers)
        return numbers[node]

    def _computed(self, node: fx.Node, numbers: dict[fx.Node, Tensor | None]) -> Tensor | None:
        noted = node.meta.get("val")
        if not isinstance(noted, Tensor) or any(expression(size) != 1 for size in noted.shape):
            return None
        if node.op == "get_attr":
            return self.value_at(str(node.target))
        if not isinstance(node.target, OpOverload) or is_mutable(node.target):
            return None
        values = {source: self._number(source, numbers) for source in node.all_input_nodes}
        if torch.Tag.nondeterministic_seeded in node.target.tags or any(number is None for number in values.values()):
            return None
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        result = node.target(*args, **kwargs)
        return result if isinstance(result, Tensor) else None

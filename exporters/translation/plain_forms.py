"""Rewriting of calls to forms with a translation: by PyTorch's and transformers' passes, of sizes and of numbers."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.passes.dialect.common.cse_pass import CSEPass, get_CSE_banned_ops

from gralora_fx.base.compat import torch_onnx
from gralora_fx.base.compat.transformers_exporters import fix_for_onnx
from gralora_fx.base.progress.stages import quiet
from gralora_fx.core.graph.pipeline import PassResult, contract
from gralora_fx.core.graph.surgery import module_of
from gralora_fx.core.operators.attention import Attention, DotProductAttention, Mask
from gralora_fx.core.operators.layers import Reshape, RmsNorm, Rotary, Slice
from gralora_fx.exporters.rules.onnx_pipeline import NOTED_VALUES, ONE_SPELLING
from gralora_fx.exporters.translation.matching import aten, expression, is_call, is_size, shape

# operators that accept mixed dtypes, or whose result has another dtype by definition
_MIXED = {
    aten._to_copy.default,
    aten.batch_norm.default,
    aten.embedding.default,
    aten.gather.default,
    aten.index.Tensor,
    aten.index_select.default,
    aten.masked_fill.Scalar,
    aten.where.self,
    *(call.target for call in (Attention, DotProductAttention, Mask, Reshape, RmsNorm, Rotary, Slice)),
}


@contract(ends={NOTED_VALUES, ONE_SPELLING})
def fix_calls(graph: fx.Graph) -> PassResult[fx.Graph]:
    """Rewrite calls that torch's translation gets wrong, as transformers' exporter does; in place."""
    before = len(graph.nodes)
    fix_for_onnx(module_of(graph))
    return PassResult(abs(len(graph.nodes) - before))


def bfloat16_in_float32(graph: fx.Graph) -> PassResult[fx.Graph]:
    """Replace bfloat16 operators in a model of another precision by float32 operators and rounding.

    Before: `y: bfloat16 = mul(slopes, positions)`, as Falcon computes ALiBi's biases
    After:  `y = to(mul(to(slopes, float32), to(positions, float32)), bfloat16)`; ONNX Runtime's CPU has only casts
    """
    if any(_is_bfloat16(node) for node in graph.nodes if node.op in ("placeholder", "get_attr")):
        return PassResult(0)  # a model of bfloat16
    changed = [
        node for node in graph.nodes if _is_bfloat16(node) and torch.Tag.pointwise in getattr(node.target, "tags", ())
    ]
    for node in changed:
        with graph.inserting_before(node):
            for source in [source for source in node.all_input_nodes if isinstance(source.meta.get("val"), Tensor)]:
                rounded = graph.call_function(aten._to_copy.default, (source,), {"dtype": torch.bfloat16})
                wide = graph.call_function(aten._to_copy.default, (rounded,), {"dtype": torch.float32})
                node.replace_input_with(source, wide)
        del node.meta["val"]
        with graph.inserting_after(node):
            result = graph.call_function(aten._to_copy.default, (node,), {"dtype": torch.bfloat16})
        node.replace_all_uses_with(result, delete_user_cb=lambda user, result=result: user is not result)
    return PassResult(len(changed))


def _is_bfloat16(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype is torch.bfloat16


@contract(needs={NOTED_VALUES}, leaves={ONE_SPELLING})
def eliminate_common_subexpressions(graph: fx.Graph) -> PassResult[fx.Graph]:
    """Compute equal expressions once; return a new graph."""
    cse_result = CSEPass(banned_ops=get_CSE_banned_ops())(module_of(graph))
    if cse_result is None:
        return PassResult(0)
    result = cse_result.graph_module.graph
    return PassResult(len(graph.nodes) - len(result.nodes), graph=result)


@contract(needs={NOTED_VALUES})
def promote_types(graph: fx.Graph) -> PassResult[fx.Graph]:
    """Insert explicit casts where an operator mixes dtypes, which PyTorch promotes implicitly."""
    count = sum(_promotes(node) for node in graph.nodes)
    if not count:
        return PassResult(0)
    module = module_of(graph)
    with quiet():
        torch_onnx.promote_types(module)
    return PassResult(count, graph=module.graph)


def _promotes(node: fx.Node) -> bool:
    """Return whether an operator relies on type promotion, which ONNX operators do not do."""
    result = node.meta.get("val")
    if node.op != "call_function" or node.target in _MIXED or not isinstance(result, Tensor):
        return False
    values = [arg.meta.get("val") for arg in node.all_input_nodes]
    dtypes = {value.dtype for value in values if isinstance(value, Tensor)}
    return len(dtypes) > 1 or (result.dtype != torch.bool and dtypes not in (set(), {result.dtype}))


_ARITHMETIC = (aten.div.Tensor, aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.pow.Tensor_Scalar)


@contract(needs={NOTED_VALUES})
def plain_sizes(graph: fx.Graph) -> PassResult[fx.Graph]:
    """Replace element counts by products of sizes, and cast sizes used in float arithmetic.

    Before: `y = div(x, sym_numel(z))`
    After:  `y = div(x, sym_float(sym_size(z, 0)))`
    """
    numbers = list(graph.find_nodes(op="call_function", target=aten.sym_numel.default))
    for node in numbers:
        node.replace_all_uses_with(_product(graph, node))
        graph.erase_node(node)
    count = len(numbers)
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if is_call(node, *_ARITHMETIC) and value.is_floating_point() and _is_symbol(node.args[1]):
            node.args = (node.args[0], _as_float(graph, node), *node.args[2:])
            count += 1
    return PassResult(count)


def _is_symbol(node: Any) -> bool:
    return is_size(node) or (isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.SymBool))


def _as_float(graph: fx.Graph, node: fx.Node) -> fx.Node:
    size, like = node.args[1], node.meta["val"]
    assert isinstance(size, fx.Node)
    with graph.inserting_before(node):
        if like.dtype is torch.float32 and is_size(size):
            result = graph.call_function(torch.sym_float, (size,))
            value = torch.sym_float(size.meta["val"])  # type: ignore[no-untyped-call]
        else:
            result = graph.call_function(aten.scalar_tensor.default, (size,), {"dtype": like.dtype})
            value = like.new_empty(())
    result.meta = {**size.meta, "val": value}
    return result


def _product(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Return a tensor's number of elements as the product of its sizes other than constant one."""
    source = node.args[0]
    sizes = shape(source)
    axes = [axis for axis, size in enumerate(sizes) if expression(size) != 1]
    with graph.inserting_before(node):
        result, value = None, None
        for axis in axes:
            size = graph.call_function(aten.sym_size.int, (source, axis))
            size.meta = {**node.meta, "val": sizes[axis]}
            value = sizes[axis] if value is None else value * sizes[axis]
            if result is None:
                result = size
                continue
            result = graph.call_function(operator.mul, (result, size))
            result.meta = {**node.meta, "val": value}
    assert result is not None  # an unknown number of elements has an unknown axis
    return result

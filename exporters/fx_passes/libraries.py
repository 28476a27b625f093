"""Passes of PyTorch and transformers wrapped as passes of this package."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.fx.passes.dialect.common.cse_pass import CSEPass, get_CSE_banned_ops

from gralora_fx.compat import torch_onnx
from gralora_fx.compat.transformers_exporters import fix_for_onnx
from gralora_fx.graph.pipeline import PassResult
from gralora_fx.operators.attention import Attention, DotProductAttention, Mask
from gralora_fx.operators.layers import Reshape, RmsNorm, Rotary, Slice
from gralora_fx.progress.stages import quiet

_aten = torch.ops.aten
# operators that take tensors of several dtypes as they are, or whose result has another by its meaning
_MIXED = {
    _aten._to_copy.default,
    _aten.batch_norm.default,
    _aten.embedding.default,
    _aten.gather.default,
    _aten.index.Tensor,
    _aten.index_select.default,
    _aten.masked_fill.Scalar,
    _aten.where.self,
    *(call.target for call in (Attention, DotProductAttention, Mask, Reshape, RmsNorm, Rotary, Slice)),
}


def fix_calls(graph: fx.Graph) -> PassResult[fx.Graph]:
    """Rewrite calls that torch's translation gets wrong, as transformers' exporter does; in place."""
    before = len(graph.nodes)
    fix_for_onnx(_module_of(graph))
    return PassResult(abs(len(graph.nodes) - before))


def eliminate_common_subexpressions(graph: fx.Graph) -> PassResult[fx.Graph]:
    """Compute equal expressions once; the result is a new graph."""
    cse_result = CSEPass(banned_ops=get_CSE_banned_ops())(_module_of(graph))
    if cse_result is None:
        return PassResult(0)
    result = cse_result.graph_module.graph
    return PassResult(len(graph.nodes) - len(result.nodes), graph=result)


def promote_types(graph: fx.Graph) -> PassResult[fx.Graph]:
    """Insert explicit casts where an operator mixes dtypes, which PyTorch promotes implicitly."""
    count = sum(_promotes(node) for node in graph.nodes)
    if not count:  # it runs the whole graph, which takes seconds
        return PassResult(0)
    module = _module_of(graph)
    with quiet():
        torch_onnx.promote_types(module)
    return PassResult(count, graph=module.graph)


def _module_of(graph: fx.Graph) -> fx.GraphModule:
    assert graph.owning_module is not None
    return graph.owning_module


def _promotes(node: fx.Node) -> bool:
    """Whether an operator relies on type promotion, which ONNX operators do not do."""
    result = node.meta.get("val")
    if node.op != "call_function" or node.target in _MIXED or not isinstance(result, Tensor):
        return False
    values = [arg.meta.get("val") for arg in node.all_input_nodes]
    dtypes = {value.dtype for value in values if isinstance(value, Tensor)}
    return len(dtypes) > 1 or (result.dtype != torch.bool and dtypes not in (set(), {result.dtype}))

"""A traced graph as an ONNX model, operator by operator.

The public `torch.onnx.export` traces and decomposes a program first, which takes most of its time and changes nothing
in a graph that is a clean trace already. Here only the translation is run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import InlinePass
from onnxscript import opset18
from torch import Tensor, fx, nn
from torch.fx.passes.dialect.common.cse_pass import CSEPass, get_CSE_banned_ops

from gralora_fx.compat.torch_onnx import (
    add_opset_imports,
    decomposition_table,
    new_registry,
    operators_in,
    promote_types,
    translate_graph,
)
from gralora_fx.compat.transformers_exporters import fix_for_onnx, onnx_translations
from gralora_fx.errors import ExportError, first_line
from gralora_fx.exporters.fx_passes.decompose import decompose, fold_numbers
from gralora_fx.exporters.fx_passes.functionalize import without_shared_writes
from gralora_fx.exporters.fx_passes.operators import TRANSLATIONS
from gralora_fx.exporters.fx_passes.retrace import note_values
from gralora_fx.exporters.fx_passes.simplify import constant_slices, out_of_place, simplify, whole_products
from gralora_fx.exporters.translation.overrides import batch_norm, dot_product_attention
from gralora_fx.exporters.translation.weights import weight_tensor
from gralora_fx.graph.surgery import copy_graph
from gralora_fx.graph.weight_views import tensor_at
from gralora_fx.progress.silence import quiet

OPSET = 23  # the first with RMSNormalization
IR_VERSION = 11
_FUNCTIONS = "gralora.functions"  # domain of graphs that others call, until they are inlined

GraphPass = Callable[[fx.Graph], object]
Weights = dict[str, tuple[str, Tensor]]  # path and values by the node that reads them

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
    *TRANSLATIONS,
}


def translate(graph_module: fx.GraphModule, *passes: GraphPass, opset: int = OPSET) -> ir.Model:
    """Translate a traced graph in evaluation mode; its weights become initializers under their own names.

    Inputs keep the names of the graph's placeholders, outputs those of its nodes. Operators of `exporters.operators`
    become nodes of a domain that ONNX Runtime does not know: later passes have to replace them. Branches of a condition
    become those of `If`.

    Args:
        graph_module: The graph, every node with the shape and dtype that tracing noted; it is left as it is.
        passes: What to do with a copy of the graph first, once it is simplified.
        opset: Version of ONNX's operators.

    Raises:
        ExportError: An operator has no ONNX form; the message names it.
    """
    with quiet():
        registry = _registry(opset)
    model = ir.Model(ir.Graph([], [], nodes=[], name="main_graph"), ir_version=IR_VERSION)
    weights = _translate_into(model.graph, graph_module, model, registry, passes)
    add_opset_imports(model)
    model.graph.opset_imports[""] = opset
    for function in model.functions.values():
        function.opset_imports[""] = opset
    if model.functions:
        InlinePass()(model)
    for name, (target, tensor) in weights.items():
        initializer = model.graph.initializers.pop(name, None)
        if initializer is not None:
            initializer.name = target
            initializer.const_value = weight_tensor(target, tensor)
            model.graph.initializers[target] = initializer
    return model


def _translate_into(
    place: ir.Graph | ir.Function,
    graph_module: fx.GraphModule,
    model: ir.Model,
    registry: Any,
    passes: Sequence[GraphPass] = (),
) -> Weights:
    """Translate a graph into one of a model; those that it calls become functions of the model."""
    parts = {name: part for name, part in graph_module.named_children() if isinstance(part, fx.GraphModule)}
    functions = {name: _function(name, part, model, registry) for name, part in parts.items()}
    graph = copy_graph(graph_module)
    graph.set_codegen(fx.graph.CodeGen())
    weights = _take_weights(graph, graph_module, parts)
    without_shared_writes(graph)
    for node in list(graph.nodes):
        if node.name in weights:
            node.target = node.name
        elif node.op == "call_function":
            out_of_place(node)
    simplify(graph)
    whole_products(graph)
    module = fx.GraphModule({name: _stand_in(tensor) for name, (_, tensor) in weights.items()} | parts, graph)
    fix_for_onnx(module)
    note_values(module.graph)
    once = CSEPass(banned_ops=get_CSE_banned_ops())(module)
    module = module if once is None else once.graph_module
    for graph_pass in passes:
        graph_pass(module.graph)
    known = operators_in(registry)
    decompose(module.graph, known, lambda: decomposition_table(known))
    fold_numbers(module.graph, known, lambda name: _constant(weights[name][1]) if name in weights else None)
    constant_slices(module.graph)
    try:
        with quiet():
            if any(_promotes(node) for node in module.graph.nodes):  # it runs the whole graph, which takes seconds
                promote_types(module)
            translate_graph(module.graph, model, place, functions, registry)
    except Exception as error:  # torch.onnx raises errors of every type
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = f"{first_line(error)} ({first_line(cause)})"
        raise ExportError(f"the graph cannot be converted to ONNX: {reason}") from error
    return weights


def _take_weights(graph: fx.Graph, graph_module: fx.GraphModule, parts: Mapping[str, fx.GraphModule]) -> Weights:
    """The tensors that a graph reads, by the one node that reads each: what shares memory is stored once."""
    weights: Weights = {}
    first: dict[Any, fx.Node] = {}
    for node in graph.find_nodes(op="get_attr"):
        if node.target in parts:
            continue
        tensor = tensor_at(graph_module, str(node.target))
        if tensor is None:
            raise ExportError(f"{node.target} of the graph is no tensor, so it has no ONNX form")
        same = first.setdefault(_memory(tensor), node)
        if same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
            continue
        weights[node.name] = str(node.target), tensor
        node.meta["val"] = _stand_in(tensor)
    return weights


def _memory(tensor: Tensor) -> Any:
    """What two tensors have in common that hold the same values, whatever is written to one of them."""
    if tensor.is_meta:
        return id(tensor)
    place = tensor.untyped_storage().data_ptr(), tensor.storage_offset()
    return *place, tensor.shape, tensor.stride(), tensor.dtype


def _function(name: str, graph_module: fx.GraphModule, model: ir.Model, registry: Any) -> ir.Function:
    """A graph that another calls as a function of a model."""
    name = f"{name}_{len(model.functions)}"
    function = ir.Function(_FUNCTIONS, name, graph=ir.Graph((), (), nodes=()), attributes=())
    _translate_into(function, graph_module, model, registry)
    model.functions[function.identifier()] = function
    return function


def _stand_in(tensor: Tensor) -> Tensor:
    """A tensor to convert with: itself, or one of its shape without memory where the values come later."""
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape) if tensor.is_meta else tensor


def _constant(tensor: Tensor) -> Tensor | None:
    """A tensor that is no parameter and has values."""
    return None if isinstance(tensor, nn.Parameter) or tensor.is_meta else tensor


def _promotes(node: fx.Node) -> bool:
    """Whether an operator mixes dtypes, or makes floats of integers, which ONNX operators do not do by themselves."""
    result = node.meta.get("val")
    if node.op != "call_function" or node.target in _MIXED or not isinstance(result, Tensor):
        return False
    values = [arg.meta.get("val") for arg in node.all_input_nodes]
    dtypes = {value.dtype for value in values if isinstance(value, Tensor)}
    return len(dtypes) > 1 or (result.dtype != torch.bool and dtypes not in (set(), {result.dtype}))


def _registry(opset: int) -> Any:
    registry = new_registry(opset)
    for target, function in onnx_translations().items():
        registry.register_op(target, function)
    registry.register_op(_aten.unsqueeze.default, _unsqueeze_complex, is_complex=True)
    if opset < OPSET:  # which has attention
        registry.register_op(_aten.scaled_dot_product_attention.default, dot_product_attention)
    registry.register_op(_aten.batch_norm.default, batch_norm)
    for operator, translation in TRANSLATIONS.items():
        registry.register_op(operator, translation)
    return registry


def _unsqueeze_complex(tensor: Any, dim: int) -> Any:
    """A new axis of a complex tensor, whose last axis in ONNX is the pair of its parts."""
    return opset18.Unsqueeze(tensor, opset18.Constant(value_ints=[dim if dim >= 0 else dim - 1]))

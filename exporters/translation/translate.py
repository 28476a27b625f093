"""Translation of a traced graph to an ONNX model, operator by operator.

The public `torch.onnx.export` first traces and decomposes a program, which takes most of its time and changes nothing
in a clean trace. Here only the translation runs.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import InlinePass
from onnxscript import opset18
from torch import Tensor, fx, nn

from gralora_fx.base.compat.torch_graphs import OpOverload
from gralora_fx.base.compat.torch_onnx import (
    add_opset_imports,
    decomposition_table,
    new_registry,
    operators_in,
    translate_graph,
)
from gralora_fx.base.compat.transformers_exporters import onnx_translations
from gralora_fx.base.features import parts as parts_of_features
from gralora_fx.base.progress.stages import quiet
from gralora_fx.core.graph.linear_calls import tensor_at
from gralora_fx.core.graph.pipeline import Pass, PassLog, Pipeline
from gralora_fx.core.graph.surgery import copy_graph
from gralora_fx.core.operators import operators_called
from gralora_fx.errors import ExportError, first_line
from gralora_fx.exporters.rules.onnx_pipeline import NOTED_VALUES
from gralora_fx.exporters.translation.operators import TRANSLATIONS, DomainNode, translation_of, update_forms
from gralora_fx.exporters.translation.plain_forms import (
    bfloat16_in_float32,
    eliminate_common_subexpressions,
    fix_calls,
    plain_sizes,
    promote_types,
)
from gralora_fx.exporters.translation.retrace import Decompose, FoldNumbers, functionalize, note_values, without_form
from gralora_fx.exporters.translation.simplify import addmm_to_matmul, constant_slices, out_of_place, simplify
from gralora_fx.exporters.translation.weights import weight_tensor

OPSET = 23  # the first with RMSNormalization
IR_VERSION = 11
_FUNCTIONS = "gralora.functions"  # domain of subgraphs, until they are inlined

Weights = dict[str, tuple[str, Tensor]]  # path and tensor by the name of the node that reads it

_aten = torch.ops.aten
_REPLACED = {  # replaced by functions in `torch_operators`
    _aten.scaled_dot_product_attention.default,
    _aten.batch_norm.default,
    _aten.fft_fftn.default,
    _aten.histc.default,
    _aten.softplus.default,
    _aten.lstm.input,
    _aten.gru.input,
    _aten.rnn_tanh.input,
    _aten.rnn_relu.input,
}


def translate(
    graph_module: fx.GraphModule,
    *passes: Pass[fx.Graph],
    first: Sequence[Pass[fx.Graph]] = (),
    log: PassLog | None = None,
    name: str = "graph",
) -> ir.Model:
    """Translate a traced graph in evaluation mode; its weights become initializers under their own names.

    Inputs are named as the graph's placeholders, outputs as its nodes. This project's operators become nodes of a
    domain that ONNX Runtime does not know, for later passes to replace; branches of a condition become those of `If`.
    """
    model = ir.Model(ir.Graph([], [], nodes=[], name="main_graph"), ir_version=IR_VERSION)
    log = PassLog() if log is None else log
    if first:
        copied = fx.GraphModule(graph_module, copy_graph(graph_module))
        for node in copied.graph.find_nodes(op="get_attr"):
            node.meta.setdefault("val", tensor_at(graph_module, str(node.target)))
        passes_first = (functionalize, out_of_place, *first)  # a cast of what is written into would not be written
        given = frozenset({NOTED_VALUES})
        graph = Pipeline(f"{name}-fx", passes_first, given=given, error=ExportError).run(copied.graph, log)
        assert graph.owning_module is not None
        graph_module = graph.owning_module
    weights = _translate_into(model.graph, graph_module, model, log, f"{name}-fx", passes)
    add_opset_imports(model)
    model.graph.opset_imports[""] = OPSET
    for function in model.functions.values():
        function.opset_imports[""] = OPSET
    if model.functions:
        InlinePass()(model)
    update_forms(model)
    for placeholder, (target, tensor) in weights.items():
        initializer = model.graph.initializers.pop(placeholder, None)
        if initializer is not None:
            initializer.name = target
            initializer.const_value = weight_tensor(target, tensor)
            model.graph.initializers[target] = initializer
    return model


def _translate_into(
    container: ir.Graph | ir.Function,
    graph_module: fx.GraphModule,
    model: ir.Model,
    log: PassLog,
    name: str,
    passes: Sequence[Pass[fx.Graph]] = (),
) -> Weights:
    """Translate a graph into a graph or function of a model; its subgraphs become functions."""
    parts = {path: part for path, part in graph_module.named_children() if isinstance(part, fx.GraphModule)}
    functions = {path: _function(path, part, model, log) for path, part in parts.items()}
    graph = copy_graph(graph_module)
    graph.set_codegen(fx.graph.CodeGen())
    weights = _take_weights(graph, graph_module, parts)
    for node in graph.find_nodes(op="get_attr"):
        node.target = node.name if node.name in weights else node.target
    values = {path: _placeholder_tensor(tensor) for path, (_, tensor) in weights.items()}
    graph = fx.GraphModule(values | parts, graph).graph
    with quiet():
        registry = _registry()
        for kinds in parts_of_features("onnx operators", operators_called(graph)):
            for kind in kinds:
                _register(kind)
    known = operators_in(registry) | _REPLACED
    graph = Pipeline[fx.Graph](
        name,
        (
            functionalize,
            out_of_place,
            simplify,
            addmm_to_matmul,
            fix_calls,  # transformers' own
            bfloat16_in_float32,
            note_values,  # for the nodes added before
            eliminate_common_subexpressions,
            *passes,
            Decompose(known, lambda: decomposition_table(known)),  # operators that no pass has replaced
            FoldNumbers(known, lambda path: _constant(weights[path][1]) if path in weights else None),
            plain_sizes,  # also of sizes computed by decompositions
            constant_slices,
            promote_types,  # last: for the calls that passes before it add
        ),
        given=frozenset({NOTED_VALUES}),
        error=ExportError,
    ).run(graph, log)
    if any(node.target in _REPLACED for node in graph.nodes):
        _register_replaced()
    try:
        with quiet():
            translate_graph(graph, model, container, functions, registry)
    except Exception as error:  # torch.onnx raises errors of every type
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, ExportError):
            raise cause from error
        reason = f"the graph cannot be converted to ONNX: {first_line(error)} ({first_line(cause)})"
        missing = [n for n in graph.nodes if isinstance(n.target, OpOverload) and n.target not in known]
        if missing:
            raise without_form(missing) from error
        raise ExportError(reason) from error
    return weights


def _take_weights(graph: fx.Graph, graph_module: fx.GraphModule, parts: Mapping[str, fx.GraphModule]) -> Weights:
    """Return the tensors that a graph reads, each by one node, so that tensors in the same memory are stored once."""
    weights: Weights = {}
    first: dict[Any, fx.Node] = {}
    for node in graph.find_nodes(op="get_attr"):
        if node.target in parts:
            continue
        tensor = tensor_at(graph_module, str(node.target))
        if tensor is None:
            raise ExportError(f"{node.target} of the graph is not a tensor, so it has no ONNX form")
        same = first.setdefault(_memory(tensor), node)
        if same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
            continue
        weights[node.name] = str(node.target), tensor
        node.meta["val"] = _placeholder_tensor(tensor)
    return weights


def _memory(tensor: Tensor) -> Any:
    """Return a key that is equal for equal views of the same memory."""
    if tensor.is_meta:
        return id(tensor)
    location = tensor.untyped_storage().data_ptr(), tensor.storage_offset()
    return *location, tensor.shape, tensor.stride(), tensor.dtype


def _function(name: str, graph_module: fx.GraphModule, model: ir.Model, log: PassLog) -> ir.Function:
    """Translate a subgraph into a function of the model."""
    name = f"{name}_{len(model.functions)}"
    function = ir.Function(_FUNCTIONS, name, graph=ir.Graph((), (), nodes=()), attributes=())
    _translate_into(function, graph_module, model, log, f"{name}-fx")
    model.functions[function.identifier()] = function
    return function


def _placeholder_tensor(tensor: Tensor) -> Tensor:
    """Return the tensor itself, or an expanded zero of its shape if it is on the meta device."""
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape) if tensor.is_meta else tensor


def _constant(tensor: Tensor) -> Tensor | None:
    """Return the tensor if it has values and is not a parameter, else None."""
    return None if isinstance(tensor, nn.Parameter) or tensor.is_meta else tensor


@functools.cache  # parses the source of some 500 functions; read-only afterwards
def _registry() -> Any:
    registry = new_registry(OPSET)
    for target, function in onnx_translations().items():
        registry.register_op(target, function)
    registry.register_op(_aten.unsqueeze.default, _unsqueeze_complex, is_complex=True)
    for operator, translation in TRANSLATIONS.items():
        registry.register_op(operator, translation)
    return registry


@functools.cache  # one registry for all
def _register(kind: type[DomainNode]) -> None:
    _registry().register_op(kind.target, translation_of(kind))


@functools.cache
def _register_replaced() -> None:
    from gralora_fx.exporters.translation import torch_operators

    for operator, translation in torch_operators.TRANSLATIONS.items():
        _registry().register_op(operator, translation)


def _unsqueeze_complex(tensor: Any, dim: int) -> Any:
    """Translate an unsqueeze of a complex tensor, whose last axis in ONNX is the pair of its parts."""
    return opset18.Unsqueeze(tensor, opset18.Constant(value_ints=[dim if dim >= 0 else dim - 1]))

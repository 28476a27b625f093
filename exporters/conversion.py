"""A traced graph as an ONNX model, operator by operator: the one file that touches the internals of `torch.onnx`.

The public `torch.onnx.export` traces and decomposes a program first, which takes most of its time and changes nothing
in a graph that is a clean trace already. Here only the translation is run.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx
from torch.onnx._internal.exporter import _core, _fx_passes, _ir_passes, _registration

import gralora_fx.tracing.attention  # noqa: F401  # registers its operator
from gralora_fx.errors import ExportError, first_line
from gralora_fx.exporters.weights import weight_tensor
from gralora_fx.tracing.clean import copy_graph
from gralora_fx.weight_views import tensor_at

DOMAIN = "gralora"  # of the attention operator, until a pass replaces it
OPSET = 18
IR_VERSION = 10

_aten = torch.ops.aten
# operators that take tensors of several dtypes as they are, or whose result has another by its meaning
_MIXED = {
    _aten._to_copy.default,
    _aten.embedding.default,
    _aten.gather.default,
    _aten.index.Tensor,
    _aten.index_select.default,
    _aten.masked_fill.Scalar,
    _aten.where.self,
    torch.ops.gralora.attention.default,
}
_CASTS = {_aten.to.dtype, _aten.to.device, _aten.to.dtype_layout, _aten.to.other}


def translate(graph_module: fx.GraphModule) -> ir.Model:
    """Translate a traced graph in evaluation mode; its weights become initializers under their own names.

    Inputs keep the names of the graph's placeholders, outputs those of its nodes. Attention (`gralora::attention`) is
    one node of the domain `gralora`, which ONNX Runtime does not know: a pass has to replace it.

    Args:
        graph_module: The graph, every node with the shape and dtype that tracing noted; it is left as it is.

    Raises:
        ExportError: An operator has no ONNX form; the message names it.
    """
    graph = copy_graph(graph_module)
    graph.set_codegen(fx.graph.CodeGen())
    weights: dict[str, tuple[str, Tensor]] = {}
    for node in list(graph.nodes):
        if node.op == "get_attr":
            tensor = tensor_at(graph_module, str(node.target))
            if tensor is None:
                raise ExportError(f"{node.target} of the graph is no tensor, so it has no ONNX form")
            weights[node.name] = str(node.target), tensor
            node.meta["val"], node.target = _stand_in(tensor), node.name
        elif node.target in _CASTS:
            _plain_cast(node)
        elif node.op == "call_function" and (functional := _functional(node.target)) is not None:
            _out_of_place(node, functional)
    module = fx.GraphModule({name: _stand_in(tensor) for name, (_, tensor) in weights.items()}, graph)
    model = ir.Model(ir.Graph([], [], nodes=[], name="main_graph"), ir_version=IR_VERSION)
    try:
        with _quiet():
            if any(_promotes(node) for node in module.graph.nodes):  # it runs the whole graph, which takes seconds
                _fx_passes.insert_type_promotion_nodes(module)
            options: dict[str, Any] = {"graph_like": model.graph, "owned_graphs": {}, "lower": "at_conversion"}
            _core._translate_fx_graph(module.graph, model, registry=_registry(), **options)
    except Exception as error:  # torch.onnx raises errors of every type
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = f"{first_line(error)} ({first_line(cause)})"
        raise ExportError(f"the graph cannot be converted to ONNX: {reason}") from error
    _ir_passes.add_opset_imports(model)
    for name, (target, tensor) in weights.items():
        initializer = model.graph.initializers.pop(name, None)
        if initializer is not None:
            initializer.name = target
            initializer.const_value = weight_tensor(target, tensor)
            model.graph.initializers[target] = initializer
    return model


def _stand_in(tensor: Tensor) -> Tensor:
    """A tensor to convert with: itself, or one of its shape without memory where the values come later."""
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape) if tensor.is_meta else tensor


def _plain_cast(node: fx.Node) -> None:
    """Turn a conversion into the one that has an ONNX form, or drop one that changes nothing."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    dtype = node.meta["val"].dtype
    if source.meta["val"].dtype == dtype:
        node.replace_all_uses_with(source)
        node.graph.erase_node(node)
        return
    node.target, node.args, node.kwargs = _aten._to_copy.default, (source,), {"dtype": dtype}


def _promotes(node: fx.Node) -> bool:
    """Whether an operator mixes dtypes, or makes floats of integers, which ONNX operators do not do by themselves."""
    result = node.meta.get("val")
    if node.op != "call_function" or node.target in _MIXED or not isinstance(result, Tensor):
        return False
    values = [arg.meta.get("val") for arg in node.all_input_nodes]
    dtypes = {value.dtype for value in values if isinstance(value, Tensor)}
    return len(dtypes) > 1 or (result.dtype != torch.bool and dtypes not in (set(), {result.dtype}))


def _functional(target: Any) -> Any:
    """The operator that makes a new tensor where `target` writes into its first argument; None where it does not."""
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return None
    name = target._schema.name.partition("::")[2]
    if not name.endswith("_"):
        return None
    return getattr(getattr(_aten, name.removesuffix("_"), None), target._overloadname, None)


def _out_of_place(node: fx.Node, functional: Any) -> None:
    """Let everything behind a write into a tensor read the operator's result instead."""
    written = node.args[0]
    assert isinstance(written, fx.Node)
    node.target = functional
    later = set()
    follower = node.next
    while follower.op != "root":
        later.add(follower)
        follower = follower.next
    written.replace_all_uses_with(node, delete_user_cb=lambda user: user in later)


def _registry() -> Any:
    registry = _registration.ONNXRegistry.from_torchlib(opset_version=OPSET)
    registry.register_op(torch.ops.gralora.attention.default, _attention)
    return registry


def _attention(
    query: Any, key: Any, value: Any, mask: Any, sinks: Any, scale: float, window: int, softcap: float, dropout: float
) -> Any:
    """`gralora.Attention(query, key, value, mask, sinks)` with attributes `scale`, `window`, `softcap`."""
    attributes = ir.convenience.convert_attributes({"scale": scale, "window": window, "softcap": softcap})
    node = ir.Node(DOMAIN, "Attention", [query, key, value, mask, sinks], attributes, num_outputs=1, version=1)
    tracer: Any = _core.current_tracer
    tracer.nodes.append(node)
    return node.outputs[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence notes about operators of packages that are not installed."""
    logger = logging.getLogger(_registration.__name__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)

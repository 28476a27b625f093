"""The fence around private API: every name is there with the signature that is relied on, and nobody else names one."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from source_files import FILES, ROOT, faults, nodes
from torch import fx, nn

from gralora_fx.base.compat import torch_graphs, torch_onnx

pytestmark = pytest.mark.quick

COMPAT = ROOT / "gralora_fx" / "base" / "compat"
# attributes of torch.fx and of operators, without a public name
ATTRIBUTES = {"_codegen", "_schema", "_body_transformer", "_enter_autocast", "_exit_autocast", "_PATCHES"}


@pytest.mark.parametrize("name", sorted(path.stem for path in COMPAT.glob("[a-z]*.py")))
def test_every_name_is_there(name: str) -> None:
    module = importlib.import_module(f"gralora_fx.base.compat.{name}")
    assert all(hasattr(module, name) for name in getattr(module, "__all__", ()))


@pytest.mark.parametrize(
    ("module", "name", "parameters"),
    [
        ("torch._guards", "detect_fake_mode", ["inputs"]),
        ("torch.multiprocessing.reductions", "StorageWeakRef", ["storage"]),
        ("torch.utils._pytree", "tree_map", ["func", "tree", "rests", "is_leaf"]),
        ("torch.utils._pytree", "tree_flatten", ["tree", "is_leaf"]),
        ("torch.utils._pytree", "tree_leaves", ["tree", "is_leaf"]),
        ("torch.utils._pytree", "tree_unflatten", ["leaves", "treespec"]),
        ("torch.autograd.graph", "_engine_run_backward", ["t_outputs"]),
        ("torch.utils.hooks", "BackwardHook", ["module", "user_hooks", "user_pre_hooks"]),
        ("torch.nn.modules.module", "BackwardHook", ["module", "user_hooks", "user_pre_hooks"]),
        ("torch.autograd", "_engine_run_backward", ["t_outputs"]),
        ("torch.cpu", "_is_avx512_bf16_supported", []),
        ("torch.cpu", "_is_amx_tile_supported", []),
        ("torch.amp.autocast_mode", "_enter_autocast", ["vals"]),
        ("torch.amp.autocast_mode", "_exit_autocast", ["mode"]),
        ("torch.onnx._internal.exporter._decomp", "get_onnx_implemented_overloads", ["registry"]),
        ("torch.onnx._internal.exporter._decomp", "create_onnx_friendly_decomposition_table", ["onnx_registered_ops"]),
        ("torch.onnx._internal.exporter._fx_passes", "insert_type_promotion_nodes", ["graph_module"]),
        ("torch.onnx._internal.exporter._ir_passes", "add_opset_imports", ["model"]),
        (
            "torch.onnx._internal.exporter._core",
            "_translate_fx_graph",
            ["fx_graph", "model", "graph_like", "owned_graphs", "lower", "registry"],
        ),
        ("transformers.exporters.exporter_dynamo", "get_auto_dynamic_shapes", ["inputs"]),
        ("transformers.exporters.exporter_dynamo", "register_pytree_node", ["object_cls"]),
        ("transformers.exporters.utils", "apply_fx_node_fixes", ["backend", "graph_module"]),
        ("transformers.exporters.utils", "get_leaf_tensors", ["obj"]),
        ("transformers.core_model_loading", "rename_source_key", ["source_key", "weight_renamings"]),
        ("transformers.conversion_mapping", "get_model_conversion_mapping", ["model"]),
        ("transformers.quantizers.quantizers_utils", "should_convert_module", ["full_name", "patterns"]),
    ],
)
def test_signatures_are_those_that_are_relied_on(module: str, name: str, parameters: list[str]) -> None:
    names = list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
    assert names[: len(parameters)] == parameters


def test_tables_of_transformers_are_of_the_form_that_is_read() -> None:
    utils = importlib.import_module("transformers.exporters.utils")
    onnx = importlib.import_module("transformers.exporters.exporter_onnx")
    assert utils._PATCHES["dynamo"]
    assert all(isinstance(patch[0], str) for patch in utils._PATCHES["dynamo"])
    assert all(callable(fix) for fix in onnx._IR_FIXES)
    assert onnx._ONNX_TRANSLATION_TABLE


def test_the_code_generator_of_a_graph() -> None:
    exported = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)).module()
    assert isinstance(exported, fx.GraphModule)
    assert list(torch_graphs.tree_info(exported.graph).orig_args) == ["input"]
    assert torch_graphs.tree_info(fx.symbolic_trace(nn.Linear(2, 2)).graph) is None
    assert torch_graphs.code_transformer(exported.graph) is None
    assert torch_graphs.is_mutable(torch.ops.aten.add_.Tensor)
    assert not torch_graphs.is_mutable(torch.ops.aten.add.Tensor)
    assert torch_graphs.base_name(torch.ops.aten.add_.Tensor) == "add_"


def test_the_registry_knows_operators() -> None:
    known = torch_onnx.operators_in(torch_onnx.new_registry(20))
    assert torch.ops.aten.add.Tensor in known
    assert torch.ops.aten.add.Tensor not in torch_onnx.decomposition_table(known)


def reading_graph() -> fx.Graph:
    """`return x + w, w`, of which every node has its value."""
    module = nn.Module()
    module.register_buffer("w", torch.tensor([1.0, 2.0]))
    graph = fx.Graph(module)
    x, w = graph.placeholder("x"), graph.get_attr("w")
    total = graph.call_function(torch.ops.aten.add.Tensor, (x, w))
    graph.output((total, w))
    for node in (x, w, total):
        node.meta["val"] = module.w
    return graph


def test_a_tensor_of_a_graph_becomes_an_initializer() -> None:
    model = ir.Model(ir.Graph([], [], nodes=[], name="main"), ir_version=10)
    torch_onnx.translate_graph(reading_graph(), model, model.graph, {}, torch_onnx.new_registry(20))
    (initializer,) = model.graph.initializers.values()
    assert initializer.const_value is not None
    assert initializer.const_value.numpy().tolist() == [1.0, 2.0]
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert model.graph.outputs[1] is initializer
    assert [node.op_type for node in model.graph] == ["Add"]


def test_a_tensor_of_a_function_becomes_a_constant() -> None:
    model = ir.Model(ir.Graph([], [], nodes=[], name="main"), ir_version=10)
    function = ir.Function("local", "part", graph=ir.Graph([], [], nodes=[]), attributes=[])
    torch_onnx.translate_graph(reading_graph(), model, function, {}, torch_onnx.new_registry(20))
    assert [value.name for value in function.inputs] == ["x"]
    assert [node.op_type for node in function] == ["Constant", "Add"]
    assert function.outputs[1] is function[0].outputs[0]


def _private(file: Path) -> Iterator[str]:
    for node in nodes(file):
        if isinstance(node, ast.Attribute) and node.attr in ATTRIBUTES:
            yield f".{node.attr}"
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else names
        for name in names:
            parts = name.split(".")
            is_private = parts[0] in ("torch", "transformers", "onnxruntime") and any(p[:1] == "_" for p in parts)
            if is_private or name.startswith(
                ("onnxruntime.capi", "transformers.exporters", "transformers.masking_utils", "transformers.core_model")
            ):
                yield name


def test_no_other_file_names_private_api() -> None:
    assert faults((file for file in FILES if "compat" not in file.parts), _private) == {}

"""Weights that are concatenated or transposed only when they are read or written."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from gralora_fx.exporters.formats import Blocks
from gralora_fx.exporters.quantize.plan import QuantizationPlan
from gralora_fx.exporters.rules.builder import static_dim
from gralora_fx.exporters.rules.products.float_matrices import merge_matmuls
from gralora_fx.exporters.rules.products.quantize_weights import QuantizeWeights
from gralora_fx.exporters.translation import weights
from gralora_fx.exporters.translation.weights import concat_tensor, parts_of, transposed_tensor

RNG = np.random.default_rng(0)


def matrix(rows: int, columns: int, dtype: type = np.float32) -> ir.TensorProtocol:
    return ir.tensor(RNG.standard_normal((rows, columns)).astype(dtype))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_concatenation_is_that_of_its_parts(dtype: type) -> None:
    parts = [matrix(3, width, dtype) for width in (2, 5, 1)]
    whole = concat_tensor("whole", parts)
    expected = np.concatenate([part.numpy() for part in parts], axis=1)
    assert (whole.name, list(whole.shape), whole.dtype) == ("whole", [3, 8], parts[0].dtype)
    assert np.array_equal(whole.numpy(), expected)
    assert whole.tobytes() == expected.tobytes()
    assert parts_of(whole) == tuple(parts)
    assert parts_of(parts[0]) == (parts[0],)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_transposed_matrix_is_written_row_by_row(
    dtype: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_WRITTEN_AT_ONCE", 16)
    source = matrix(3, 7, dtype)
    turned = transposed_tensor("turned", source)
    assert list(turned.shape) == [7, 3]
    assert np.array_equal(turned.numpy(), source.numpy().T)
    with (tmp_path / "values").open("wb") as file:
        turned.tofile(file)
    assert (tmp_path / "values").read_bytes() == np.ascontiguousarray(source.numpy().T).tobytes() == turned.tobytes()


def test_a_transposed_matrix_is_not_copied_to_be_written(tmp_path: Path) -> None:
    turned = transposed_tensor("turned", matrix(4096, 4096))
    with (tmp_path / "values").open("wb") as file:
        tracemalloc.start()
        turned.tofile(file)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 48 * 2**20  # of 64 MiB


def joint(widths: tuple[int, ...]) -> tuple[ir.Model, list[np.ndarray]]:
    """`[x @ w for w in ws]`, and the weights."""
    x = ir.Value(name="x", shape=ir.Shape(["n", 32]), type=ir.TensorType(ir.DataType.FLOAT))
    values, nodes = [], []
    for index, width in enumerate(widths):
        tensor = matrix(32, width)
        value = ir.Value(name=f"w{index}", shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        node = ir.node("MatMul", [x, value])
        node.outputs[0].name, node.outputs[0].type = f"y{index}", ir.TensorType(ir.DataType.FLOAT)
        node.outputs[0].shape = ir.Shape(["n", width])
        values.append(value)
        nodes.append(node)
    graph = ir.Graph([x], [n.outputs[0] for n in nodes], nodes=nodes, initializers=values, opset_imports={"": 23})
    return ir.Model(graph, ir_version=11), [value.const_value.numpy() for value in values]


def test_products_of_one_tensor_and_width_are_one(tmp_path: Path) -> None:
    import onnxruntime

    model, expected = joint((8, 4, 8, 8))
    assert merge_matmuls(model).changed == 2
    assert [node.op_type for node in model.graph] == ["MatMul", "Split", "MatMul"]
    assert {static_dim(node.inputs[1], 1) for node in model.graph if node.op_type == "MatMul"} == {24, 4}
    ir.save(model, tmp_path / "model.onnx")
    x = RNG.standard_normal((5, 32)).astype(np.float32)
    results = onnxruntime.InferenceSession(str(tmp_path / "model.onnx")).run(["y0", "y1", "y2", "y3"], {"x": x})
    for result, weight in zip(results, expected, strict=True):
        assert np.allclose(result, x @ weight, atol=1e-5)


def test_blocks_of_columns_are_those_of_each_part() -> None:
    quantize = QuantizeWeights(QuantizationPlan(Blocks(4, 16)))
    apart, _ = joint((8, 8))
    pad_prompts = ir.Model(apart.graph.clone(), ir_version=11)
    merge_matmuls(pad_prompts)
    for model in (apart, pad_prompts):
        quantize(model)
    alone = [apart.graph.initializers[f"w{index}_Q4"].const_value.numpy() for index in (0, 1)]
    (name,) = [name for name in pad_prompts.graph.initializers if name.endswith("_Q4")]
    assert np.array_equal(pad_prompts.graph.initializers[name].const_value.numpy(), np.concatenate(alone))

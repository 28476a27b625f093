"""Steps whose rows all have one adapter: the base is left out of the stack, and bits stay as they are beside others."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from damaged_exports import forget_digests
from numpy.typing import NDArray
from onnx import TensorProto, helper
from served_exports import CACHED, adapted

from gralora_fx.exporters import export_onnx
from gralora_fx.format.adapter_inputs import ADAPTER_IDS, FIRST_ADAPTER, AdapterInputs, AdapterSite
from gralora_fx.format.export_directory import ROWS_NAME
from gralora_fx.run.engine.adapters import Adapters
from gralora_fx.run.engine.cache_buffers import BufferedSteps
from gralora_fx.run.sessions.adapter_arrays import most_tokens_alone
from gralora_fx.serving import OrtModel, load

PROMPT, TEXT = [5, 9, 33, 71, 8], [12, 40, 3]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> OrtModel:
    """Two adapters over one base."""
    folder = tmp_path_factory.mktemp("lone")
    model, _ = adapted("llama", folder, CACHED)
    export_onnx(model, folder / "onnx", adapters="data", verify=False)
    return load(folder / "onnx", threads=2)


def logits_of(model: OrtModel, adapter: str | None, beside: str | None = None, *, rows: int = 1) -> NDArray[Any]:
    """Logits of the tokens of a row, alone or beside one of another adapter."""
    decoder = model.decoder(rows=rows, capacity=24)
    row = decoder.open(adapter=adapter)
    others = [decoder.open(adapter=beside) for _ in range(rows - 1)]
    reads = [PROMPT, *([token] for token in TEXT)]
    return np.stack([decoder.step({row: read, **dict.fromkeys(others, read)})[row] for read in reads])


def stacks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Return a list that gets each step's number of stacked tensors' adapters, and the id of the first."""
    seen: list[tuple[int, int]] = []
    run = BufferedSteps.__call__

    def noted(self: Any, arrays: Mapping[str, Any], adapters: Mapping[str, Any], rows: range | None = None) -> Any:
        first = arrays.get(FIRST_ADAPTER, np.zeros(1))
        seen.append((next(iter(adapters.values())).shape()[0], int(first[0])))
        return run(self, arrays, adapters, rows)

    monkeypatch.setattr(BufferedSteps, "__call__", noted)
    return seen


@pytest.mark.parametrize("adapter", ["small", "wide"])
def test_a_lone_row_has_the_bits_that_it_has_beside_others(
    data: OrtModel, adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = stacks(monkeypatch)
    alone = logits_of(data, adapter)
    assert seen == [(1, 1)] * 4
    beside_base = logits_of(data, adapter, None, rows=2)
    assert seen[4:] == [(2, 0)] * 4
    assert np.array_equal(alone, beside_base)
    assert np.array_equal(alone, logits_of(data, adapter, adapter, rows=3))
    assert seen[8:] == [(1, 1)] * 4
    assert np.array_equal(logits_of(data, None), logits_of(data, None, adapter, rows=2))


def test_an_earlier_export_has_the_base_in_all_stacks(
    data: OrtModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(data.directory, tmp_path / "onnx")
    path = tmp_path / "onnx" / ROWS_NAME
    model = onnx.load(path, load_external_data=False)
    model.graph.input.remove(next(value for value in model.graph.input if value.name == FIRST_ADAPTER))
    path.write_bytes(model.SerializeToString())
    forget_digests(tmp_path / "onnx")
    seen = stacks(monkeypatch)
    assert np.array_equal(logits_of(load(tmp_path / "onnx", threads=2), "wide"), logits_of(data, "wide"))
    assert seen == [(2, 0)] * 4 + [(1, 1)] * 4


def test_a_plain_session_may_name_the_first_adapter_or_not(data: OrtModel) -> None:
    session = onnxruntime.InferenceSession(data.directory / ROWS_NAME)
    feed = {
        value.name: np.zeros((2, value.shape[1], 16, value.shape[3]), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values.")
    }
    feed |= {"input_ids": np.array([[5, 9, 33], [71, 8, 0]]), "past_seqlens": np.zeros(2, np.int32)}
    feed["query_seqlens"] = np.array([3, 2], np.int32)
    stack = Adapters(data.directory, data.manifest).rows(["small", "wide"], 2)
    ids = stack.pop(ADAPTER_IDS)
    whole = {name: value.numpy() for name, value in stack.items()}
    (expected,) = session.run(["logits"], {**feed, **whole, ADAPTER_IDS: ids})
    rest = {name: array[1:] for name, array in whole.items()}
    (found,) = session.run(["logits"], {**feed, **rest, ADAPTER_IDS: ids, FIRST_ADAPTER: np.array([1])})
    assert np.array_equal(found, expected)


@pytest.mark.quick
@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("width", [64, 576, 1536, 8192])
@pytest.mark.parametrize("rank", [2, 8, 16, 32, 64])
def test_few_enough_tokens_give_the_same_bits_in_a_stack_of_one(width: int, rank: int, k: int) -> None:
    site = AdapterSite("up", width, width // 2)
    inputs = AdapterInputs("stacked", k, "float32", (site,))
    most = most_tokens_alone([(rank, 0) if k else (0, rank)], inputs)
    shapes = [shape for shape in site.shapes(k, rank if k else 0, 0 if k else rank).values() if 0 not in shape]
    for shape in shapes:
        for tokens in {tokens for tokens in (2, 3, 8, 40, most) if tokens <= min(most, 64)}:
            *lead, length, columns = map(int, shape)
            generator = np.random.default_rng(tokens)
            x = generator.standard_normal((3, *lead, tokens, length), np.float32)
            stack = generator.standard_normal((3, *lead, length, columns), np.float32)
            alone, beside = product(x[1:2], stack[1:2]), product(x, stack)[1:2]
            assert np.array_equal(alone, beside), (shape, tokens)


def product(x: NDArray[Any], stack: NDArray[Any]) -> Any:
    """Multiply on four threads."""
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * x.ndim) for name in ("x", "stack")]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "stack"], ["y"])], "product", inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return session.run(None, {"x": np.ascontiguousarray(x), "stack": np.ascontiguousarray(stack)})[0]

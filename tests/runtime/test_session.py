"""Weights outside the export directory are refused, whatever the trick."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from gralora_fx.errors import ExportError
from gralora_fx.run.sessions.session import open_session


def write_model(folder: Path, location: str) -> None:
    """Write a model that adds a vector kept in the external file `location`."""
    weight = numpy_helper.from_array(np.arange(4, dtype=np.float32), "w")
    weight.data_location = TensorProto.EXTERNAL
    weight.ClearField("raw_data")
    for key, value in (("location", location), ("offset", "0"), ("length", "16")):
        entry = weight.external_data.add()
        entry.key, entry.value = key, value
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (folder / "model.onnx").write_bytes(model.SerializeToString())


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret.bin"
    path.write_bytes(np.ones(4, dtype=np.float32).tobytes())
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "export"
    path.mkdir()
    return path


def test_a_plain_file_beside_the_model_opens(folder: Path) -> None:
    write_model(folder, "weights.bin")
    (folder / "weights.bin").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    result = open_session(folder).run(None, {"x": np.ones(4, dtype=np.float32)})[0]
    assert result.tolist() == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("location", ["../secret.bin", "sub/../../secret.bin"])
def test_a_path_out_of_the_directory_is_refused(folder: Path, secret: Path, location: str) -> None:
    write_model(folder, location)
    with pytest.raises(ExportError, match="outside its directory"):
        open_session(folder)


def test_an_absolute_path_is_refused(folder: Path, secret: Path) -> None:
    write_model(folder, str(secret))
    with pytest.raises(ExportError, match="outside its directory"):
        open_session(folder)


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_link_is_refused(folder: Path, secret: Path, link: object) -> None:
    write_model(folder, "weights.bin")
    link(secret, folder / "weights.bin")  # type: ignore[operator]
    with pytest.raises(ExportError, match="is a link"):
        open_session(folder)


def test_a_missing_data_file_is_named(folder: Path) -> None:
    write_model(folder, "weights.bin")
    with pytest.raises(ExportError, match=r"weights.bin is missing"):
        open_session(folder)


def test_no_model_and_no_onnx_are_named(folder: Path) -> None:
    with pytest.raises(ExportError, match=r"no model.onnx in"):
        open_session(folder)
    (folder / "model.onnx").write_bytes(b"nonsense")
    with pytest.raises(ExportError, match=r"is not an ONNX model|cannot load"):
        open_session(folder)


def test_the_helper_writes_valid_models(folder: Path) -> None:
    write_model(folder, "weights.bin")
    (folder / "weights.bin").write_bytes(bytes(16))
    onnx.checker.check_model(str(folder / "model.onnx"))


def external(name: str, location: str) -> onnx.TensorProto:
    tensor = numpy_helper.from_array(np.arange(4, dtype=np.float32), name)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.ClearField("raw_data")
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", location
    return tensor


@pytest.mark.parametrize("holder", ["sparse", "constant", "function", "branch"])
def test_weights_are_found_wherever_a_model_keeps_them(folder: Path, holder: str) -> None:
    write_model(folder, "weights.bin")
    (folder / "weights.bin").write_bytes(bytes(16))
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    tensor = external("secret", "../secret.bin")
    constant = helper.make_node("Constant", [], ["c"], value=tensor)
    if holder == "sparse":
        model.graph.sparse_initializer.add().values.CopyFrom(tensor)
    elif holder == "constant":
        model.graph.node.append(constant)
    elif holder == "function":
        model.functions.append(helper.make_function("own", "F", [], ["c"], [constant], [helper.make_opsetid("", 20)]))
    else:
        branch = helper.make_graph([constant], "b", [], [], [])
        model.graph.node.append(helper.make_node("If", ["x"], [], then_branch=branch, else_branch=branch))
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match=r"keeps weights at '../secret.bin', outside its directory"):
        open_session(folder)


def test_a_part_compiled_elsewhere_is_refused(folder: Path) -> None:
    """Its attributes name a file, which some execution providers load."""
    node = helper.make_node("EPContext", [], [], name="part", domain="com.microsoft", ep_cache_context="../secret.bin")
    model = helper.make_model(helper.make_graph([node], "g", [], []), ir_version=10)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match=r"holds a part compiled elsewhere \(EPContext 'part'\)"):
        open_session(folder)

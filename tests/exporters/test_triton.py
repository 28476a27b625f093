"""Triton repositories: Triton's own parser takes the configuration, by which ONNX Runtime answers as `serving.load`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from google.protobuf import text_format
from served_exports import adapted, chat_tokenizer, decoders
from tiny_models import text_batch
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import triton_to_np_dtype
from typer.testing import CliRunner

from gralora_fx import trace
from gralora_fx.cli import app
from gralora_fx.errors import ExportError, GraloraError
from gralora_fx.exporters import export_onnx, export_triton
from gralora_fx.serving import load

MODES = ("merged", "data", "inputs")
SIZES: dict[str, Any] = {"num_labels": 3, "id2label": {0: "sport", 1: "fine art", 2: "law"}, "pad_token_id": 0}
BATCH = 5


class Triton:
    """A model of a repository, run by what its configuration says, with the checks of Triton's ONNX Runtime backend."""

    def __init__(self, folder: Path) -> None:
        self.config = text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
        assert (self.config.name, self.config.backend) == (folder.name, "onnxruntime")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(folder / "1" / "model.onnx"), options)
        required = self.session.get_inputs()
        values = {value.name: value for value in (*required, *self.session.get_overridable_initializers())}
        self.is_batching = self.config.max_batch_size > 0
        assert {entry.name for entry in self.config.input if not entry.optional} == {value.name for value in required}
        for entry in self.config.input:
            assert not (entry.optional and self.is_batching)
            assert self._shape(entry) == self._sizes(values[entry.name])
        assert [entry.name for entry in self.config.output] == [value.name for value in self.session.get_outputs()]
        for entry, value in zip(self.config.output, self.session.get_outputs(), strict=True):
            assert self._shape(entry) == self._sizes(value)

    def _shape(self, entry: Any) -> list[int]:
        """Return the model's shape of a tensor, as the configuration says it."""
        dims = list(entry.reshape.shape) if entry.HasField("reshape") else list(entry.dims)
        return [-1, *dims] if self.is_batching else dims

    @staticmethod
    def _sizes(value: Any) -> list[int]:
        return [size if isinstance(size, int) else -1 for size in value.shape]

    def infer(self, **request: Any) -> dict[str, Any]:
        """Return the outputs for arrays in the shapes that a client gives."""
        feed = {}
        for entry in self.config.input:
            if entry.optional and entry.name not in request:
                continue
            array = request.pop(entry.name)
            assert array.dtype == triton_to_np_dtype(model_config_pb2.DataType.Name(entry.data_type)[5:])
            own = array.shape[1:] if self.is_batching else array.shape
            assert len(own) == len(entry.dims)
            assert all(dim in (-1, size) for dim, size in zip(entry.dims, own, strict=True))
            if self.is_batching:
                assert len(array) <= self.config.max_batch_size
            feed[entry.name] = array.reshape(len(array)) if entry.HasField("reshape") else array
        assert not request
        names = [entry.name for entry in self.config.output]
        return dict(zip(names, self.session.run(names, feed), strict=True))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str | None, Any]]:
    """Return a folder with an export in each mode, and the oracles by adapter."""
    folder = tmp_path_factory.mktemp("triton")
    model, oracles = adapted("bert", folder, targets=["query", "value", "dense"], **SIZES)
    for mode in MODES:
        export_onnx(model, folder / mode, adapters=mode, verify=False, tokenizer=chat_tokenizer())  # type: ignore[arg-type]
    return folder, oracles


@pytest.fixture(scope="module")
def repository(exported: tuple[Path, dict[str | None, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("repository")
    for mode in MODES:
        export_triton(exported[0] / mode, path)
    return path


def numpy_batch() -> dict[str, Any]:
    return {name: value.numpy() for name, value in text_batch(BATCH, 7).items()}


def request_of(triton: Triton) -> dict[str, Any]:
    """Return a batch with every text input that the model takes."""
    batch = numpy_batch()
    batch.setdefault("token_type_ids", np.zeros_like(batch["input_ids"]))
    return {entry.name: batch[entry.name] for entry in triton.config.input if entry.name in batch}


def reference(oracle: Any) -> Any:
    with torch.no_grad():
        return oracle(**text_batch(BATCH, 7)).logits.numpy()


@pytest.mark.quick
def test_a_merged_export(repository: Path, exported: tuple[Path, dict[str | None, Any]]) -> None:
    triton = Triton(repository / "merged")
    assert triton.config.max_batch_size == 8
    assert triton.config.HasField("dynamic_batching")
    expected = load(exported[0] / "merged")(**numpy_batch())["logits"]
    assert np.array_equal(triton.infer(**request_of(triton))["logits"], expected)


def test_rows_choose_adapters_by_id(repository: Path, exported: tuple[Path, dict[str | None, Any]]) -> None:
    folder, oracles = exported
    triton = Triton(repository / "data")
    assert [entry.name for entry in triton.config.input][-1] == "adapter_ids"
    assert len(triton.config.input) == 4
    ids = json.loads((repository / "data" / "adapters.json").read_text())
    assert ids == json.loads(triton.config.parameters["adapters"].string_value) == {"small": 1, "wide": 2}
    rows = [None, "wide", "small", "wide", None]
    column = np.array([[0 if name is None else ids[name]] for name in rows])
    found = triton.infer(**request_of(triton), adapter_ids=column)["logits"]
    assert np.array_equal(found, load(folder / "data")(**numpy_batch(), adapter=rows)["logits"])
    for index, name in enumerate(rows):
        assert np.abs(found[index] - reference(oracles[name])[index]).max() <= 1e-4


def test_adapters_are_optional_inputs_of_an_export_whose_rows_cannot_differ(
    exported: tuple[Path, dict[str | None, Any]], tmp_path: Path
) -> None:
    folder, oracles = exported
    shutil.copytree(folder / "data", tmp_path / "data")
    manifest = json.loads((tmp_path / "data" / "gralora_export.json").read_text())
    manifest["rows"] = {"file": None, "reason": "of this test"}
    (tmp_path / "data" / "model_rows.onnx").unlink()
    del manifest["files"]["model_rows.onnx"]
    (tmp_path / "data" / "gralora_export.json").write_text(json.dumps(manifest))
    report = export_triton(tmp_path / "data", tmp_path / "repository")
    assert "no requests run together, and each gives its adapter's tensors" in report.details
    assert "no model_rows.onnx: of this test" in report.details
    given = folder / "data" / "adapters" / "small.onnx_adapter"
    with pytest.raises(ExportError, match=r"no adapter can become a part of .*: it has no model_rows\.onnx: of this"):
        export_triton(tmp_path / "data", tmp_path / "repository", adapters={"more": given})
    triton = Triton(tmp_path / "repository" / "data")
    assert not triton.config.HasField("dynamic_batching")
    for name, oracle in oracles.items():
        tensors = {}
        if name is not None:
            file = folder / "data" / "adapters" / f"{name}.onnx_adapter"
            values = onnxruntime.AdapterFormat.read_adapter(str(file)).get_parameters()
            tensors = {key: value.numpy() for key, value in values.items()}
        found = triton.infer(**request_of(triton), **tensors)["logits"]
        assert np.array_equal(found, load(folder / "data")(**numpy_batch(), adapter=name)["logits"])
        assert np.abs(found - reference(oracle)).max() <= 1e-4


def test_adapters_are_inputs(repository: Path, exported: tuple[Path, dict[str | None, Any]]) -> None:
    """A part that an adapter lacks is given as zeros of rank 1, so that no axis has size 0."""
    folder, oracles = exported
    triton = Triton(repository / "inputs")
    file = folder / "inputs" / "adapters" / "wide.onnx_adapter"
    values = onnxruntime.AdapterFormat.read_adapter(str(file)).get_parameters()
    tensors = {key: value.numpy() for key, value in values.items()}
    for name, tensor in tensors.items():
        if 0 in tensor.shape:  # no plain LoRA part
            tensors[name] = np.zeros([size or 1 for size in tensor.shape], tensor.dtype)
    found = triton.infer(**request_of(triton), **tensors)["logits"]
    assert np.abs(found - reference(oracles["wide"])).max() <= 1e-4


def test_the_files(repository: Path) -> None:
    assert sorted(path.name for path in repository.iterdir()) == sorted(MODES)
    labels = (repository / "merged" / "labels.txt").read_text().splitlines()
    assert labels == ["sport", "fine art", "law"]
    (output,) = Triton(repository / "merged").config.output
    assert (output.label_filename, list(output.dims)) == ("labels.txt", [3])


def test_the_command(exported: tuple[Path, dict[str | None, Any]], tmp_path: Path) -> None:
    folder, oracles = exported
    again = folder / "data" / "adapters" / "wide.onnx_adapter"
    arguments = ["export-triton", str(folder / "data"), "--output", str(tmp_path), "--name", "news"]
    arguments += ["--adapter", f"again={again}", "--max-batch", "5", "--threads", "2", "-v"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0
    assert "adapter_ids: 0 the base, 1 small, 2 wide, 3 again" in done.stdout
    assert "note: requests run together only if their shapes are equal" in done.stdout
    triton = Triton(tmp_path / "news")
    assert triton.config.max_batch_size == 5
    assert triton.config.parameters["intra_op_thread_count"].string_value == "2"
    found = triton.infer(**request_of(triton), adapter_ids=np.full((BATCH, 1), 3))["logits"]
    assert np.abs(found - reference(oracles["wide"])).max() <= 1e-4
    refused = CliRunner().invoke(app, arguments).exception
    assert isinstance(refused, ExportError)
    assert "overwrite=True" in str(refused)
    assert CliRunner().invoke(app, [*arguments, "--overwrite"]).exit_code == 0


def test_a_model_without_a_free_batch(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(4, 3))
    export_onnx(trace(net, (torch.ones(2, 4),), dynamic=False), tmp_path / "fixed", verify=False)
    report = export_triton(tmp_path / "fixed", tmp_path / "repository")
    triton = Triton(tmp_path / "repository" / "fixed")
    assert triton.config.max_batch_size == 0
    assert "no requests run together, since not every input and output has a batch" in report.details
    (name,) = [entry.name for entry in triton.config.input]
    (found,) = triton.infer(**{name: np.ones((2, 4), np.float32)}).values()
    assert np.abs(found - net(torch.ones(2, 4)).numpy(force=True)).max() <= 1e-6


def test_bad_input(exported: tuple[Path, dict[str | None, Any]], tmp_path: Path) -> None:
    folder = exported[0]

    def error(mode: str, **options: Any) -> str:
        with pytest.raises(GraloraError) as found:
            export_triton(folder / mode, options.pop("output", tmp_path / "out"), **options)
        assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
        return str(found.value)

    own = folder / "data" / "adapters" / "wide.onnx_adapter"
    assert "gralora_export.json" in error("none")
    assert "'a/b' is not a name for a model: take" in error("merged", name="a/b")
    assert "'..' is not a name" in error("merged", name="..")
    assert "max_batch must be a whole number of at least 1, but got 0" in error("merged", max_batch=0)
    assert "threads must be" in error("merged", threads=True)
    assert "exported with adapters='merged'" in error("merged", adapters={"a": own})
    assert "exported with adapters='inputs'" in error("inputs", adapters={"a": own})
    assert "has an adapter 'wide' of its own" in error("data", adapters={"wide": own})
    assert "is not a name for an adapter" in error("data", adapters={"a/b": own})
    assert "is not an .onnx_adapter file" in error("data", adapters={"a": tmp_path})
    assert "no none.json beside" in error("data", adapters={"a": tmp_path / "none.onnx_adapter"})
    assert "is the input" in error("merged", output=folder)
    other = tmp_path / "other"
    shutil.copytree(folder / "data", other)
    (other / "model.onnx_data").write_bytes(b"")
    assert "is not what was exported" in error(str(other))


def test_adapters_of_another_base(exported: tuple[Path, dict[str | None, Any]], tmp_path: Path) -> None:
    model, _ = adapted("bert", tmp_path, targets=["query"], num_labels=3, pad_token_id=0, hidden_size=16)
    export_onnx(model, tmp_path / "other", adapters="data", verify=False)
    file = tmp_path / "other" / "adapters" / "small.onnx_adapter"
    with pytest.raises(ExportError, match="does not fit this export"):
        export_triton(exported[0] / "data", tmp_path / "out", adapters={"other": file})


def test_a_model_with_a_cache(tmp_path: Path) -> None:
    paths, _ = decoders(tmp_path, "merged")
    with pytest.raises(ExportError, match="keeps no cache between steps; serve it with gralora-fx serve"):
        export_triton(paths["merged"], tmp_path / "out")

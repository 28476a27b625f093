"""The form of exports that take adapters as data, and the faults that their verification notices."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from adapters_as_data import KINDS, Exports, add, arrays, expected_of, output_of
from damaged_exports import forget_digests
from traces import fresh_trace, relative_error

from gralora_fx import GraloraConfig, GraloraModel, rewrite
from gralora_fx.errors import ExportError
from gralora_fx.exporters import export_onnx, verify_onnx
from gralora_fx.exporters.rules.adapters import insert_adapters
from gralora_fx.format.adapter_inputs import AdapterSite
from gralora_fx.format.adapter_paths import record_path
from gralora_fx.format.manifest import read_manifest
from gralora_fx.run.sessions.adapter_file import read_record, read_tensors, record_of, write_tensors

CACHED = "text-generation-with-past"
FILES = {"t5": ("encoder_model.onnx", "decoder_model_merged.onnx")}


def decoder(targets: Any, **options: Any) -> GraloraModel:
    """Return a decoder with a random adapter."""
    config = {"r": 4, "hybrid_r": 2, "alpha": 8, "init_weights": False}
    return rewrite(fresh_trace("llama", task=CACHED), GraloraConfig(target_modules=targets, **{**config, **options}))


# -- the tensors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "mode"), [("llama", "data"), ("bert", "data"), ("llama", "inputs")])
def test_tensors_have_the_names_and_shapes_of_the_contract(exports: Exports, name: str, mode: str) -> None:
    served = exports.adapted(name, 2, mode)
    session, inputs = served.session, served.manifest.adapter_inputs
    assert inputs is not None
    assert (inputs.mode, inputs.k, inputs.dtype) == (mode, 2, "float32")
    taken = session.get_inputs() if mode == "inputs" else session.get_overridable_initializers()
    shapes = {value.name: value.shape for value in taken if ".gralora_" in value.name}
    expected: dict[str, list[Any]] = {}
    for site in inputs.sites:
        path, width, out = site.path, site.in_features, site.out_features
        r, hybrid_r = f"{path}.r", f"{path}.hybrid_r"
        expected[f"{path}.gralora_A"] = [2, width // 2, r]
        expected[f"{path}.gralora_B"] = [2, r, out // 2]
        expected[f"{path}.gralora_A_general"] = [width, hybrid_r]
        expected[f"{path}.gralora_B_general"] = [hybrid_r, out]
    assert shapes == expected
    assert {value.type for value in taken if value.name in shapes} == {"tensor(float)"}


def test_defaults_of_overridable_tensors_have_rank_0(exports: Exports) -> None:
    served = exports.adapted("llama", 2)
    graph = onnx.load(served.directory / "model.onnx", load_external_data=False).graph
    defaults = {tensor.name: list(tensor.dims) for tensor in graph.initializer if ".gralora_" in tensor.name}
    inputs = served.manifest.adapter_inputs
    assert inputs is not None
    assert defaults == {
        name: list(shape) for site in inputs.sites for name, shape in site.shapes(inputs.k, 0, 0).items()
    }
    required = onnx.load(exports.adapted("llama", 2, "inputs").directory / "model.onnx", load_external_data=False).graph
    assert not [tensor.name for tensor in required.initializer if ".gralora_" in tensor.name]


# -- the graph ---------------------------------------------------------------------------------------------------------


def operators(directory: Path, file: str) -> tuple[Counter[str], Counter[str]]:
    """Count the nodes of each operator in a graph with its branches and the bodies of its functions; no constants."""
    model = onnx.load(directory / file, load_external_data=False)
    inside = Counter(node.op_type for function in model.functions for node in function.node)
    nodes = [*model.graph.node]
    for node in nodes:
        nodes += [inner for attribute in node.attribute for inner in attribute.g.node]
    return Counter(node.op_type for node in nodes if node.op_type != "Constant"), inside


@pytest.mark.parametrize("name", list(KINDS))
def test_the_base_graph_is_kept_beside_few_nodes(exports: Exports, name: str) -> None:
    served = exports.adapted(name, 2)
    inputs = served.manifest.adapter_inputs
    assert inputs is not None
    calls = 0
    for file in FILES.get(name, ("model.onnx",)):
        ours, inside = operators(served.directory, file)
        theirs, _ = operators(exports.base(name).directory, file)
        added = ours - theirs
        assert not theirs - ours  # every fused operator of the base is there
        adapters = sum(count for operator, count in added.items() if operator.startswith("Adapter_k2_"))
        assert set(added) - {"Sum", "Concat", "Split"} == {op for op in added if op.startswith("Adapter_k2_")}
        assert added["Concat"] <= 2 * added["Sum"]
        assert sum(added.values()) <= 8 * adapters
        assert not {"Shape", "Gather", "Concat", "Slice", "Einsum"} & set(inside)
        calls += adapters
    called_again = {"albert": 3, "perceptron": 1}.get(name, 0)  # calls after the first one
    assert calls == len(inputs.sites) + called_again


@pytest.mark.parametrize(
    ("name", "fused"),
    [
        ("llama", {"GroupQueryAttention": 2}),
        ("gpt2", {"GroupQueryAttention": 2}),
        ("bert", {"MultiHeadAttention": 2}),
        ("vit", {"MultiHeadAttention": 2}),
    ],
)
def test_fusions_stay(exports: Exports, name: str, fused: dict[str, int]) -> None:
    ours, _ = operators(exports.adapted(name, 2).directory, "model.onnx")
    theirs, _ = operators(exports.base(name).directory, "model.onnx")
    assert {operator: ours[operator] for operator in fused} == fused
    assert ours["MatMul"] == theirs["MatMul"]
    if name == "llama":
        assert ours["MatMul"] == 2 * 4 + 1  # q, k and v in one; o; gate and up; down; the head


def test_packed_layers_of_which_some_have_adapters_stay_packed(exports: Exports) -> None:
    ours, _ = operators(exports.adapted("llama-q-v", 2).directory, "model.onnx")
    theirs, _ = operators(exports.base("llama-q-v").directory, "model.onnx")
    assert ours - theirs == {"Adapter_k2_3d": 4, "Sum": 4, "Split": 2, "Concat": 2}


# -- other runtimes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_plain_onnxruntime_takes_the_file(exports: Exports, name: str, tmp_path: Path) -> None:
    kind, served = KINDS[name], exports.adapted(name, 2)
    fields = {"r": 4, "gralora_k": 2, "hybrid_r": 2, "target_modules": kind.targets}
    add(served, kind, tmp_path / "a", "plain", **fields)
    expected = served(adapter="plain", **arrays(kind.batch()))
    adapter, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    adapter.Load(str(served.directory / "adapters" / "plain.onnx_adapter"))
    options.add_active_adapter(adapter)
    session = onnxruntime.InferenceSession(served.directory / "model.onnx")
    feed = {**arrays(kind.batch())}
    for value in session.get_inputs():
        if value.name not in feed:
            feed[value.name] = _left_out(value, feed["input_ids"].shape)
    results = session.run(None, feed, options)
    for output, result in zip(served.output_names, results, strict=True):
        assert np.allclose(result, expected[output], rtol=0, atol=1e-6), output


def _left_out(value: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Return an input that serving fills in: positions, token types, an empty cache."""
    if value.name == "position_ids":
        return np.broadcast_to(np.arange(shape[1]), shape).astype(np.int64)
    if value.name == "token_type_ids":
        return np.zeros(shape, np.int64)
    return np.zeros((shape[0], value.shape[1], 0, value.shape[3]), np.float32)


# -- precision and quantization ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["data", "inputs"])
@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"precision": "fp16"}, "float16"),
        ({"precision": "bf16"}, "bfloat16"),
        ({"quantize": "int4", "block_size": 16}, "float32"),
        ({"quantize": "int8", "block_size": 16}, "float32"),
        ({"quantize": "int4", "block_size": 16, "precision": "fp16"}, "float16"),
    ],
)
def test_other_precisions_pass_verification(options: dict[str, Any], dtype: str, mode: Any, tmp_path: Path) -> None:
    model = decoder(["q_proj", "v_proj", "down_proj"])
    report = export_onnx(model, tmp_path / "onnx", adapters=mode, **options)
    assert report.verification is not None
    assert report.verification.passed
    assert read_record(tmp_path / "onnx" / "adapters" / "default.onnx_adapter").dtype == dtype


@pytest.mark.parametrize("options", [{"precision": "fp16"}, {"quantize": "int8", "block_size": 16}])
def test_other_precisions_are_near_peft(exports: Exports, options: dict[str, Any], tmp_path: Path) -> None:
    kind, served = KINDS["llama"], exports.adapted("llama", 2, **options)
    wrapped = add(served, kind, tmp_path / "a", "near", r=4, gralora_k=2, alpha=8, target_modules=kind.targets)
    expected = expected_of(wrapped, kind)
    with wrapped.disable_adapter():
        moved = relative_error(expected_of(wrapped, kind), expected)
    assert relative_error(output_of(served, kind, "near"), expected) < min(0.02, 0.2 * moved)


# -- what verification notices -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory) -> tuple[GraloraModel, Path]:
    model, path = decoder(["q_proj", "k_proj", "o_proj"]), tmp_path_factory.mktemp("verified") / "onnx"
    assert export_onnx(model, path, adapters="data").verification.passed  # type: ignore[union-attr]
    return model, path


def test_each_active_adapter_and_the_base_are_compared(verified: tuple[GraloraModel, Path]) -> None:
    report = verify_onnx(verified[1], verified[0], "quick")
    assert report.passed
    assert {name: compared.passed for name, compared in report.adapters.items()} == {"default": True}


def test_an_altered_tensor_is_noticed(verified: tuple[GraloraModel, Path], tmp_path: Path) -> None:
    model, path = verified
    shutil.copytree(path, tmp_path / "onnx")
    manifest, file = read_manifest(path), tmp_path / "onnx" / "adapters" / "default.onnx_adapter"
    assert manifest.adapter_inputs is not None
    record = read_record(file)
    tensors = read_tensors(file, record, manifest.adapter_inputs, manifest.base_fingerprint, ExportError)
    name = "model.layers.1.self_attn.o_proj.gralora_B"
    tensors[name] = tensors[name].copy()
    tensors[name].flat[3] += 1e-3
    write_tensors(file, tensors)
    altered = record_of(file, "default", tensors, record.config, manifest.adapter_inputs, manifest.base_fingerprint)
    record_path(file).write_text(altered.to_json())
    forget_digests(tmp_path / "onnx")
    with pytest.raises(ExportError, match=r"another adapter than the model's 'default': .*o_proj\.gralora_B differ"):
        verify_onnx(tmp_path / "onnx", model, "quick")


@pytest.mark.parametrize("part", ["gralora_A", "gralora_B_general"])
def test_an_adapter_at_the_wrong_place_is_noticed(
    verified: tuple[GraloraModel, Path], part: str, tmp_path: Path
) -> None:
    """The base is right, and so are the tensors: only a run with the adapter shows it."""
    model, path = verified
    shutil.copytree(path, tmp_path / "onnx")
    graph = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False)
    wrong = {f"model.layers.{layer}.self_attn.q_proj.{part}": 1 - layer for layer in (0, 1)}
    for node in graph.graph.node:
        for index, name in enumerate(node.input):
            if name in wrong:
                node.input[index] = f"model.layers.{wrong[name]}.self_attn.q_proj.{part}"
    onnx.save(graph, tmp_path / "onnx" / "model.onnx")
    forget_digests(tmp_path / "onnx")
    report = verify_onnx(tmp_path / "onnx", model, "quick")
    assert not report.passed
    assert not report.adapters["default"].passed
    assert max(tensor.max_rel_error for tensor in report.tensors) < 1e-4


def test_an_export_with_adapters_at_the_wrong_place_is_not_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    taken = insert_adapters._Insertion._tensors

    def of_the_other_layer(self: Any, site: AdapterSite) -> Any:
        return taken(self, self.sites[site.path.translate(str.maketrans("01", "10"))])

    monkeypatch.setattr(insert_adapters._Insertion, "_tensors", of_the_other_layer)
    with pytest.raises(ExportError, match="differ"):
        export_onnx(decoder(["q_proj", "o_proj"]), tmp_path / "onnx", adapters="data")
    assert not (tmp_path / "onnx").exists()


def test_an_adapter_that_the_export_lacks_is_named(verified: tuple[GraloraModel, Path]) -> None:
    model, path = verified
    torch.manual_seed(1)
    model.add_adapter("another", GraloraConfig(r=2, target_modules=["q_proj"], init_weights=False))
    model.set_adapter("another")
    try:
        with pytest.raises(
            ExportError, match=r"'another' is not in .*, which has default; .*add it with export_adapter"
        ):
            verify_onnx(path, model, "quick")
    finally:
        model.set_adapter("default")
        model.delete_adapter("another")

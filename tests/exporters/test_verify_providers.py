"""Verification on an execution provider: its tolerance, what the report names, and faults that it must still see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
import pytest
from damaged_exports import forget_digests
from traces import fresh_trace
from typer.testing import CliRunner

from gralora_fx import TracedModel
from gralora_fx.cli import app
from gralora_fx.errors import ConfigError, ExportError, ServingError
from gralora_fx.exporters import export_onnx, verify_onnx
from gralora_fx.exporters.verify.tolerances import arithmetic_of, tolerance_of
from gralora_fx.run.sessions.plugins import Device
from gralora_fx.run.sessions.session import Runtime

CPU, AZURE, OPENVINO = "CPUExecutionProvider", "AzureExecutionProvider", "OpenVINOExecutionProvider"
F32 = {"load_config": {"CPU": {"INFERENCE_PRECISION_HINT": "f32"}}}
EXACT = {"load_config": {"CPU": {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}}}
BF16 = {"load_config": {"CPU": {"INFERENCE_PRECISION_HINT": "bf16"}}}


@pytest.fixture(scope="module")
def model() -> TracedModel:
    return fresh_trace("bert")


@pytest.fixture(scope="module")
def export(model: TracedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bert") / "onnx"
    export_onnx(model, path, verify=False)
    return path


def test_the_report_names_the_provider_and_its_nodes(export: Path, model: TracedModel) -> None:
    assert verify_onnx(export, model).provider is None
    alone = verify_onnx(export, model, providers=CPU)
    assert alone.passed
    assert f"run on {CPU} {onnxruntime.__version__} on CPU\n" in alone.details
    report = verify_onnx(export, model, providers=[AZURE, CPU])
    assert (report.passed, report.tolerance, report.arithmetic) == (True, 1e-4, "fp32")
    assert report.provider is not None
    assert (report.provider.name, report.provider.version) == (AZURE, onnxruntime.__version__)
    assert (report.provider.nodes[AZURE], report.provider.nodes[CPU]["LayerNormalization"]) == ({}, 5)
    assert f"run on {AZURE} {onnxruntime.__version__}; nodes: {AZURE} 0, {CPU} " in report.details
    assert report.to_dict()["provider"]["nodes"][CPU]["LayerNormalization"] == 5


@pytest.mark.parametrize(
    ("providers", "precision", "expected"),
    [
        ([(CPU, {})], "fp32", "fp32"),
        ([(CPU, {})], "fp16", "fp16"),
        ([("CUDAExecutionProvider", {}), (CPU, {})], "fp32", "tf32"),
        ([("CUDAExecutionProvider", {"use_tf32": 0})], "fp32", "fp32"),
        ([("CUDAExecutionProvider", {"use_tf32": "0"})], "fp16", "fp16"),
        ([("TensorrtExecutionProvider", {"trt_fp16_enable": True})], "fp32", "fp16"),
        ([("CoreMLExecutionProvider", {}), (CPU, {})], "fp32", "fp16"),
        ([("QNNExecutionProvider", {})], "fp32", "fp16"),
        ([("WebGpuExecutionProvider", {})], "fp32", "fp32"),
        ([(OPENVINO, {})], "fp32", "bf16"),
        ([(OPENVINO, F32)], "fp32", "fp32"),
        ([(OPENVINO, F32)], "fp16", "fp16"),
        ([(OPENVINO, BF16)], "fp16", "bf16"),
    ],
)
def test_arithmetic_is_the_least_exact_of_a_run(providers: list[Any], precision: str, expected: str) -> None:
    device = Device(OPENVINO, "CPU", "a processor", "1.8", {"OPTIMIZATION_CAPABILITIES": "BF16 FP32"}, None)
    assert arithmetic_of(Runtime(tuple(providers), None, (device,)), precision) == expected


@pytest.mark.parametrize(
    ("precision", "arithmetic", "expected"),
    [
        ("fp32", "fp32", 1e-4),
        ("fp32", "tf32", 1e-2),
        ("fp32", "fp16", 1e-2),
        ("fp32", "bf16", 8e-2),
        ("fp16", "fp32", 1e-2),
        ("bf16", "bf16", 8e-2),
        ("fp32", "int8", 16e-2),
    ],
)
def test_tolerance_is_that_of_the_arithmetic_too(precision: str, arithmetic: str, expected: float) -> None:
    assert tolerance_of(precision, arithmetic) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"providers": "CUDAExecutionProvider"}, "CUDAExecutionProvider is not installed; there are .*onnxruntime-gpu"),
        ({"provider_options": {"a": 1}}, "provider_options need providers; name those that they are for"),
        ({"providers": CPU, "provider_options": [{}, {}]}, f"must be a dict for each of {CPU}"),
    ],
)
def test_providers_are_checked_first(options: dict[str, Any], message: str, model: TracedModel, tmp_path: Path) -> None:
    with pytest.raises(ServingError, match=message):
        verify_onnx(tmp_path / "none", model, **options)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("--provider-option", "a=1"), ConfigError, "--provider-option a=1 needs --provider; name the provider that"),
        (("--provider", CPU, "--provider-option", "a"), ConfigError, "--provider-option takes KEY=VALUE, but got 'a'"),
        (("--provider", CPU, "--provider-option", "=1"), ConfigError, "takes KEY=VALUE, but got '=1'"),
        (
            ("--provider", CPU, "--provider-option", "a=1", "--provider-option", "a=2"),
            ConfigError,
            "--provider-option a is given twice; give it once",
        ),
        (("--provider", "CUDAExecutionProvider"), ServingError, "CUDAExecutionProvider is not installed"),
        (("--files", "--provider", CPU), ExportError, "so --provider would have no effect; leave it out"),
    ],
)
def test_the_command_checks_its_provider_first(arguments: tuple[str, ...], error: type, message: str) -> None:
    result = CliRunner().invoke(app, ["verify", "--output", "/no/export", *arguments])
    assert isinstance(result.exception, error), result.exception
    assert message in str(result.exception)


def test_options_of_the_command_reach_verification(monkeypatch: pytest.MonkeyPatch, export: Path) -> None:
    """The model is not loaded, since verification is replaced."""
    seen: dict[str, Any] = {}

    def record(*_: Any, **options: Any) -> Any:
        seen.update(options)
        raise ExportError("recorded")

    monkeypatch.setattr("gralora_fx.exporters.verify_onnx", record, raising=False)
    monkeypatch.setattr("gralora_fx.core.loading.bases.load_traced", lambda *_, **__: None)
    provider = ["--provider", AZURE, "--provider-option", "a=b=c", "--provider-option", "d="]
    result = CliRunner().invoke(app, ["verify", "--model", "/no/model", "--output", str(export), *provider])
    assert str(result.exception) == "recorded"
    assert (seen["providers"], seen["provider_options"]) == (AZURE, {"a": "b=c", "d": ""})


# -- OpenVINO's plug-in, where it is installed and has a device --------------------------------------------------------


@pytest.mark.parametrize(("options", "arithmetic", "tolerance"), [(F32, "fp32", 1e-4), (BF16, "bf16", 8e-2)])
def test_openvino_is_compared_in_its_precision(
    export: Path, model: TracedModel, openvino: Device, options: dict[str, Any], arithmetic: str, tolerance: float
) -> None:
    report = verify_onnx(export, model, providers=(OPENVINO, options))
    assert (report.passed, report.arithmetic, report.tolerance) == (True, arithmetic, tolerance)
    assert f"run on {OPENVINO} {openvino.version} on CPU ({openvino.name}); nodes: {OPENVINO} " in report.details


@pytest.mark.parametrize("options", [F32, BF16])
def test_a_wrong_weight_is_seen_on_openvino(
    export: Path, model: TracedModel, openvino: Device, tmp_path: Path, options: dict[str, Any]
) -> None:
    graph = ir.load(export / "model.onnx")
    value = next(v for v in graph.graph.initializers.values() if v.name.endswith("LayerNorm.weight"))
    value.const_value = ir.tensor(-value.const_value.numpy(), name=value.name)
    for file in export.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    ir.save(graph, tmp_path / "model.onnx", external_data="other_data")
    forget_digests(tmp_path)
    assert not verify_onnx(tmp_path, model, providers=(OPENVINO, options)).passed


@pytest.mark.parametrize(
    ("options", "provider_options", "arithmetic"),
    [
        ({"precision": "fp16"}, F32, "fp16"),
        ({"precision": "bf16"}, F32, "bf16"),
        ({"quantize": "int4"}, F32, "int8"),
        ({"quantize": "int8"}, BF16, "int8"),
        ({"quantize": "int4"}, EXACT, "fp32"),
    ],
)
def test_other_exports_pass_on_openvino(
    model: TracedModel,
    openvino: Device,
    tmp_path: Path,
    options: dict[str, Any],
    provider_options: dict[str, Any],
    arithmetic: str,
) -> None:
    export_onnx(model, tmp_path / "onnx", verify=False, **options)
    report = verify_onnx(tmp_path / "onnx", model, providers=(OPENVINO, provider_options))
    assert (report.passed, report.arithmetic) == (True, arithmetic)


def test_greedy_tokens_pass_on_openvino(openvino: Device, tmp_path: Path) -> None:
    decoder = fresh_trace("llama", task="text-generation-with-past")
    export_onnx(decoder, tmp_path / "onnx", verify=False)
    report = verify_onnx(tmp_path / "onnx", decoder, "quick", providers=(OPENVINO, F32))
    assert report.passed
    assert report.tokens is not None
    assert report.tokens.equal == report.tokens.compared
    assert report.provider is not None
    assert report.provider.nodes[CPU]["GroupQueryAttention"] == 2

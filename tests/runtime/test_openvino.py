"""OpenVINO ignores options that it does not know, so they are checked here, and its precision is told from them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gralora_fx.errors import ServingError
from gralora_fx.run.sessions.placement import arithmetic, complete_options
from gralora_fx.run.sessions.plugins import Device, choose_device

NAME = "OpenVINOExecutionProvider"


def device(kind: str = "CPU", capabilities: str = "BF16 FP32 INT8") -> Device:
    return Device(NAME, kind, "a device", "1.8", {"OPTIMIZATION_CAPABILITIES": capabilities}, None)


def hint(value: str, kind: str = "CPU") -> dict[str, Any]:
    return {"load_config": {kind: {"INFERENCE_PRECISION_HINT": value}}}


def test_threads_are_a_property_of_the_processor() -> None:
    options = complete_options(hint("f32"), device(), 3, threads_are_given=True)
    properties = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": "3"}
    assert json.loads(options["load_config"]) == {"CPU": properties}
    assert complete_options({}, device("GPU"), 3, threads_are_given=True) == {}


def test_a_users_threads_go_before_the_cores_of_the_process() -> None:
    own = {"load_config": '{"CPU": {"INFERENCE_NUM_THREADS": 7}}'}
    options = complete_options(own, device(), 3, threads_are_given=False)
    assert json.loads(options["load_config"]) == {"CPU": {"INFERENCE_NUM_THREADS": 7}}
    with pytest.raises(ServingError, match="threads and INFERENCE_NUM_THREADS in load_config are the same"):
        complete_options(own, device(), 3, threads_are_given=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bogus": "1"}, "OpenVINOExecutionProvider has no option 'bogus'; there are device_type, load_config"),
        ({"precision": "FP32"}, "takes no option 'precision'; give OpenVINO's property INFERENCE_PRECISION_HINT in"),
        ({"num_of_threads": 2}, "takes no option 'num_of_threads'; give OpenVINO's property INFERENCE_NUM_THREADS in"),
        ({"load_config": "bf16"}, "load_config is not JSON .*: 'bf16'"),
        ({"load_config": "[]"}, "load_config must be properties by device, such as .*, but got '\\[\\]'"),
        ({"load_config": 5}, "load_config must be properties by device, .*but got 5"),
        ({"load_config": {"CPU": "f32"}}, "load_config must be properties by device"),
        ({"load_config": {"GPU": {}}}, "load_config has properties of GPU, but OpenVINOExecutionProvider runs on CPU"),
    ],
)
def test_what_openvino_would_ignore_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ServingError, match=message):
        complete_options(options, device(), 2, threads_are_given=False)


@pytest.mark.parametrize(
    ("options", "where", "expected"),
    [
        ({}, device(), "bf16"),
        ({}, device(capabilities="FP32 INT8"), "fp32"),
        ({}, device("GPU"), "fp16"),
        ({}, device("NPU"), "fp16"),
        (hint("f32"), device(), "fp32"),
        (hint("bf16"), device(), "bf16"),
        (hint("f16"), device(), "bf16"),
        (hint("f16"), device(capabilities="BF16 FP16 FP32"), "fp16"),
        (hint("f32", "GPU"), device("GPU.1"), "fp32"),
        (hint("undefined"), device(), "fp32"),
        ({"load_config": {"CPU": {"EXECUTION_MODE_HINT": "ACCURACY"}}}, device(), "fp32"),
    ],
)
def test_precision_is_that_of_the_hint_or_of_the_device(options: dict[str, Any], where: Device, expected: str) -> None:
    assert arithmetic(options, where) == expected


def test_activations_of_quantized_weights_are_rounded_unless_it_is_told() -> None:
    assert arithmetic(hint("f32"), device(), is_quantized=True) == "int8"
    exact = {"load_config": {"CPU": {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}}}
    assert arithmetic(exact, device(), is_quantized=True) == "fp32"


def test_devices_are_chosen_by_type_or_name() -> None:
    devices = tuple(device(kind) for kind in ("NPU", "GPU.0", "GPU.1", "CPU"))
    chosen = [choose_device(devices, kind).kind for kind in (None, "GPU", "GPU.1", "NPU")]
    assert chosen == ["CPU", "GPU.0", "GPU.1", "NPU"]
    assert choose_device(devices[:2]).kind == "NPU"
    with pytest.raises(ServingError, match=r"has no device of type 'TPU'; there are NPU \(a device\), GPU.0"):
        choose_device(devices, "TPU")

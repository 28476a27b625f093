"""Execution providers that are packages of their own: found, registered, given options, or refused by name."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from tiny_models import text_batch
from torch import nn
from traces import fresh_trace

from benchmarks import providers
from gralora_fx import trace
from gralora_fx.errors import ServingError
from gralora_fx.exporters import export_onnx
from gralora_fx.run.sessions import plugins, run_options, session
from gralora_fx.run.sessions.plugins import Device, devices_of
from gralora_fx.serving import load

CPU, AZURE, OPENVINO = "CPUExecutionProvider", "AzureExecutionProvider", "OpenVINOExecutionProvider"
F32 = {"load_config": {"CPU": {"INFERENCE_PRECISION_HINT": "f32"}}}
NAMES = "def get_ep_names():\n    return ['FakeExecutionProvider']\n"
PATH = "def get_library_path():\n    return {!r}\n"
Write = Callable[[str], Path]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "onnx"
    export_onnx(trace(nn.Sequential(nn.Linear(8, 4)).eval(), (torch.randn(1, 8),)), path, verify=False)
    return path


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("classifier") / "onnx"
    export_onnx(fresh_trace("bert"), path, verify=False)
    return path


@pytest.fixture
def write_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write the module of a plug-in package `onnxruntime_ep_fake` where Python finds it."""

    def write(code: str) -> Path:
        folder = tmp_path / "onnxruntime_ep_fake"
        folder.mkdir()
        (folder / "__init__.py").write_text(code)
        return folder

    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "onnxruntime_ep_fake", raising=False)
    return write


# -- what is not installed or does not load ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("provider", "remedy"),
    [
        ("CUDAExecutionProvider", "pip install onnxruntime-gpu in place of onnxruntime"),
        ("CoreMLExecutionProvider", "pip install onnxruntime on macOS"),
        ("DmlExecutionProvider", "pip install onnxruntime-directml on Windows"),
        ("FakeExecutionProvider", None),
    ],
)
def test_the_package_that_brings_a_provider_is_named(exported: Path, provider: str, remedy: str | None) -> None:
    with pytest.raises(ServingError) as error:
        load(exported, provider)
    expected = f"execution provider {provider} is not installed; there are .*{CPU}"
    assert re.fullmatch(expected + (f".*; {remedy} brings it" if remedy else "[^;]*"), str(error.value))


def test_a_plugin_that_is_not_installed_is_named(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins.pkgutil, "iter_modules", lambda: iter(()))
    monkeypatch.setattr(plugins, "registered_devices", lambda _: ())
    monkeypatch.setattr(plugins.onnxruntime, "get_available_providers", lambda: [CPU])
    for provider, package in (
        (OPENVINO, r"gralora-fx\[openvino\]' .*brings"),
        ("WebGpuExecutionProvider", "-ep-webgpu brings"),
    ):
        with pytest.raises(
            ServingError, match=f"{provider} is not installed; there are {CPU}; pip install .*{package}"
        ):
            load(exported, provider)


def test_a_library_that_is_none_is_named(exported: Path, write_plugin: Write, tmp_path: Path) -> None:
    library = tmp_path / "library.so"
    library.write_text("a text")
    write_plugin(NAMES + PATH.format(str(library)))
    expected = (
        f"package onnxruntime-ep-fake cannot be loaded from {library} \\(.*{library}: (file too short|invalid ELF "
        "header).*; install it again, or leave FakeExecutionProvider out"
    )
    with pytest.raises(ServingError, match=expected):
        load(exported, "FakeExecutionProvider")
    library.write_text("a longer text, which is no library either" * 100)
    with pytest.raises(ServingError, match=f"cannot be loaded from {library}"):  # it is tried again
        load(exported, "FakeExecutionProvider")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise OSError('no driver')", "cannot be loaded from onnxruntime_ep_fake \\(no driver\\)"),
        (NAMES, "has no attribute 'get_library_path'"),
        (NAMES + "def get_library_path():\n    raise FileNotFoundError('it is gone')\n", "\\(it is gone\\)"),
        (NAMES + PATH.format("/no/such/library.so"), "cannot be loaded from /no/such/library.so \\(.*No such file"),
        (PATH.format("/no/such/library.so"), "cannot be loaded from /no/such/library.so"),  # says no names
    ],
)
def test_a_broken_package_is_named(exported: Path, write_plugin: Write, code: str, reason: str) -> None:
    write_plugin(code)
    with pytest.raises(ServingError, match=reason):
        load(exported, "FakeExecutionProvider")


def test_a_package_of_another_provider_is_left_alone(exported: Path, write_plugin: Write) -> None:
    write_plugin(NAMES + PATH.format("/no/such/library.so"))
    with pytest.raises(ServingError, match="execution provider OtherExecutionProvider is not installed"):
        load(exported, "OtherExecutionProvider")


# -- a device of ONNX Runtime's own in place of a plug-in's ------------------------------------------------------------


@pytest.fixture
def as_plugin(monkeypatch: pytest.MonkeyPatch) -> Device:
    """ONNX Runtime's CPU provider taken as a plug-in, by the device that it lists."""
    handle = next(handle for handle in onnxruntime.get_ep_devices() if handle.ep_name == CPU)
    device = Device(CPU, "CPU", "a processor", "1.0", {}, handle)
    monkeypatch.setattr(run_options, "CPU", "another")
    monkeypatch.setattr(plugins, "devices_of", lambda name: (device,) if name == CPU else ())
    return device


@pytest.mark.filterwarnings("ignore:AzureExecutionProvider takes no node")
def test_a_plugins_device_runs_the_model(exported: Path, as_plugin: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    make, seen = onnxruntime.InferenceSession, []

    def record(path: str, options: onnxruntime.SessionOptions, **others: Any) -> Any:
        seen.append((options.has_providers(), others["providers"]))
        return make(path, options, **others)

    monkeypatch.setattr(session.onnxruntime, "InferenceSession", record)
    model = load(exported, [(CPU, {"device_type": "CPU", "level": 3}), AZURE], threads=2)
    assert seen == [(True, None)]
    x = torch.randn(3, 8)
    assert torch.equal(
        model(input=x)[0], torch.from_numpy(session.open_session(exported).run(None, {"input": x.numpy()})[0])
    )
    assert model.placement is not None
    assert sum(model.placement[CPU].values()) >= 1
    assert model.describe().splitlines()[1:3] == [
        f"runs on {as_plugin}",
        f"runs on {AZURE} of onnxruntime {onnxruntime.__version__}",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"providers": (CPU, {"device_type": "GPU"})},
            f"{CPU} has no device of type 'GPU'; there are CPU .a processor",
        ),
        (
            {"providers": (CPU, {"level": object()})},
            f"option level of {CPU} must be a text or a number, but got <object",
        ),
        ({"providers": CPU, "session_options": onnxruntime.SessionOptions()}, "would change the given SessionOptions"),
        ({"providers": (CPU, {OPENVINO: {}})}, f"options for {OPENVINO} are given, but it is not among the providers"),
    ],
)
def test_what_a_plugin_cannot_take_is_named(
    exported: Path, as_plugin: Device, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ServingError, match=message):
        load(exported, **options)


def test_a_provider_that_runs_nothing_is_named(exported: Path) -> None:
    with pytest.warns(UserWarning, match=f"{AZURE} takes no node of this model, which runs on {CPU}; leave it out"):
        model = load(exported, [AZURE, CPU])
    assert model.placement is not None
    assert not model.placement[AZURE]
    assert f"nodes: {AZURE} 0, {CPU} " in model.describe()


def test_the_cpu_alone_has_nothing_to_say_of_placement(exported: Path) -> None:
    model = load(exported, threads=1)
    assert model.placement is None
    version = onnxruntime.__version__
    assert model.describe() == f"{exported}: no task, fp32\nruns on {CPU} of onnxruntime {version}\nthreads: 1"


def test_the_benchmark_has_a_row_for_each_side_that_opens(classifier: Path) -> None:
    models, missing = providers.open_sides(classifier)
    assert len(models) + len(missing) == len(providers.SIDES)
    feed = {name: value.numpy() for name, value in text_batch(2, 5).items()}
    table, timings = providers.providers_table(models, feed, iterations=1)
    assert [row["case"] for row in table.rows] == list(models) == list(timings.seconds)
    base = table.rows[0]
    assert (base["case"], base["difference"], base["nodes"]) == (providers.BASE, "0.0e+00", "all")
    assert set(providers.cpu_flags()) <= set(providers.FLAGS)


# -- OpenVINO's plug-in, where it is installed and has a device --------------------------------------------------------


def test_openvino_names_what_it_needs(exported: Path) -> None:
    """Without a device OpenVINO's error names what is needed: the package is there, and the machine is not Intel's."""
    pytest.importorskip("onnxruntime_ep_openvino", reason="pip install 'gralora-fx[openvino]'")
    try:
        devices_of(OPENVINO)
    except ServingError:
        with pytest.raises(ServingError, match=r"\(onnxruntime-ep-openvino .*needs a processor, GPU or NPU of Intel"):
            load(exported, OPENVINO)
    else:
        pytest.skip("it has a device here")


def test_openvino_computes_the_same(classifier: Path, openvino: Device) -> None:
    inputs = text_batch(3, 9)
    expected = load(classifier)(**inputs).logits
    model = load(classifier, (OPENVINO, F32), threads=1)
    assert (model(**inputs).logits - expected).abs().max() <= 1e-4
    rounded = load(classifier, OPENVINO, provider_options={"load_config": json.dumps({"CPU": {}})})
    assert (rounded(**inputs).logits - expected).abs().max() <= 8e-2 * max(1.0, float(expected.abs().max()))
    options = model.session.get_provider_options()[OPENVINO]
    assert json.loads(options["load_config"])["CPU"] == {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": "1",
    }
    assert model.placement is not None
    assert sum(model.placement[OPENVINO].values()) > 0
    assert f"runs on {openvino}, in fp32 arithmetic\n" in model.describe()
    bf16 = "BF16" in openvino.properties["OPTIMIZATION_CAPABILITIES"].split()
    assert f"runs on {openvino}, in {'bf16' if bf16 else 'fp32'} arithmetic\n" in rounded.describe()


def test_openvino_is_registered_once(classifier: Path, openvino: Device) -> None:
    for _ in range(2):
        load(classifier, (OPENVINO, F32))
    assert len({str(device) for device in devices_of(OPENVINO)}) == len(devices_of(OPENVINO))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"CPU": {"NONSENSE": 1}}, f"Unsupported property NONSENSE by CPU plugin.*check the options of {OPENVINO}"),
        ({"CPU": {"INFERENCE_PRECISION_HINT": "f8"}}, "Wrong value f8 for property key INFERENCE_PRECISION_HINT"),
    ],
)
def test_openvinos_own_complaints_are_shown(
    classifier: Path, openvino: Device, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ServingError, match=message):
        load(classifier, (OPENVINO, {"load_config": options}))


def test_a_decoder_says_what_stays_on_the_cpu(openvino: Device, tmp_path: Path) -> None:
    export_onnx(fresh_trace("llama", task="text-generation-with-past"), tmp_path / "onnx", verify=False)
    model, expected = load(tmp_path / "onnx", (OPENVINO, F32)), load(tmp_path / "onnx")
    ids = np.array([[5, 6, 7]])
    assert np.abs(model(input_ids=ids).logits - expected(input_ids=ids).logits).max() <= 1e-4
    assert model.placement is not None
    assert model.placement[CPU]["GroupQueryAttention"] == 2
    assert re.search(f"nodes: {OPENVINO} \\d+, {CPU} \\d+ \\(GroupQueryAttention 2", model.describe())
    prompts = [[5, 6, 7], [9, 8]]
    assert model.generate(prompts, max_new_tokens=6) == expected.generate(prompts, max_new_tokens=6)


def test_an_encoder_decoder_runs_on_openvino(openvino: Device, tmp_path: Path) -> None:
    traced = fresh_trace("t5", task="text2text-generation-with-past", num_layers=1)
    export_onnx(traced, tmp_path / "onnx", verify=False)
    model, expected = load(tmp_path / "onnx", (OPENVINO, F32)), load(tmp_path / "onnx")
    inputs = {"input_ids": np.array([[5, 6, 7]]), "decoder_input_ids": np.array([[2, 3]])}
    assert np.abs(model(**inputs).logits - expected(**inputs).logits).max() <= 1e-4
    assert model.placement is not None
    assert list(model.placement) == [OPENVINO, CPU]

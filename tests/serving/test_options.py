"""Options of the runtime given to `load` are used as onnxruntime would use them, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from gralora_fx import trace
from gralora_fx.errors import ServingError
from gralora_fx.exporters import export_onnx
from gralora_fx.run.sessions import session
from gralora_fx.run.sessions.run_options import available_threads
from gralora_fx.serving import OrtModel, load

CPU, AZURE = "CPUExecutionProvider", "AzureExecutionProvider"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "onnx"
    export_onnx(trace(nn.Sequential(nn.Linear(8, 4)).eval(), (torch.randn(1, 8),)), path, verify=False)
    return path


def options_of(model: OrtModel) -> onnxruntime.SessionOptions:
    options: onnxruntime.SessionOptions = model.session.get_session_options()
    return options


@pytest.mark.filterwarnings("ignore:AzureExecutionProvider takes no node")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [CPU]),
        ({"providers": CPU}, [CPU]),
        ({"providers": [CPU]}, [CPU]),
        ({"providers": (CPU,)}, [CPU]),
        ({"providers": (AZURE, CPU)}, [AZURE, CPU]),
        ({"providers": (CPU, {})}, [CPU]),
        ({"providers": [(CPU, {}), AZURE]}, [CPU, AZURE]),
        ({"providers": [AZURE, CPU], "provider_options": [{}, {}]}, [AZURE, CPU]),
        ({"providers": CPU, "provider_options": {}}, [CPU]),
    ],
)
def test_providers_in_every_spelling(exported: Path, options: dict[str, Any], expected: list[str]) -> None:
    model = load(exported, **options)
    assert model.session.get_providers() == expected
    assert model(input=torch.zeros(2, 8))[0].shape == (2, 4)


def test_options_of_the_cpu_have_no_effect(exported: Path) -> None:
    with pytest.warns(UserWarning, match="use_arena has no effect: CPUExecutionProvider has no options"):
        load(exported, (CPU, {"use_arena": 1}))


@pytest.mark.filterwarnings("ignore:AzureExecutionProvider takes no node")
def test_options_of_a_provider_reach_it(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    make = onnxruntime.InferenceSession

    def record(*args: Any, **options: Any) -> Any:
        seen.append(options["providers"])
        return make(*args, **{**options, "providers": [AZURE]})

    monkeypatch.setattr(session.onnxruntime, "InferenceSession", record)
    load(exported, [(AZURE, {"a": 1})])
    load(exported, AZURE, provider_options={"a": 1})
    load(exported, [CPU, AZURE][1:], provider_options=[{"a": 1}])
    assert seen == [[(AZURE, {"a": 1})]] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"providers": "CUDA"}, "execution provider CUDA is not installed; there are .*CPUExecutionProvider"),
        ({"providers": [CPU, "CUDAExecutionProvider"]}, "execution provider CUDAExecutionProvider is not installed"),
        ({"providers": [CPU, CPU]}, "CPUExecutionProvider is named twice"),
        ({"providers": []}, "providers are empty; name one"),
        ({"providers": 5}, "a provider is a name, or a name and a dict of options as a tuple, but got 5"),
        ({"providers": [None]}, "a provider is a name, .* but got None"),
        ({"providers": [(CPU, "fast")]}, "options of CPUExecutionProvider must be a dict by name, but got 'fast'"),
        ({"provider_options": [{}]}, "provider_options need providers"),
        ({"providers": CPU, "provider_options": [{}, {}]}, "provider_options must be a dict for each of CPUExec"),
        (
            {"providers": [(CPU, {})], "provider_options": [{}]},
            "are given in its tuple and in provider_options; give them",
        ),
        ({"threads": 0}, "threads must be a whole number from 1 to 1024, but got 0"),
        ({"threads": True}, "threads must be a whole number"),
        ({"threads": "2"}, "threads must be a whole number from 1 to 1024, but got '2'"),
        ({"threads": 2, "session_options": {"intra_op_num_threads": 3}}, "are the same; give one of them"),
        ({"threads": 2, "session_options": onnxruntime.SessionOptions()}, "threads would change the given"),
        ({"session_options": {"inter": 1}}, "unknown session option 'inter'; there are .*inter_op_num_threads"),
        ({"session_options": {5: 5}}, "unknown session option 5"),
        ({"session_options": {"enable_mem_pattern": "no"}}, "'enable_mem_pattern' is of type bool, but got 'no'"),
        ({"session_options": {"inter_op_num_threads": "x"}}, "'inter_op_num_threads' is of type int, but got 'x'"),
        ({"session_options": 5}, "must be an onnxruntime.SessionOptions or a dict of its fields, but got 5"),
    ],
)
def test_what_cannot_be_meant_is_named(exported: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ServingError, match=message):
        load(exported, **options)


def test_a_provider_that_does_not_start_is_not_replaced_in_silence(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ONNX Runtime does with CUDA where its libraries are missing."""
    make = onnxruntime.InferenceSession
    monkeypatch.setattr(
        session.onnxruntime, "InferenceSession", lambda *args, **options: make(*args, **{**options, "providers": [CPU]})
    )
    with pytest.raises(ServingError, match="could not start AzureExecutionProvider and would run"):
        load(exported, [AZURE, CPU])


def test_threads_are_those_that_were_asked_for(exported: Path) -> None:
    assert options_of(load(exported)).intra_op_num_threads == available_threads()
    unsaid = load(exported, session_options={"intra_op_num_threads": 0})
    assert options_of(unsaid).intra_op_num_threads == available_threads()
    assert options_of(load(exported, threads=3)).intra_op_num_threads == 3
    assert options_of(load(exported, session_options={"intra_op_num_threads": 3})).intra_op_num_threads == 3


def test_session_options_are_taken_as_they_are(exported: Path) -> None:
    level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options = options_of(load(exported, session_options={"graph_optimization_level": level, "logid": "mine"}))
    assert (options.graph_optimization_level, options.logid) == (level, "mine")
    own = onnxruntime.SessionOptions()
    own.intra_op_num_threads = 3
    own.logid = "own"
    assert options_of(load(exported, session_options=own)).logid == "own"
    assert (own.intra_op_num_threads, own.log_severity_level) == (3, -1)


@pytest.mark.parametrize("path", [5, None, b"x", "a\0b", "x" * 5000, "\ud800"])
def test_what_is_not_a_path_is_refused(path: Any) -> None:
    with pytest.raises(ServingError):
        load(path)


def test_a_directory_may_be_left_but_not_moved(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(exported.parent)
    model = load("onnx")
    monkeypatch.chdir(tmp_path)
    assert model.directory == exported
    exported.rename(tmp_path / "moved")
    try:
        assert model(input=np.zeros((1, 8)))[0].shape == (1, 4)
        with pytest.raises(ServingError, match="was moved or removed after it was loaded; load it from where it is"):
            _ = model.tokenizer
    finally:
        (tmp_path / "moved").rename(exported)

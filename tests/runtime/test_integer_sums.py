"""Products of int8 are refused where a processor does not add them exactly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gralora_fx import trace
from gralora_fx.errors import ExportError, ServingError
from gralora_fx.exporters import export_onnx
from gralora_fx.format.export_directory import MANIFEST_NAME
from gralora_fx.run.sessions import integer_sums
from gralora_fx.run.sessions.session import Runtime
from gralora_fx.serving import load


@pytest.mark.parametrize("quantize", ["int8-dynamic", "int8"])
def test_a_processor_that_saturates_is_refused_where_it_matters(
    quantize: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_onnx(trace(nn.Linear(32, 32), (torch.randn(2, 32),)), tmp_path / "onnx", quantize=quantize, verify=False)  # type: ignore[arg-type]
    monkeypatch.setattr(integer_sums, "adds_exactly", lambda: False)
    if quantize == "int8":
        load(tmp_path / "onnx")
        return
    with pytest.raises(ServingError, match=r"does not add exactly .* export with quantize='int8'"):
        load(tmp_path / "onnx")


def test_an_earlier_export_whose_weights_are_small_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_onnx(
        trace(nn.Linear(32, 32), (torch.randn(2, 32),)), tmp_path / "onnx", quantize="int8-dynamic", verify=False
    )
    path = tmp_path / "onnx" / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    for name in ("bits", "stored_bits", "chosen_by", "layers"):  # which earlier versions do not record
        manifest["quantization"].pop(name, None)
    path.write_text(json.dumps(manifest))
    monkeypatch.setattr(integer_sums, "adds_exactly", lambda: False)
    assert load(tmp_path / "onnx")(input=torch.randn(3, 32))[0].shape == (3, 32)


def test_an_export_that_cannot_be_compared_here_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integer_sums, "adds_exactly", lambda: False)
    monkeypatch.setattr("gralora_fx.exporters.quantize.choice.choose_formats", lambda *_: pytest.fail("it is measured"))
    with pytest.raises(ExportError, match="does not add exactly"):
        export_onnx(trace(nn.Linear(32, 32), (torch.randn(2, 32),)), tmp_path / "onnx", quantize="int8-dynamic")


def test_providers_that_session_options_hold_count_as_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integer_sums, "adds_exactly", lambda: False)
    with pytest.raises(ServingError, match="does not add exactly"):
        integer_sums.check_integer_sums(Runtime(()))
    integer_sums.check_integer_sums(Runtime((("CUDAExecutionProvider", {}),)))


def test_the_probe_agrees_with_numpy() -> None:
    """On a machine where sums saturate, the probe says so: it is the runtime's own product."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if "vnni" not in flags:
        pytest.skip("needs a processor that is known to add exactly")
    assert np.iinfo(np.int16).max < 2 * 255 * 127
    assert integer_sums.adds_exactly()

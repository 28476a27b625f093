"""Adapters as inputs in a browser's runtime: onnxruntime-web in Node gives what ONNX Runtime gives."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from adapters_as_data import KINDS, Exports, add, arrays
from javascript_project import installed_project, needs_node, run_script

from gralora_fx.format.adapter_inputs import AdapterInputs
from gralora_fx.serving import OrtModel

pytestmark = needs_node


@pytest.fixture(scope="module")
def project() -> Path:
    """Return the Node project with its packages."""
    return installed_project()


def adapter_tensors(served: OrtModel, name: str | None) -> dict[str, np.ndarray]:
    """Make a page's inputs for an adapter: its tensors, and tensors of rank 0 at layers that it leaves alone."""
    inputs = served.manifest.adapter_inputs
    assert isinstance(inputs, AdapterInputs)
    shapes = [item for site in inputs.sites for item in site.shapes(inputs.k, 0, 0).items()]
    tensors = {tensor: np.zeros([int(size) for size in shape], np.float32) for tensor, shape in shapes}
    if name is None:
        return tensors
    file = served.directory / "adapters" / f"{name}.onnx_adapter"
    adapter = onnxruntime.AdapterFormat.read_adapter(str(file)).get_parameters()
    return tensors | {tensor: np.array(value.numpy()) for tensor, value in adapter.items()}  # a view of the file else


def encoded(feed: dict[str, np.ndarray]) -> dict[str, Any]:
    return {
        name: {
            "type": array.dtype.name,
            "dims": list(array.shape),
            "bytes": base64.b64encode(np.ascontiguousarray(array).tobytes()).decode(),
        }
        for name, array in feed.items()
    }


def in_web(project: Path, served: OrtModel, output: str, feeds: list[dict[str, np.ndarray]], folder: Path) -> Any:
    """Return the outputs of an export in onnxruntime-web."""
    request = {
        "model": str(served.directory / "model.onnx"),
        "data": {"name": "model.onnx_data", "path": str(served.directory / "model.onnx_data")},
        "output": output,
        "runs": [encoded(feed) for feed in feeds],
    }
    (folder / "request.json").write_text(json.dumps(request))
    answer = run_script(project, "run_web.mjs", str(folder / "request.json"))
    return [np.array(result["data"], np.float32).reshape(result["dims"]) for result in answer["results"]]


@pytest.mark.parametrize(("name", "options"), [("bert", {}), ("llama", {"dora": True})])
def test_an_adapter_runs_in_a_browser(
    exports: Exports, name: str, options: dict[str, Any], project: Path, tmp_path: Path
) -> None:
    kind, served = KINDS[name], exports.adapted(name, 2, "inputs", **options)
    methods: dict[str, dict[str, Any]] = {
        "web-gralora": {"r": 4, "hybrid_r": 2, "gralora_k": 2},
        "web-lora": {"method": "LORA", "r": 4, "target_modules": [kind.first]},
    }
    if options:
        methods["web-dora"] = {"method": "DORA", "r": 4}
    for adapter, method in methods.items():
        add(served, kind, tmp_path / adapter, adapter, **{"target_modules": kind.targets, **method})
    given = served.call_inputs.arrays(arrays(kind.batch()))
    names = (*methods, None)
    feeds = [given | adapter_tensors(served, adapter) for adapter in names]
    results = in_web(project, served, "logits", feeds, tmp_path)
    for adapter, result in zip(names, results, strict=True):
        expected = served(adapter=adapter, **arrays(kind.batch())).logits
        assert np.abs(result - expected).max() < 1e-4 * np.abs(expected).max(), adapter
    for result in (results[0], results[-2] if options else results[0]):
        assert np.abs(result - results[-1]).max() > 1e-3 * np.abs(results[-1]).max()

"""Errors for what is given in the place of a traced model: its name, and the call that is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gralora_fx import GraloraConfig, GraloraModel, merge, plan, rewrite, trace
from gralora_fx.errors import ExportError, GraloraError, MergeError, RewriteError, TargetError, TraceError
from gralora_fx.exporters import export_onnx, verify_onnx

CONFIG = GraloraConfig(r=2, target_modules={"0"})


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an adapter and an export of it."""
    path = tmp_path_factory.mktemp("untraced")
    model = rewrite(trace(nn.Sequential(nn.Linear(8, 8)), (torch.ones(2, 8),)), CONFIG)
    model.save_pretrained(path / "adapter")
    export_onnx(model, path / "onnx", verify=False)
    return path


@pytest.mark.parametrize("model", [nn.Sequential(nn.Linear(8, 8)), None, "model"], ids=["module", "none", "text"])
@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda model, _: plan(model, CONFIG), TargetError),
        (lambda model, _: rewrite(model, CONFIG), RewriteError),
        (lambda model, _: merge(model), MergeError),
        (lambda model, _: GraloraModel(model), RewriteError),
        (lambda model, path: GraloraModel.from_pretrained(model, path / "adapter"), RewriteError),
        (lambda model, path: export_onnx(model, path / "new"), ExportError),
        (lambda model, path: verify_onnx(path / "onnx", model), ExportError),
    ],
    ids=["plan", "rewrite", "merge", "GraloraModel", "from_pretrained", "export_onnx", "verify_onnx"],
)
def test_an_untraced_model_is_to_be_traced_first(
    directory: Path, call: Callable[[Any, Path], object], error: type[GraloraError], model: Any
) -> None:
    with pytest.raises(error, match=rf"cannot [a-z ]+ a {type(model).__name__}; trace it first: call trace\(\)"):
        call(model, directory)


def test_a_traced_or_rewritten_model_is_not_traced_again() -> None:
    traced = trace(nn.Sequential(nn.Linear(8, 8)), (torch.ones(2, 8),))
    model = rewrite(traced, CONFIG)
    for source in (traced, model):
        with pytest.raises(TraceError, match="is traced already"):
            trace(source, (torch.ones(2, 8),))  # type: ignore[arg-type]
    for function, error in ((plan, TargetError), (rewrite, RewriteError)):
        with pytest.raises(error, match=r"it is rewritten already: give its \.traced"):
            function(model, CONFIG)  # type: ignore[arg-type]

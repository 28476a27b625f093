"""A base export, an adapter beside it, and what a fold of both is compared with."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from safetensors.torch import load_file, save_file

from gralora_fx import GraloraConfig, GraloraModel, TracedModel, rewrite
from gralora_fx.exporters import FoldReport, export_onnx, fold_onnx

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CACHED = "text-generation-with-past"


def gralora(targets: Any, **options: Any) -> GraloraConfig:
    """Return a configuration of a random adapter."""
    return GraloraConfig(**{"r": 4, "alpha": 8, "target_modules": targets, "init_weights": False, **options})


def adapted(traced: TracedModel, config: Any) -> GraloraModel:
    """Return a model with a small random adapter."""
    torch.manual_seed(3)
    model = rewrite(traced, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "gralora." in name:
                parameter.mul_(0.3)
    return model


class Case:
    """A base export, an adapter beside it, and the export of the adapted model."""

    def __init__(self, root: Path, traced: TracedModel, config: Any, **options: Any) -> None:
        self.base, self.adapter, self.fresh, self.out = (root / name for name in ("base", "adapter", "fresh", "out"))
        export_onnx(traced, self.base, verify=False, **options)
        self.model = adapted(traced, config)
        self.model.save_pretrained(self.adapter)
        self.options = options

    def export_fresh(self) -> Path:
        export_onnx(self.model, self.fresh, verify=False, **self.options)
        return self.fresh

    def fold(self, **options: Any) -> FoldReport:
        return fold_onnx(self.base, self.adapter, self.out, **options)


def tensors(directory: Path) -> dict[str, np.ndarray]:
    """Every initializer of a directory's models, by file and name."""
    models = {path.name: ir.load(path) for path in sorted(directory.glob("*.onnx"))}
    return {
        f"{file}:{name}": value.const_value.numpy().copy()  # type: ignore[union-attr]
        for file, model in models.items()
        for name, value in model.graph.initializers.items()
    }


def assert_same_weights(directory: Path, expected: Path, tolerance: float = 1e-6) -> None:
    ours, theirs = tensors(directory), tensors(expected)
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        scale = max(1.0, float(np.abs(values.astype(np.float64)).max(initial=0)))
        difference = np.abs(ours[name].astype(np.float64) - values.astype(np.float64)).max(initial=0)
        assert difference <= tolerance * scale, name


def digests(directory: Path) -> dict[str, str]:
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def copied(case: Case, tmp_path: Path) -> Case:
    other = object.__new__(Case)
    other.model, other.options, other.out = case.model, case.options, tmp_path / "out"
    other.base, other.adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(case.base, other.base)
    shutil.copytree(case.adapter, other.adapter)
    return other


def edited_adapter(case: Case, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    found = load_file(case.adapter / "adapter_model.safetensors")
    edit(found)
    save_file(found, case.adapter / "adapter_model.safetensors")

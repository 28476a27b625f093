"""Exports that take images of other sizes: ONNX Runtime compared with the eager model; what serving refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from tiny_images import IMAGE_MODELS, VIT, image_model
from torch import nn
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    EfficientNetConfig,
    EfficientNetForImageClassification,
)
from typer.testing import CliRunner

from gralora_fx import trace
from gralora_fx.cli.commands import app
from gralora_fx.errors import ConfigError, ServingError
from gralora_fx.exporters import export_onnx
from gralora_fx.features.images.image_sizes import ImageSizes
from gralora_fx.format.manifest import read_manifest
from gralora_fx.serving import load

MODELS: dict[str, Callable[[], nn.Module]] = {
    **IMAGE_MODELS,
    "efficientnet": lambda: EfficientNetForImageClassification(
        EfficientNetConfig(width_coefficient=0.25, depth_coefficient=0.25, image_size=64, hidden_dim=320)
    ),
    "dinov2": lambda: Dinov2ForImageClassification(Dinov2Config(**VIT)),
    "dinov3": lambda: DINOv3ViTModel(DINOv3ViTConfig(**VIT)),
}


def model_of(name: str) -> Any:
    return image_model(MODELS[name])


def exported(name: str, directory: Path, image_size: Any = None) -> tuple[Any, dict[str, Any], Any]:
    """Return a model, the constants of its trace, and the report of its export."""
    model = model_of(name)
    size = getattr(model.config, "image_size", 64)
    traced = trace(model, {"pixel_values": torch.randn(1, 3, size, size)}, image_size=image_size)
    return model, traced.constants, export_onnx(traced, directory)


@pytest.mark.filterwarnings("ignore:rope_embeddings")
@pytest.mark.parametrize("name", ["resnet", "convnext", "efficientnet", "dinov2", "dinov3", "vit", "clip"])
def test_one_session_takes_images_of_any_size(name: str, tmp_path: Path) -> None:
    model, constants, report = exported(name, tmp_path / "onnx", "dynamic")
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    assert session.get_inputs()[0].shape == ["batch_size", 3, "height", "width"]
    for batch, height, width in ((1, 64, 64), (3, 32, 96), (2, 75, 53), (1, 32, 32)):
        images = torch.randn(batch, 3, height, width)
        with torch.no_grad():
            expected = model(images, **constants)[0].numpy()
        actual = session.run(None, {"pixel_values": images.numpy()})[0]
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert [case for case in report.verification.cases if "images of" in case], "verification tries other sizes"
    if name in ("dinov2", "vit", "clip"):
        assert (report.attention.fused, report.attention.plain) == (2, {})


def test_serving_names_the_least_size(tmp_path: Path) -> None:
    exported("convnext", tmp_path / "onnx")
    served = load(tmp_path / "onnx")
    assert served.manifest.facts["image_sizes"] == ImageSizes(least=(32, 32))
    assert served(pixel_values=torch.randn(2, 3, 40, 64)).logits.shape == (2, 2)
    with pytest.raises(ServingError, match="images of 31 x 64, but the model takes 32 x 32 or more; enlarge them"):
        served(pixel_values=torch.randn(1, 3, 31, 64))
    with pytest.raises(ServingError, match="has 1 channels"):
        served(pixel_values=torch.randn(1, 1, 64, 64))
    with pytest.raises(ServingError, match="channels come last"):
        served(pixel_values=np.zeros((1, 64, 64, 3), np.float32))
    with pytest.raises(ServingError, match=r"images are \[batch, channels, height, width\]"):
        served(pixel_values=np.zeros((3, 64, 64), np.float32))


@pytest.mark.parametrize(("name", "image_size", "size"), [("swin", None, (32, 32)), ("vit", (48, 16), (48, 16))])
def test_an_export_for_one_size_names_it(name: str, image_size: Any, size: tuple[int, int], tmp_path: Path) -> None:
    model, constants, _ = exported(name, tmp_path / "onnx", image_size)
    assert read_manifest(tmp_path / "onnx").trace_options == {"image_size": size}
    served = load(tmp_path / "onnx")
    images = torch.randn(2, 3, *size)
    torch.testing.assert_close(served(pixel_values=images).logits, model(images, **constants).logits, atol=1e-4, rtol=0)
    with pytest.raises(ServingError, match=rf"images of 40 x 64, but the model takes {size[0]} x {size[1]}: .*resize"):
        served(pixel_values=torch.randn(1, 3, 40, 64))


def test_the_command_line_takes_an_image_size(tmp_path: Path) -> None:
    model_of("vit").save_pretrained(tmp_path / "vit")
    arguments = ["--model", str(tmp_path / "vit"), "--output", str(tmp_path / "onnx")]
    runner = CliRunner()
    result = runner.invoke(app, ["export", *arguments, "--image-size", "dynamic"])
    assert result.exit_code == 0, result.output
    assert read_manifest(tmp_path / "onnx").facts["image_sizes"] == ImageSizes(least=(8, 8))
    verified = runner.invoke(app, ["verify", *arguments, "-v"])
    assert verified.exit_code == 0, verified.output
    assert "images of" in verified.output
    result = runner.invoke(app, ["export", *arguments, "--image-size", "48x16"])
    assert result.exit_code == 0, result.output
    assert read_manifest(tmp_path / "onnx").trace_options == {"image_size": (48, 16)}
    inspected = runner.invoke(app, ["inspect", "--model", str(tmp_path / "vit")])
    assert "images: 32 x 32 only" in inspected.output
    refused = runner.invoke(app, ["export", *arguments, "--image-size", "48"])
    assert isinstance(refused.exception, ConfigError)
    assert "such as 224x224, or dynamic, but got '48'" in str(refused.exception)

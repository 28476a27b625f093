"""Images of other heights and widths: where a trace takes them, and what it says where it does not."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_images import IMAGE_MODELS, PYRAMID, VIT, image_model
from torch import nn
from transformers import Dinov2Config, Dinov2Model, MobileNetV2Config, MobileNetV2Model, PvtConfig, PvtModel
from transformers.models.mobilenet_v1 import modeling_mobilenet_v1
from transformers.models.mobilenet_v2 import modeling_mobilenet_v2

from gralora_fx import TracedModel, trace
from gralora_fx.core.tracing.known_code import SAME_PADDING
from gralora_fx.errors import TraceError
from gralora_fx.features.images.image_sizes import ImageSizes

MODELS: dict[str, Callable[[], nn.Module]] = {
    **IMAGE_MODELS,
    "mobilenet_v2": lambda: MobileNetV2Model(MobileNetV2Config(depth_multiplier=0.35, image_size=64)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**VIT)),
    "pvt": lambda: PvtModel(PvtConfig(image_size=64, num_attention_heads=[1, 1, 2, 2], **PYRAMID)),
}
WITH_TABLE = ("vit", "clip")


@cache
def model_of(name: str) -> nn.Module:
    model: nn.Module = image_model(MODELS[name])
    return model


@cache
def traced(name: str, image_size: Any = None) -> TracedModel:
    """Its trace with one square image as the example."""
    model: Any = model_of(name)
    size = getattr(model.config, "image_size", 64)
    return trace(model, {"pixel_values": torch.randn(1, 3, size, size)}, image_size=image_size)


@pytest.mark.parametrize(
    ("name", "least"), [("resnet", 1), ("convnext", 32), ("mobilenet_v2", 1), ("dinov2", 8), ("vit", 8), ("clip", 8)]
)
def test_images_of_other_sizes_equal_the_eager_model(name: str, least: int) -> None:
    model, request = model_of(name), "dynamic" if name in WITH_TABLE else None
    result = traced(name, request)
    assert result.signature.image_sizes == ImageSizes(least=(least, least))
    assert result.signature.fixed["pixel_values"] == (None, 3, None, None)
    for batch, height, width in ((1, 64, 64), (3, 32, 96), (2, 75, 53), (1, least, least)):
        images = torch.randn(batch, 3, height, width)
        with torch.no_grad():
            expected = model(images, **result.constants)[0]
            actual = result(images, **result.constants)[0]
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_the_interpolation_of_positions_may_be_given_as_an_example() -> None:
    model = model_of("vit")
    result = trace(model, {"pixel_values": torch.randn(1, 3, 32, 32), "interpolate_pos_encoding": True})
    images = torch.randn(2, 3, 40, 24)
    expected = model(images, interpolate_pos_encoding=True).logits
    torch.testing.assert_close(result(images, interpolate_pos_encoding=True).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "reason"), [("vit", "positions"), ("swin", "positions"), ("pvt", "the model itself")])
def test_a_trace_for_one_size_says_why_and_names_it(name: str, reason: str) -> None:
    result = traced(name)
    sizes = result.signature.image_sizes
    assert sizes is not None
    size = model_of(name).config.image_size  # type: ignore[union-attr]
    assert sizes.fixed == (size, size)
    assert reason in str(sizes)
    with pytest.raises(TraceError, match=rf"images of 40 x 48, but the model takes {size} x {size}: .*resize them"):
        result(torch.randn(1, 3, 40, 48))


def test_one_other_size_interpolates_the_positions() -> None:
    model, result = model_of("vit"), traced("vit", (48, 16))
    images = torch.randn(2, 3, 48, 16)
    expected = model(images, interpolate_pos_encoding=True).logits
    torch.testing.assert_close(result(images, **result.constants).logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(TraceError, match="takes 48 x 16: it was traced with this image_size"):
        result(torch.randn(1, 3, 32, 32), **result.constants)


@pytest.mark.parametrize("shape", [(1, 1, 32, 32), (1, 32, 32, 3), (3, 32, 32), (1, 3, 7, 32)])
def test_images_that_no_size_fits_are_refused(shape: tuple[int, ...]) -> None:
    problems = {1: "has 1 channels", 32: "channels come last", 3: "takes 8 x 8 or more"}
    expected = problems[shape[1]] if len(shape) == 4 else r"images are \[batch, channels, height, width\]"
    with pytest.raises(TraceError, match=expected):
        traced("dinov2")(torch.randn(shape))


def test_a_request_that_cannot_be_met_is_an_error() -> None:
    images = {"pixel_values": torch.randn(1, 3, 64, 64)}
    with pytest.raises(TraceError, match="cannot be traced for images of any size: the model itself takes no other"):
        trace(model_of("pvt"), images, image_size="dynamic")
    with pytest.raises(TraceError, match="any size: it was traced with dynamic=False"):
        trace(model_of("resnet"), images, image_size="dynamic", dynamic=False)
    with pytest.raises(TraceError, match=r"image_size is 224; give a height and a width"):
        trace(model_of("resnet"), images, image_size=224)  # type: ignore[arg-type]
    with pytest.raises(TraceError, match="takes input; leave it out"):
        trace(nn.Linear(3, 3), (torch.randn(2, 3),), image_size=(8, 8))


class Rounding(nn.Module):
    """A model that pads to multiples of four, by a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 4, 4)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if pixel_values.shape[3] % 4:
            pixel_values = nn.functional.pad(pixel_values, (4 - pixel_values.shape[3] % 4, 0))
        return self.conv(pixel_values).mean((2, 3))


def test_a_branch_on_a_remainder_leaves_multiples() -> None:
    torch.manual_seed(0)
    result = trace(Rounding(), (torch.randn(2, 3, 64, 64),))
    assert result.signature.image_sizes == ImageSizes(least=(32, 32), multiple_of=32)
    with pytest.raises(TraceError, match="images of 64 x 65, but the model takes multiples of 32"):
        result(torch.randn(1, 3, 64, 65))


class Branching(nn.Module):
    """A model that branches on the width itself."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        sums = pixel_values.sum((2, 3))
        return sums * 2 if pixel_values.shape[3] > 200 else sums


def test_a_branch_on_the_size_fixes_it() -> None:
    sizes = trace(Branching(), (torch.randn(2, 3, 256, 256),)).signature.image_sizes
    assert sizes is not None
    assert sizes.fixed == (256, 256)
    assert "differs" in str(sizes)


@pytest.mark.parametrize("module", [modeling_mobilenet_v1, modeling_mobilenet_v2])
def test_the_padding_of_mobilenets_is_recognised(module: ModuleType) -> None:
    assert any(padding.is_function_of(module) for padding in SAME_PADDING)

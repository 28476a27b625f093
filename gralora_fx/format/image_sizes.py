"""Heights and widths of images: which ones a trace or an export takes, and what is wrong with others."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from gralora_fx.errors import TraceError, option, shown
from gralora_fx.format.input_names import IMAGES, takes_images

if TYPE_CHECKING:  # the command line reads sizes before torch is loaded
    from torch import nn

DYNAMIC: Final = "dynamic"
INTERPOLATE = "interpolate_pos_encoding"  # transformers' argument of models with a table of positions
ImageSize = tuple[int, int] | Literal["dynamic"] | None


@dataclass(frozen=True)
class ImageSizes:
    """The sizes of images `[batch, channels, height, width]` that a trace or an export takes.

    Attributes:
        fixed: The only height and width; None where both may vary.
        reason: Why they are fixed, or None.
        least: The smallest height and width, if they vary.
        multiple_of: What they have to be multiples of, if they vary.
    """

    fixed: tuple[int, int] | None = None
    reason: str | None = None
    least: tuple[int, int] = (1, 1)
    multiple_of: int = 1

    def __str__(self) -> str:
        """The sizes in words."""
        if self.fixed is not None:
            return f"{pixels(self.fixed)} only" + (f" ({self.reason})" if self.reason else "")
        multiples = f", in multiples of {self.multiple_of}" if self.multiple_of > 1 else ""
        return f"{pixels(self.least)} or more{multiples}"

    def problem(self, shape: Sequence[int], channels: int | None) -> str | None:
        """What is wrong with images of a shape, and what to do; None if they are taken.

        Args:
            shape: `[batch, channels, height, width]`.
            channels: How many channels are taken, or None for any number.
        """
        if len(shape) != 4:
            return f"has shape {list(shape)}, but images are [batch, channels, height, width]; add or drop axes"
        if channels is not None and shape[1] != channels:
            last = shape[3] == channels
            remedy = "its channels come last: move them to axis 1" if last else "convert them, as its processor does"
            return f"has {shape[1]} channels, of shape {list(shape)}, but the model takes {channels}; {remedy}"
        size = (shape[2], shape[3])
        if self.fixed is not None:
            if size == self.fixed:
                return None
            why = "" if self.reason is None else f": {self.reason}"
            return f"has images of {pixels(size)}, but the model takes {pixels(self.fixed)}{why}; resize them"
        if any(actual < least for actual, least in zip(size, self.least, strict=True)):
            return f"has images of {pixels(size)}, but the model takes {pixels(self.least)} or more; enlarge them"
        if any(actual % self.multiple_of for actual in size):
            return (
                f"has images of {pixels(size)}, but the model takes multiples of {self.multiple_of}; resize or pad them"
            )
        return None

    def fitting(self, size: tuple[int, int]) -> tuple[int, int]:
        """The size nearest to another from above that is taken."""
        if self.fixed is not None:
            return self.fixed
        height, width = (
            -(-max(actual, least) // self.multiple_of) * self.multiple_of
            for actual, least in zip(size, self.least, strict=True)
        )
        return height, width


def pixels(size: tuple[int, int]) -> str:
    """A height and a width in words."""
    return f"{size[0]} x {size[1]}"


def check_image_size(image_size: object) -> None:
    """Check a requested image size."""
    if image_size is None or image_size == DYNAMIC:
        return
    is_pair = isinstance(image_size, (tuple, list)) and len(image_size) == 2
    if not is_pair or any(type(size) is not int or size < 1 for size in image_size):  # type: ignore[attr-defined]
        raise TraceError(f"image_size is {shown(image_size)}; give a height and a width, (224, 224), or {DYNAMIC!r}")


def at_image_size(
    model: nn.Module,
    inputs: dict[str, Any],
    constants: dict[str, Any],
    image_size: tuple[int, int] | Literal["dynamic"],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Example inputs and constants for a requested image size.

    A model with a table of positions is told to interpolate it, if the size is not its own.
    """
    check_image_size(image_size)
    if not takes_images(inputs):
        raise TraceError(
            f"{option(image_size=...)} is for models that take images, {IMAGES} of [batch, channels, height, width], "
            f"and {type(model).__name__} takes {', '.join(inputs)}; leave it out"
        )
    if isinstance(image_size, (tuple, list)):
        inputs = resized(inputs, (image_size[0], image_size[1]))
    if may_interpolate(model) and (image_size == DYNAMIC or tuple(image_size) != _own_size(model)):
        constants = {INTERPOLATE: True, **constants}
    return inputs, constants


def may_interpolate(model: nn.Module) -> bool:
    """Whether a model has a table of positions that it may interpolate."""
    return INTERPOLATE in inspect.signature(type(model).forward).parameters


def _own_size(model: nn.Module) -> tuple[int, int] | None:
    """The image size in a model's configuration."""
    config = getattr(model, "config", None)
    size = getattr(getattr(config, "vision_config", config), "image_size", None)
    if isinstance(size, int):
        return size, size
    return (size[0], size[1]) if isinstance(size, (list, tuple)) and len(size) == 2 else None


def resized(sample: Mapping[str, Any], size: tuple[int, int], rows: int | None = None) -> dict[str, Any]:
    """The inputs with images cropped from repetitions of the example's own, and optionally only some rows."""
    images = sample[IMAGES]
    counts = [-(-new // old) for new, old in zip(size, images.shape[2:], strict=True)]
    images = images.repeat(1, 1, *counts)[:, :, : size[0], : size[1]].contiguous()
    inputs = {**sample, IMAGES: images}
    return inputs if rows is None else {name: value[:rows] for name, value in inputs.items()}

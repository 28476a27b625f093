"""Heights and widths of images: those that a trace or an export takes, what is wrong with others, the option."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Final, Literal

from gralora_fx.core.config.option import MODEL, Option
from gralora_fx.errors import ConfigError, TraceError, option, shown
from gralora_fx.features.images.tasks_and_inputs import CLASSIFICATION, IMAGES
from gralora_fx.format.input_names import OtherValues

DYNAMIC: Final = "dynamic"
ImageSize = tuple[int, int] | Literal["dynamic"] | None


@dataclass(frozen=True)
class ImageSizes:
    """The sizes of images `[batch, channels, height, width]` that a trace or an export takes."""

    input: ClassVar = IMAGES
    title: ClassVar = "images"

    fixed: tuple[int, int] | None = None  # the only height and width; None where both may vary
    reason: str | None = None  # why they are fixed
    least: tuple[int, int] = (1, 1)  # the smallest height and width, if they vary
    multiple_of: int = 1  # of height and width, if they vary

    def __str__(self) -> str:
        if self.fixed is not None:
            return f"{pixels(self.fixed)} only" + (f" ({self.reason})" if self.reason else "")
        multiples = f", in multiples of {self.multiple_of}" if self.multiple_of > 1 else ""
        return f"{pixels(self.least)} or more{multiples}"

    @property
    def trace_options(self) -> Mapping[str, Any]:
        """The size that was traced for, as an option of `trace`."""
        return {"image_size": self.fixed or DYNAMIC}

    @property
    def smallest(self) -> tuple[int, int]:
        """The smallest height and width."""
        return self.fitting((1, 1))

    def problem(self, shape: Sequence[int], sizes: Sequence[Any]) -> str | None:
        """Return what is wrong with images `[batch, channels, height, width]`, and a remedy; None if they are taken."""
        if len(shape) != 4:
            return f"has shape {list(shape)}, but images are [batch, channels, height, width]; add or drop axes"
        channels = next(iter(sizes[1:2]), None)
        if isinstance(channels, int) and shape[1] != channels:
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
        """Return the smallest accepted size that is no smaller than another."""
        if self.fixed is not None:
            return self.fixed
        height, width = (
            -(-max(actual, least) // self.multiple_of) * self.multiple_of
            for actual, least in zip(size, self.least, strict=True)
        )
        return height, width

    def others(self, example: Any) -> Iterator[tuple[str, OtherValues]]:
        """Yield sizes smaller and larger than an example's, odd if they may be, where sizes vary."""
        if self.fixed is not None:
            return
        height, width = example.shape[2:]
        for size in (self.fitting((height // 2 + 1, width)), self.fitting((width + 5, height + 3))):
            yield f"images of {pixels(size)}", partial(_drawn, size)

    def wrong_field(self) -> str | None:
        """Return the name of a field with a size below 1; None if there is none."""
        sizes = {"fixed": self.fixed or (), "least": self.least}
        return next((name for name, size in sizes.items() if any(axis < 1 for axis in size)), None)


FACTS = {"image_sizes": ImageSizes}


def _drawn(size: tuple[int, int], images: Any, generator: Any) -> Any:
    """Return random images of another height and width."""
    import torch

    return torch.randn(*images.shape[:2], *size, generator=generator).to(images.dtype)


def pixels(size: tuple[int, int]) -> str:
    """Return a height and a width in words."""
    return f"{size[0]} x {size[1]}"


def check_image_size(image_size: object) -> None:
    """Check a requested image size."""
    if image_size is None or image_size == DYNAMIC:
        return
    is_pair = isinstance(image_size, (tuple, list)) and len(image_size) == 2
    if not is_pair or any(type(size) is not int or size < 1 for size in image_size):  # type: ignore[attr-defined]
        raise TraceError(f"image_size is {shown(image_size)}; give a height and a width, (224, 224), or {DYNAMIC!r}")


@dataclass(frozen=True)
class ImageOptions:
    """The size of images that an export takes."""

    # `HxW` or `dynamic`; None for what the model allows
    image_size: Annotated[
        str | None,
        Option(
            "Take images of this size, or of any (dynamic).",
            MODEL,
            "[HxW|dynamic]",
            left_out="any where the model allows it, else its own",
        ),
    ] = None

    def __post_init__(self) -> None:
        self._size()

    def check(self, task: str | None) -> None:
        """Check that the option has an effect for a task, which is None where it is not known yet."""
        if self.image_size is not None and task not in (None, CLASSIFICATION):
            raise ConfigError(f"{option('image_size')} is for {CLASSIFICATION}, and the task is {task}; leave it out")

    def trace_options(self) -> dict[str, Any]:
        """Return the size as an option of `trace`."""
        return {} if self.image_size is None else {"image_size": self._size()}

    def _size(self) -> ImageSize:
        """Return the size: `224x224` is a height and a width."""
        if self.image_size in (None, DYNAMIC):
            return DYNAMIC
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", str(self.image_size))
        if match is None:
            raise ConfigError(
                f"{option('image_size')} takes a height and a width, such as 224x224, or dynamic, but got "
                f"{self.image_size!r:.80}"
            )
        return int(match[1]), int(match[2])

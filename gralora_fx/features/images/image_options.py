"""The option of `gralora-fx export` for the size of images."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

from gralora_fx.core.config.option import MODEL, Option
from gralora_fx.errors import ConfigError, option
from gralora_fx.features.images.image_sizes import DYNAMIC, ImageSize
from gralora_fx.features.images.image_tasks import CLASSIFICATION


@dataclass(frozen=True)
class ImageOptions:
    """The size of images that an export takes.

    Attributes:
        image_size: `HxW` or `dynamic`; None for what the model allows.
    """

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
        """Check the size."""
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

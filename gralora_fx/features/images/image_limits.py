"""Bounds of images that are read, as options of the service, and from where it fetches them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

from gralora_fx.core.config.option import Option, check_options
from gralora_fx.errors import ConfigError, ServingError, option, shown

_HOST = re.compile(r"([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?", re.IGNORECASE)


@dataclass(frozen=True)
class ImageLimits:
    """Bounds of images that are read."""

    # the most bytes of an image's file
    max_image_bytes: Annotated[
        int, Option("Refuse an image whose file has more bytes than this.", metavar="BYTES", least=1)
    ] = 20_000_000
    # the most pixels of an image; those of a request have at most four times as many together
    max_image_pixels: Annotated[
        int,
        Option(
            "Refuse an image of more pixels than this, and images of a request that have four times as many together.",
            metavar="N",
            least=1,
        ),
    ] = 40_000_000
    # the most images of a request
    max_images: Annotated[int, Option("Refuse a request with more images than this.", metavar="N", least=1)] = 16

    def __post_init__(self) -> None:
        check_options(self, ConfigError)

    def check_count(self, count: int) -> None:
        """Check how many images a request has."""
        if count > self.max_images:
            raise ServingError(f"there are {count} images, more than {self.max_images}; give fewer")

    def check_bytes(self, count: int) -> None:
        """Check the bytes of an image's file."""
        if count > self.max_image_bytes:
            raise ServingError(f"the image has more than {self.max_image_bytes:,} bytes; give a smaller file")

    def check_size(self, size: tuple[int, int]) -> None:
        """Check the width and the height of an image."""
        width, height = size
        if not (width > 0 and height > 0):
            raise ServingError(f"the image has no pixels, of size {width} x {height}; give one that has some")
        if width * height > self.max_image_pixels:
            raise ServingError(
                f"the image is {width} x {height} pixels, more than {self.max_image_pixels:,}; make it smaller"
            )


def _host_problem(value: Any) -> str | None:
    if isinstance(value, str):
        return f"allow_image_host is a sequence of hosts, but got {shown(value)}"
    wrong = next((one for one in value if _HOST.fullmatch(one) is None), None)
    if wrong is None:
        return None
    return (
        f"{option('allow_image_host')} must be the name of a host as in a URL, with its port if that is not the usual "
        f"one, such as images.example.org or 10.0.0.5:9000, but got {shown(wrong)}"
    )


@dataclass(frozen=True)
class ServedImages(ImageLimits):
    """Limits of the images that the service reads."""

    # hosts that images are fetched from, each with `:port` if that is not the usual one. All other URLs than `data:`
    # are refused.
    allow_image_host: Annotated[
        tuple[str, ...],
        Option(
            "Let requests name images on this host, such as images.example.org or 10.0.0.5:9000; may be repeated.",
            metavar="HOST",
            left_out="none; images come as data: URLs",
            problem=_host_problem,
        ),
    ] = ()

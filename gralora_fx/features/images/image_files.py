"""Images as callers give them, opened: files of a few formats, within limits that are checked by their headers."""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gralora_fx.base.compat.packages import installation, missing_packages
from gralora_fx.errors import ServingError, first_line, listed, shown
from gralora_fx.features.images.image_limits import ImageLimits
from gralora_fx.features.images.image_urls import bytes_of_url, is_url
from gralora_fx.run.generate.request_errors import WrongFieldError

if TYPE_CHECKING:  # of an extra
    from PIL.Image import Image

_TOGETHER = 4  # the images of a request have at most so many times the pixels that one may have
_SCANS = 100  # passes over a progressive JPEG: encoders write about ten, and each takes the time of a whole picture
_IMAGE = "image"
# types of parts of messages that are images, and the fields that hold one
_HOLDERS = {_IMAGE: (_IMAGE, "url", "path"), "image_url": ("image_url",), "input_image": ("image_url",)}
_FORMATS = "PNG, JPEG, WebP, GIF or BMP"


def images_of(
    values: Sequence[Any], limits: ImageLimits, hosts: Collection[str] = (), names: Sequence[str] = ()
) -> list[Image]:
    """Open the images of a request, each as `image_of` takes it; `names` are what errors call them, such as fields.

    Raise a `WrongFieldError` for one that is not taken, or too many pixels together, a `ServingError` for too many
    images.
    """
    limits.check_count(len(values))
    images: list[Image] = []
    pixels, most = 0, _TOGETHER * limits.max_image_pixels
    for number, value in enumerate(values, 1):
        name = names[number - 1] if names else f"image {number}"
        try:
            image = image_of(value, limits, hosts)
        except ServingError as error:
            raise WrongFieldError(name, str(error)) from error
        pixels += image.width * image.height
        if pixels > most:
            raise WrongFieldError(name, f"the images have more than {most:,} pixels together; make them smaller")
        images.append(image)
    return images


def image_of(value: Any, limits: ImageLimits, hosts: Collection[str] = ()) -> Image:
    """Open an image that a caller of Python gives, as upright pixels in RGB.

    Args:
        value: A `PIL.Image.Image`, the bytes of a file, the path of one, an array `[height, width, 3]` of uint8, or a
            URL, `data:` or of an allowed host.
        limits: Its bounds.
        hosts: Hosts that images are fetched from, as `bytes_of_url` takes them.

    Raises:
        ServingError: It is none of these, is damaged, or is above a limit; or Pillow is not installed.
    """
    _check_pillow()
    from PIL import Image

    if isinstance(value, Image.Image):
        return _converted(value, limits)
    if isinstance(value, np.ndarray):
        if value.ndim != 3 or value.shape[2] != 3 or value.dtype != np.uint8:
            raise ServingError(
                f"the image is an array {list(value.shape)} of {value.dtype}; give [height, width, 3] of uint8"
            )
        limits.check_size((value.shape[1], value.shape[0]))
        return Image.fromarray(np.ascontiguousarray(value))
    if isinstance(value, (bytes, bytearray, memoryview)):
        return read_image(bytes(value), limits)
    if isinstance(value, str) and is_url(value):
        return read_image(bytes_of_url(value, limits.check_bytes, hosts), limits)
    if isinstance(value, (str, Path)):
        return read_image(_bytes_of_file(Path(value), limits), limits)
    raise ServingError(
        f"an image is a PIL image, an array, bytes, a path or a URL, but got {shown(type(value).__name__)}"
    )


def images_of_chat(messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[Any]]:
    """Take the images out of a chat in the forms of transformers and of OpenAI.

    Args:
        messages: Messages, whose content is text or parts. An image is a part `{"type": "image"}` with `image`, `url`
            or `path`, or without, where images are given beside the chat; or OpenAI's `image_url` or `input_image`.

    Returns:
        The messages with `{"type": "image"}` alone for each image, as templates take them; and the images in order, as
        `image_of` takes them, without those that are given beside the chat.

    Raises:
        ServingError: A part of an image's type holds none, or several.
    """
    images: list[Any] = []

    def plain(part: Any, where: str) -> Any:
        if not isinstance(part, Mapping) or part.get("type") not in _HOLDERS:
            return part
        held = [part[name] for name in _HOLDERS[part["type"]] if part.get(name) is not None]
        value = held[0]["url"] if held and isinstance(held[0], Mapping) and "url" in held[0] else (held or [None])[0]
        if len(held) > 1 or (value is None and part["type"] != _IMAGE):
            raise ServingError(
                f"{where} is of the type {part['type']} and holds {len(held)} images; give one, as "
                f"{listed(_HOLDERS[part['type']])}"
            )
        images.extend([] if value is None else [value])
        return {"type": _IMAGE}

    chat = [dict(message) for message in messages]
    for number, message in enumerate(chat):
        if isinstance(message.get("content"), (list, tuple)):
            message["content"] = [
                plain(part, f"part {index} of message {number}") for index, part in enumerate(message["content"])
            ]
    return chat, images


def read_image(data: bytes, limits: ImageLimits) -> Image:
    """Read a file as an image in RGB, upright, on white where it is transparent.

    The format is recognised by the file's first bytes. Animations and files of several pages are refused, as by
    OpenAI's service; further pictures in a JPEG are other forms of the first.

    Args:
        data: The bytes of a file: PNG, JPEG, WebP, GIF or BMP.
        limits: Its bounds, which are checked by the header, before there is memory for pixels.

    Raises:
        ServingError: It is of another format, damaged, animated or above a limit; or Pillow is not installed.
    """
    _check_pillow()
    if not data:
        raise ServingError("the image is empty; give a file with a picture")
    limits.check_bytes(len(data))
    if (opened := _opener(data)) is None:
        raise ServingError(f"the image is not {_FORMATS} (it begins with {shown(data[:12])}); convert it to one")
    if (size := _webp_size(data)) is not None:  # Pillow takes memory for the pixels before it tells the size
        limits.check_size(size)
    with _damages():
        image = opened(io.BytesIO(data))
    limits.check_size(image.size)
    is_jpeg = image.format in ("JPEG", "MPO")
    if is_jpeg and data.count(b"\xff\xda") > _SCANS:
        raise ServingError(f"the image has more than {_SCANS} scans, which no JPEG needs; save it again")
    with _damages():
        if not is_jpeg and getattr(image, "is_animated", False):
            raise ServingError("the image is animated; give one picture of it")
        image.load()
    return _converted(image, limits)


def _check_pillow() -> None:
    """Check that Pillow is installed; the rest of its extra is of some models' processors."""
    if "pillow" in missing_packages("vision"):
        raise ServingError(f"an image needs pillow, which is not installed: {installation('vision')}")


def _opener(data: bytes) -> Callable[[io.BytesIO], Any] | None:
    """Return the Pillow function that opens a file, by its first bytes; None for a format that is not read."""
    from PIL import BmpImagePlugin, GifImagePlugin, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImagePlugin.PngImageFile
    if data.startswith(b"\xff\xd8\xff"):
        return JpegImagePlugin.jpeg_factory
    if data.startswith((b"GIF87a", b"GIF89a")):
        return GifImagePlugin.GifImageFile
    if _is_webp(data):
        return WebPImagePlugin.WebPImageFile
    return BmpImagePlugin.BmpImageFile if data.startswith(b"BM") else None


def _is_webp(data: bytes) -> bool:
    return data[:4] == b"RIFF" and data[8:12] == b"WEBP"


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Return the width and the height that a WebP file's header says; None for another file."""
    if not _is_webp(data):
        return None
    chunk, head = data[12:16], data[20:30].ljust(10, b"\0")
    if chunk == b"VP8X":
        return int.from_bytes(head[4:7], "little") + 1, int.from_bytes(head[7:10], "little") + 1
    if chunk == b"VP8L":
        bits = int.from_bytes(head[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return int.from_bytes(head[6:8], "little") & 0x3FFF, int.from_bytes(head[8:10], "little") & 0x3FFF


@contextmanager
def _damages() -> Iterator[None]:
    """Say what is wrong with a file; Pillow raises types of its own, and those of what it is built on."""
    from PIL.Image import DecompressionBombError, DecompressionBombWarning

    try:
        yield
    except ServingError:
        raise
    except (DecompressionBombError, DecompressionBombWarning) as error:  # of a GIF, whose screen is smaller
        raise ServingError(f"the image has too many pixels ({first_line(error)}); make it smaller") from error
    except Exception as error:
        raise ServingError(f"the image is damaged or cut off ({first_line(error)}); give the whole file") from error


def _converted(image: Image, limits: ImageLimits) -> Image:
    """Return an image in RGB, upright, on white where it is transparent, as transformers' processors have it."""
    from PIL import Image, ImageOps

    limits.check_size(image.size)
    try:
        upright = ImageOps.exif_transpose(image)
    except Exception as error:
        raise ServingError(
            f"the image's EXIF orientation cannot be read ({first_line(error)}); save the image without EXIF data"
        ) from error
    if upright.mode in ("I", "F"):
        raise ServingError(f"what is black and white in the mode {upright.mode} is not known; convert it to RGB")
    try:
        if upright.mode.startswith("I;16"):
            upright = _of_eight_bits(upright)
        if "A" in upright.getbands() or upright.info.get("transparency") is not None:
            picture = upright.convert("RGBA")
            white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
            upright = Image.alpha_composite(white, picture)
        return upright.convert("RGB")
    except Exception as error:
        raise ServingError(
            f"the image cannot be converted from {image.mode} to RGB ({first_line(error)}); save it in RGB"
        ) from error


def _of_eight_bits(image: Image) -> Image:
    """Return the higher eight bits of greys, as Pillow takes them of colours; what is transparent is white."""
    from PIL import Image

    values = np.asarray(image)
    grey = (values >> 8).astype(np.uint8)
    if (transparent := image.info.get("transparency")) is not None:
        grey[values == transparent] = 255
    return Image.fromarray(grey)


def _bytes_of_file(path: Path, limits: ImageLimits) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(limits.max_image_bytes + 1)
    except (OSError, ValueError) as error:
        raise ServingError(f"the image {shown(str(path))} cannot be read ({first_line(error)})") from error
    limits.check_bytes(len(data))
    return data

"""Images as strangers send them: whole ones in every mode, damaged ones, huge ones, and files that are no images."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("L", "P"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
}
SIZES = ((1, 1), (1, 90), (90, 1), (31, 17))
_ORIENTATION = 0x0112


def picture(mode: str = "RGB", size: tuple[int, int] = (31, 17)) -> Image.Image:
    """Draw an image that no turn and no exchange of channels leaves as it is."""
    width, height = size
    down, across = np.mgrid[0:height, 0:width]
    if mode == "I;16":
        return Image.fromarray((down * 3001 + across * 997 + 300).astype(np.uint16))
    red, green, blue, alpha = (down * 9 + across * 5, across * 8, 255 - down * 13, 20 + across * 7 + down)
    colours = np.stack([red, green, blue, alpha], axis=-1).clip(0, 255).astype(np.uint8)
    whole = Image.fromarray(colours, "RGBA") if mode in ("RGBA", "LA") else Image.fromarray(colours[..., :3])
    return whole.convert("P", palette=Image.Palette.ADAPTIVE, colors=40) if mode == "P" else whole.convert(mode)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Write an image as a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def whole_files() -> Iterator[tuple[str, bytes]]:
    """Yield right files: every mode in every format, sizes, and the eight ways in which a camera is held."""
    for kind, modes in MODES.items():
        for mode in modes:
            for size in SIZES:
                yield f"{kind} {mode} {size[0]}x{size[1]}", encoded(picture(mode, size), kind)
    yield "PNG P with a transparent colour", encoded(picture("P"), "PNG", transparency=3)
    yield "PNG P with alphas", encoded(picture("P"), "PNG", transparency=bytes(range(0, 200, 5)))
    yield "PNG L with a transparent grey", encoded(picture("L"), "PNG", transparency=60)
    yield "PNG RGB with a transparent colour", encoded(picture(), "PNG", transparency=picture().getpixel((4, 4)))
    yield "GIF with a transparent colour", encoded(picture("P"), "GIF", transparency=2)
    yield "JPEG progressive", encoded(picture(), "JPEG", progressive=True)
    yield "JPEG with a second form of the picture", encoded(picture(), "MPO", save_all=True, append_images=[picture()])
    yield "WEBP lossless", encoded(picture("RGBA"), "WEBP", lossless=True)
    for kind in ("JPEG", "PNG", "WEBP"):
        for orientation in (*range(10), 77):
            exif = Image.Exif()
            exif[_ORIENTATION] = orientation
            yield f"{kind} turned {orientation}", encoded(picture(), kind, exif=exif)


def damaged_files() -> Iterator[tuple[str, bytes]]:
    """Yield files that were cut off, or of which bits were turned over."""
    draws = random.Random(0)
    for kind in FORMATS:
        data = encoded(picture("RGB" if kind != "GIF" else "P", (40, 30)), kind)
        for end in sorted({*range(1, 12), *(len(data) * part // 14 for part in range(1, 14)), len(data) - 1}):
            yield f"{kind} cut at {end}", data[:end]
        for number in range(40):
            flipped = bytearray(data)
            # half of them in the header
            place = draws.randrange(min(80, len(data)) if number % 2 else len(data))
            flipped[place] ^= 1 << draws.randrange(8)
            yield f"{kind} with a bit flipped at {place}, {number}", bytes(flipped)
        yield f"{kind} with zeros behind it", data + bytes(100)


def png(width: int, height: int, rows: bytes, depth: int = 8, colours: int = 2) -> bytes:
    """Write a PNG file of compressed rows, whatever the header says of them."""
    head = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", rows), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


def huge_files() -> Iterator[tuple[str, bytes]]:
    """Yield small files whose pictures would take gigabytes."""
    packer = zlib.compressobj()
    rows = b"".join(packer.compress(bytes(30_000 // 8 + 1) * 1_000) for _ in range(30)) + packer.flush()
    yield "PNG of 30,000 x 30,000 in black and white", png(30_000, 30_000, rows, 1, 0)
    yield "PNG of 30,000 x 30,000 with the data of a few rows", png(30_000, 30_000, zlib.compress(bytes(9_000)))
    yield "PNG of 2**31 - 1 columns", png(2**31 - 1, 2**31 - 1, b"")
    jpeg = bytearray(encoded(picture(), "JPEG"))
    place = jpeg.index(b"\xff\xc0")
    jpeg[place + 5 : place + 9] = struct.pack(">HH", 65_535, 65_535)
    yield "JPEG of 65,535 x 65,535", bytes(jpeg)
    gif = bytearray(encoded(picture("P"), "GIF"))
    gif[6:10] = struct.pack("<HH", 65_535, 65_535)
    yield "GIF on a screen of 65,535 x 65,535", bytes(gif)
    place = gif.index(b"\x2c\x00\x00\x00\x00")
    gif[6:10], gif[place + 5 : place + 9] = struct.pack("<HH", 1, 1), struct.pack("<HH", 60_000, 60_000)
    yield "GIF of 60,000 x 60,000 on a screen of one pixel", bytes(gif)
    bmp = bytearray(encoded(picture(), "BMP"))
    bmp[18:26] = struct.pack("<ii", 30_000, 30_000)
    yield "BMP of 30,000 x 30,000", bytes(bmp)
    webp = bytearray(encoded(picture("RGBA"), "WEBP"))
    webp[24:30] = (16_382).to_bytes(3, "little") * 2
    yield "WEBP with a canvas of 16,383 x 16,383", bytes(webp)
    lossless = bytearray(encoded(picture(), "WEBP", lossless=True))
    lossless[21:25] = struct.pack("<I", 16_382 | 16_382 << 14)
    yield "WEBP without loss of 16,383 x 16,383", bytes(lossless)
    lossy = bytearray(encoded(picture(), "WEBP"))
    lossy[26:30] = struct.pack("<HH", 16_383, 16_383)
    yield "WEBP with loss of 16,383 x 16,383", bytes(lossy)


def other_files() -> Iterator[tuple[str, bytes]]:
    """Yield animations, and what is no image of a format that is read."""
    frames = [picture("RGB"), picture("RGB").transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    for kind in ("GIF", "PNG", "WEBP"):
        yield f"{kind} animated", encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)
    for kind in ("TIFF", "PPM", "ICO", "TGA", "PDF", "AVIF"):
        yield kind, encoded(picture(), kind)
    yield "SVG", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>'
    yield "text", b"What is in this picture?"
    yield "HTML", b"<!DOCTYPE html><title>404</title>"
    yield "nothing", b""
    yield "PNG's signature alone", b"\x89PNG\r\n\x1a\n"
    yield "PNG without a column", png(0, 5, zlib.compress(bytes(5)))
    yield "PNG without a row", png(5, 0, zlib.compress(b""))
    jpeg = encoded(picture(), "JPEG", progressive=True)
    scan = jpeg.rindex(b"\xff\xda")
    yield "JPEG of ten thousand scans", jpeg[:scan] + jpeg[scan:-2] * 10_000 + jpeg[-2:]

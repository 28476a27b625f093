"""Images of strangers: each is a right picture, as Pillow and transformers convert it, or one clear error."""

from __future__ import annotations

import base64
import io
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from odd_images import FORMATS, damaged_files, encoded, huge_files, other_files, picture, whole_files
from PIL import Image, ImageOps
from transformers.image_transforms import convert_to_rgb

from gralora_fx.errors import ConfigError, ServingError
from gralora_fx.features.images.image_files import ImageLimits, image_of, images_of, images_of_chat, read_image
from gralora_fx.run.generate.request_errors import WrongFieldError

LIMITS = ImageLimits()
SMALL = encoded(picture(), "PNG")


def by_pillow(data: bytes) -> Image.Image | None:
    """Read a file by Pillow, converted as transformers does; None if Pillow does not read it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            image.load()
            image = ImageOps.exif_transpose(image)
        except Exception:  # noqa: BLE001  # whatever a damaged file leads to
            return None
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return convert_to_rgb(image)


def refusal(data: bytes) -> str | None:
    """Return the error of a file, which is one clear line; None for one that is read as Pillow does."""
    expected = by_pillow(data)
    try:
        found = read_image(data, LIMITS)
    except ServingError as error:
        text = str(error)
        assert text.startswith("the image ")
        assert "\n" not in text
        assert "; " in text
        assert expected is None or any(reason in text for reason in (" pixels, more than ", "animated", "scans"))
        return text
    assert expected is not None
    assert found.mode == "RGB"
    assert np.array_equal(np.asarray(found), np.asarray(expected))
    return None


def test_whole_files_of_every_mode_are_read_as_transformers_reads_them() -> None:
    assert {name: text for name, data in whole_files() if (text := refusal(data)) is not None} == {}


def test_damaged_files_are_read_as_pillow_does_or_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow
        refused = [name for name, data in damaged_files() if refusal(data) is not None]
    assert len(refused) > 100
    for kind in FORMATS:
        assert {f"{kind} cut at {end}" for end in range(1, 12)} <= set(refused)


@pytest.mark.parametrize(("name", "data"), [*huge_files(), *other_files()])
def test_what_is_huge_animated_or_no_image_is_refused(name: str, data: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = refusal(data)
    assert text is not None
    if "animated" in name:
        assert text == "the image is animated; give one picture of it"


def test_there_are_hundreds_of_uploads() -> None:
    every = [*whole_files(), *damaged_files(), *huge_files(), *other_files()]
    assert len({data for _, data in every}) > 400


PROGRAM = """
import resource
from odd_images import encoded, huge_files, picture
from gralora_fx.errors import ServingError
from gralora_fx.features.images.image_files import ImageLimits, read_image

for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
    read_image(encoded(picture("P" if kind == "GIF" else "RGB"), kind), ImageLimits())
files = list(huge_files())
resource.setrlimit(resource.RLIMIT_AS, (spent := int(open("/proc/self/statm").read().split()[0]) * 4096 + 2**25,) * 2)
for name, data in files:
    try:
        read_image(data, ImageLimits())
    except ServingError as error:
        assert " pixels" in str(error) and "make it smaller" in str(error), (name, error)
    else:
        raise AssertionError(name)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is bounded by the system")
def test_huge_images_are_refused_before_there_is_memory_for_them() -> None:
    """All of the process has 32 MiB more than small images have needed, reserved addresses included."""
    path = Path(__file__).parent.parent
    ran = subprocess.run([sys.executable, "-c", PROGRAM], cwd=path, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_grey_of_sixteen_bits_keeps_the_higher_eight_and_is_white_where_transparent() -> None:
    image = picture("I;16")
    values = np.asarray(image)
    found = read_image(encoded(image, "PNG", transparency=int(values[2, 3])), LIMITS)
    expected = (values >> 8).astype(np.uint8)
    expected[2, 3] = 255
    assert np.array_equal(np.asarray(found), np.repeat(expected[..., None], 3, axis=2))


def test_callers_of_python_give_images_in_many_ways(tmp_path: Path) -> None:
    file = tmp_path / "image.png"
    file.write_bytes(SMALL)
    expected = np.asarray(picture())
    url = "data:image/png;base64," + base64.b64encode(SMALL).decode()
    for value in (picture(), SMALL, bytearray(SMALL), file, str(file), expected, url, url.replace(";", ";x=1;", 1)):
        found = image_of(value, LIMITS)
        assert found.mode == "RGB"
        assert np.array_equal(np.asarray(found), expected)
    turned = picture()
    turned.getexif()[0x0112] = 6
    assert image_of(turned, LIMITS).size == (17, 31)
    assert image_of(picture("CMYK"), LIMITS).mode == "RGB"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (np.zeros((4, 5), np.uint8), "the image is an array [4, 5] of uint8; give [height, width, 3] of uint8"),
        (np.zeros((4, 5, 3)), "the image is an array [4, 5, 3] of float64; give [height, width, 3] of uint8"),
        (np.zeros((0, 5, 3), np.uint8), "the image has no pixels, of size 5 x 0; give one that has some"),
        (7, "an image is a PIL image, an array, bytes, a path or a URL, but got 'int'"),
        (Image.new("RGB", (0, 3)), "the image has no pixels, of size 0 x 3; give one that has some"),
        (Image.new("F", (3, 3)), "what is black and white in the mode F is not known; convert it to RGB"),
        ("no/such.png", "the image 'no/such.png' cannot be read ([Errno 2] No such file or directory: 'no/such.png')"),
        ("data:text/plain;base64,aGk=", "the image's URL says that it is 'text/plain'; give an image, as data:image/"),
        ("data:image/png,abc", "the image's URL begins with 'data:image/png,abc'; give data:image/png;base64,..."),
        ("data:image/png;base64", "the image's URL begins with 'data:image/png;base64'; give data:image/png;base64"),
        ("data:image/png;base64,a*", "the image's URL is not base64 (Only base64 data is allowed); encode the file"),
        ("data:image/png;base64,", "the image is empty; give a file with a picture"),
        ("https://example.org/a.png", "images are not fetched from 'example.org'; give the image itself, as a data: U"),
        ("http://[::1/a", "the image's URL is 'http://[::1/a', which is wrong (Invalid IPv6 URL)"),
    ],
)
def test_what_is_no_image_says_what_to_give(value: Any, text: str) -> None:
    with pytest.raises(ServingError) as found:
        image_of(value, LIMITS)
    assert str(found.value).startswith(text)


def test_images_above_a_limit_are_refused_and_named() -> None:
    few = ImageLimits(max_image_bytes=len(SMALL), max_image_pixels=31 * 17, max_images=5)
    assert len(images_of([SMALL] * 4, few)) == 4
    with pytest.raises(WrongFieldError, match=r"^image 5: the images have more than 2,108 pixels together; make them"):
        images_of([SMALL] * 5, few)
    with pytest.raises(ServingError, match=r"^there are 6 images, more than 5; give fewer"):
        images_of([SMALL] * 6, few)
    with pytest.raises(WrongFieldError, match=r"^b: the image has more than \d+ bytes; give a smaller file") as found:
        images_of([SMALL, SMALL + b"0"], few, names=("a", "b"))
    assert found.value.field == "b"
    with pytest.raises(WrongFieldError, match=r"^image 1: the image is 32 x 17 pixels, more than 527; make it smaller"):
        images_of([picture(size=(32, 17))], few)
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(ConfigError, match="max_images must be a whole number of at least 1"):
            ImageLimits(max_images=wrong)  # type: ignore[arg-type]


def test_images_are_taken_out_of_chats_in_order() -> None:
    whole = picture()
    parts = [
        {"type": "image", "image": whole},
        {"type": "text", "text": "a"},
        {"type": "image", "url": "data:1"},
        {"type": "image", "path": Path("b.png")},
        {"type": "image_url", "image_url": {"url": "data:2", "detail": "low"}},
        {"type": "image_url", "image_url": "data:3"},
        {"type": "input_image", "image_url": "data:4"},
        {"type": "image"},
    ]
    messages = [{"role": "system", "content": "See."}, {"role": "user", "content": parts}]
    chat, images = images_of_chat(messages)
    assert images == [whole, "data:1", Path("b.png"), "data:2", "data:3", "data:4"]
    place = {"type": "image"}
    assert chat == [messages[0], {"role": "user", "content": [place, parts[1], *[place] * 6]}]
    assert messages[1]["content"] is parts
    for wrong, text in (
        ({"type": "image_url"}, "part 0 of message 0 is of the type image_url and holds 0 images; give one, as image_"),
        (
            {"type": "image", "url": "a", "path": "b"},
            "part 0 of message 0 is of the type image and holds 2 images; giv",
        ),
    ):
        with pytest.raises(ServingError) as found:
            images_of_chat([{"role": "user", "content": [wrong]}])
        assert str(found.value).startswith(text)


class Images(BaseHTTPRequestHandler):
    """Answers with an image, or as its path says."""

    def do_GET(self) -> None:
        """Answer."""
        paths.append(self.path)
        port = self.server.server_address[1]
        moved = {"/moved": "/a.png?b=c", "/away": f"http://localhost:{port}/a.png", "/file": "file:///etc/passwd"}
        if self.path in moved:
            self.send_response(302)
            self.send_header("Location", moved[self.path])
            self.end_headers()
            return
        self.send_response(404 if self.path == "/none" else 200)
        self.send_header("Content-Length", str(len(SMALL) + (self.path == "/short")))
        self.end_headers()
        self.wfile.write(SMALL)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


paths: list[str] = []


@pytest.fixture
def host() -> Iterator[str]:
    """Yield a host that has images."""
    paths.clear()
    with HTTPServer(("127.0.0.1", 0), Images) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_images_are_fetched_from_named_hosts_alone(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    for path in ("a.png", "moved"):
        assert image_of(f"http://{host}/{path}", LIMITS, [host]).size == (31, 17)
    assert paths == ["/a.png", "/moved", "/a.png?b=c"]
    refused = {
        f"http://{host}/away": f"images are not fetched from 'localhost:{host[10:]}'",
        f"http://{host}/file": "the image cannot be fetched from ",
        f"http://{host}/none": f"the image cannot be fetched from 'http://{host}/none' (HTTP Error 404: Not Found)",
        f"http://{host}/short": "the image cannot be fetched from ",
        f"http://{host}/a b": "the image cannot be fetched from ",
    }
    for url, text in refused.items():
        with pytest.raises(ServingError) as found:
            image_of(url, LIMITS, [host])
        assert str(found.value).startswith(text)
    with pytest.raises(ServingError, match=r"'127\.0\.0\.1:\d+' redirects to another host"):
        image_of(f"http://{host}/away", LIMITS, [host, f"localhost:{host[10:]}"])
    with pytest.raises(ServingError, match=r"^the image has more than 50 bytes"):
        image_of(f"http://{host}/a.png", ImageLimits(max_image_bytes=50), [host])


@pytest.mark.parametrize(
    "url",
    [
        "http://{}@evil.example/a",
        "http://evil.example/{}",
        "http://evil.example#@{}/",
        "http://evil.example\\@{}/",
        "http://127.0.0.1/",
        "http://user:word@{}/a.png",
    ],
)
def test_other_hosts_are_refused_before_their_names_are_looked_up(
    url: str, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: pytest.fail("a name was looked up"))
    with pytest.raises(ServingError, match="images are not fetched from "):
        image_of(url.format(host), LIMITS, [host])
    assert paths == []


def test_without_pillow_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ServingError, match=r"an image needs pillow, which is not installed: pip install 'gralora-fx\["):
        read_image(SMALL, LIMITS)

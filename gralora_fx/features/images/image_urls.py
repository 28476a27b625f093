"""URLs of images: those that hold a file, and those of allowed hosts, from which files are fetched."""

from __future__ import annotations

import base64
import binascii
import time
import urllib.request
from collections.abc import Callable, Collection
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urljoin, urlsplit

from gralora_fx.errors import ServingError, first_line, option, shown

_SECONDS, _PIECE = 10.0, 2**16
_PORTS = {"http": 80, "https": 443}


def is_url(value: str) -> bool:
    """Return whether a text is a URL of the kinds that images are given as."""
    return value[:8].lower().startswith(("data:", "http://", "https://"))


def bytes_of_url(url: str, check: Callable[[int], None], hosts: Collection[str]) -> bytes:
    """Return the bytes of the file that a URL holds or names.

    Args:
        url: A `data:` URL in base64, or one of http or https.
        check: Checks how many bytes the file has, while it is read too.
        hosts: Names of hosts that files are fetched from, each with `:port` if that is not the usual one. Other hosts
            are refused before their names are looked up, in redirects too.

    Raises:
        ServingError: The URL is of another kind, names another host, cannot be read, or its file is above a limit.
    """
    if not is_url(url):
        raise ServingError(f"the image's URL is {shown(url)}; give a data: URL, or one of http or https")
    if url[:5].lower() != "data:":
        return _fetched(url, check, hosts)
    head, comma, text = url.partition(",")
    kind, *parameters = head[5:].lower().split(";")
    if not comma or "base64" not in [parameter.strip() for parameter in parameters]:
        raise ServingError(f"the image's URL begins with {shown(url[:40])}; give data:image/png;base64,...")
    if kind and not kind.strip().startswith("image/"):
        raise ServingError(
            f"the image's URL says that it is {shown(kind)}; give an image, as data:image/png;base64,..."
        )
    text = "".join(text.split())
    check(len(text) * 3 // 4 - 2)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ServingError(f"the image's URL is not base64 ({first_line(error)}); encode the file again") from error


def _fetched(url: str, check: Callable[[int], None], hosts: Collection[str]) -> bytes:
    """Return the bytes of a file of an allowed host."""
    address = _allowed(url, hosts)
    opener = urllib.request.build_opener(_SameHost(hosts))
    request = urllib.request.Request(address, headers={"User-Agent": "gralora-fx", "Accept": "image/*"})
    try:
        with opener.open(request, timeout=_SECONDS) as response:
            return _read_within(response, check)
    except ServingError:
        raise
    except Exception as error:  # of sockets, TLS, HTTP and URLs, each of types of its own
        if isinstance(error, HTTPError):
            error.close()
        raise ServingError(
            f"the image cannot be fetched from {shown(url)} ({first_line(error)}); give it as a data: URL"
        ) from error


def _read_within(response: Any, check: Callable[[int], None]) -> bytes:
    """Return the body of a response, which comes whole within limits of bytes and time."""
    end, data = time.monotonic() + _SECONDS, bytearray()
    while piece := response.read1(_PIECE):
        data += piece
        check(len(data))
        if time.monotonic() > end:
            raise TimeoutError(f"it takes more than {_SECONDS:g} s")
    if response.length:
        raise EOFError(f"{response.length} bytes are missing")
    return bytes(data)


def _allowed(url: str, hosts: Collection[str]) -> str:
    """Return a URL made anew of its parts, whose host is one of those that are allowed."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ServingError(f"the image's URL is {shown(url)}, which is wrong ({first_line(error)})") from error
    name = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or ""
    host = name if port in (None, _PORTS.get(parts.scheme)) else f"{name}:{port}"
    if parts.scheme not in _PORTS or "@" in parts.netloc or host not in {one.lower() for one in hosts}:
        raise ServingError(
            f"images are not fetched from {shown(host)}; give the image itself, as a data: URL, or start the "
            f"service with {option(allow_image_host=host)}"
        )
    return f"{parts.scheme}://{host}{parts.path or '/'}{f'?{parts.query}' if parts.query else ''}"


class _SameHost(urllib.request.HTTPRedirectHandler):
    """Follows redirects to the same host alone."""

    max_redirections = 3

    def __init__(self, hosts: Collection[str]) -> None:
        self._hosts = hosts

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        """Return the next request."""
        fp.close()
        address = _allowed(urljoin(req.full_url, newurl), self._hosts)
        if urlsplit(address).hostname != urlsplit(req.full_url).hostname:
            raise ServingError(f"{shown(req.host)} redirects to another host; give the image's own URL")
        return super().redirect_request(req, fp, code, msg, headers, address)

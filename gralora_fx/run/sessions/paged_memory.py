"""Memory that takes pages once they are used, and whose pages can be given back."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import sys

import numpy as np

PAGE = mmap.PAGESIZE
_POPULATE = 23  # MADV_POPULATE_WRITE of Linux since 5.14, for which `mmap` has no name


class PagedBytes:
    """Zeros in pages of the smallest size.

    A large array of numpy takes memory as it is written, too, but in huge pages, which numpy asks the kernel for, as
    glibc does where `GLIBC_TUNABLES` says so: one byte takes 2 MiB then.

    Attributes:
        array: The bytes.
    """

    def __init__(self, count: int) -> None:
        """Reserve addresses of so many bytes."""
        self._map = _mapped(max(count, 1))
        if sys.platform == "linux":
            with contextlib.suppress(OSError):  # a kernel without huge pages
                self._map.madvise(mmap.MADV_NOHUGEPAGE)
        self.array = np.frombuffer(self._map, np.uint8, count)

    def take(self, start: int, stop: int) -> None:
        """Take the pages of some bytes, which are written soon.

        Pages that are taken together mostly lie together in memory, where the processor finds them sooner. Where the
        system does not do that, each page is taken when it is first written.
        """
        if sys.platform == "linux":
            with contextlib.suppress(OSError):  # an older kernel
                self._map.madvise(_POPULATE, start, stop - start)

    def give_back(self, start: int, stop: int) -> None:
        """Give back the pages that lie wholly within some bytes, which are zeros from then on.

        Where the system does not do that, the bytes stay as they are (see `kept_reason`).
        """
        first, end = whole_pages(start), stop // PAGE * PAGE
        if sys.platform == "linux" and first < end and kept_reason() is None:
            self._map.madvise(mmap.MADV_DONTNEED, first, end - first)


def _mapped(size: int) -> mmap.mmap:
    if sys.platform == "win32":
        return mmap.mmap(-1, size)
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


@functools.cache
def kept_reason() -> str | None:
    """Return why pages that were taken are not given back; None if they are."""
    if sys.platform != "linux":
        return f"{sys.platform} does not take single pages back"
    try:
        _mapped(PAGE).madvise(mmap.MADV_DONTNEED)
    except OSError as error:
        return f"the kernel does not take single pages back ({error})"
    return None


def whole_pages(count: int) -> int:
    """Return how many bytes the pages have that some bytes take."""
    return -(-count // PAGE) * PAGE


def trim_heap() -> None:
    """Give back memory that was freed and that glibc keeps for later; other allocators are left alone."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)

"""Memory that is committed page by page, as it is written, and given back."""

from __future__ import annotations

import contextlib
import functools
import mmap
import sys

import numpy as np

PAGE = mmap.PAGESIZE
_POPULATE = 23  # MADV_POPULATE_WRITE of Linux since 5.14, for which `mmap` has no name


class PagedBytes:
    """Zeros in pages of the smallest size.

    A large numpy array commits memory as it is written, too, but in huge pages, which numpy requests from the kernel,
    as glibc does if `GLIBC_TUNABLES` says so: one byte then takes 2 MiB.
    """

    def __init__(self, count: int) -> None:
        """Reserve address space for a number of bytes."""
        self._map = _mapped(max(count, 1))
        if sys.platform == "linux":
            with contextlib.suppress(OSError):  # a kernel without huge pages
                self._map.madvise(mmap.MADV_NOHUGEPAGE)
        self.array = np.frombuffer(self._map, np.uint8, count)

    def take(self, start: int, stop: int) -> None:
        """Commit the pages of bytes that are written soon.

        Pages committed together are mostly contiguous, so that address translation is faster. If the system cannot,
        each page is committed on its first write.
        """
        if sys.platform == "linux":
            with contextlib.suppress(OSError):  # an older kernel
                self._map.madvise(_POPULATE, start, stop - start)

    def give_back(self, start: int, stop: int) -> None:
        """Release the pages that lie wholly within some bytes, which are zeros afterwards.

        If the system cannot, the bytes stay unchanged (see `kept_reason`).
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
    """Return why pages are not released; None if they are."""
    if sys.platform != "linux":
        return f"{sys.platform} does not take single pages back"
    try:
        _mapped(PAGE).madvise(mmap.MADV_DONTNEED)
    except OSError as error:
        return f"the kernel does not take single pages back ({error})"
    return None


def whole_pages(count: int) -> int:
    """Return the size of the pages that some bytes take."""
    return -(-count // PAGE) * PAGE

"""Memory that takes pages once they are used, and whose pages can be given back."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys

import numpy as np

PAGE = mmap.PAGESIZE
_POPULATE = 23  # MADV_POPULATE_WRITE of Linux since 5.14, for which `mmap` has no name


class PagedBytes:
    """Zeros in pages of the smallest size.

    A large array of numpy's takes memory as it is written, too, but in huge pages: numpy asks the kernel for them, and
    so does glibc where `GLIBC_TUNABLES` says so. A byte then takes 2 MiB.

    Attributes:
        array: The bytes.
    """

    def __init__(self, count: int) -> None:
        """Reserve addresses.

        Args:
            count: How many bytes.

        Raises:
            OSError: There are no addresses for so many.
        """
        size = max(count, 1)
        if sys.platform == "win32":
            self._map = mmap.mmap(-1, size)
        else:
            self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if sys.platform == "linux":
            with contextlib.suppress(OSError):  # a kernel without huge pages
                self._map.madvise(mmap.MADV_NOHUGEPAGE)
        self.array = np.frombuffer(self._map, np.uint8, count)

    def take(self, start: int, stop: int) -> None:
        """Take the pages of some bytes, which are written soon.

        Pages that are taken together mostly lie together, and the processor finds them sooner. Where the system cannot
        do that, each is taken when it is first written.

        Args:
            start: The first byte, at which a page begins.
            stop: The byte after the last.
        """
        if sys.platform == "linux":
            with contextlib.suppress(OSError):  # an older kernel
                self._map.madvise(_POPULATE, start, stop - start)

    def give_back(self, start: int, stop: int) -> None:
        """Give the pages that lie within some bytes back to the system; bytes of these are zeros from then on.

        Where the system cannot do that, the bytes keep their pages.

        Args:
            start: The first byte.
            stop: The byte after the last.
        """
        first, end = whole_pages(start), stop // PAGE * PAGE
        if sys.platform == "linux" and first < end:
            self._map.madvise(mmap.MADV_DONTNEED, first, end - first)


def whole_pages(count: int) -> int:
    """How many bytes the pages have that some bytes take."""
    return -(-count // PAGE) * PAGE


def give_back_freed() -> None:
    """Give back memory that was freed and that the allocator keeps for later, where it is glibc's."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)

"""Memory in huge pages, for which a process has to ask its allocator before it starts."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

VARIABLE, TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
_OLDEST = (2, 35)  # glibc that knows it
_KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use_huge_pages() -> None:
    """Start the program over with memory in huge pages, where the kernel gives them to programs that ask.

    A token reads all weights, and the processor finds them sooner in pages of 2 MiB than in those of 4 KiB. Most Linux
    systems give them on request (`madvise`), and glibc requests them if a variable says so when a program starts: so it
    is set, and the program replaced by itself, with the same process id, which its first line on stderr says. A
    program's first use of memory takes longer then, so this is for one that runs long. Nothing happens on other
    systems, where the variable says something already, in a program that was not started by its arguments, or where the
    interpreter cannot be started anew.
    """
    tunables = os.environ.get(VARIABLE, "")
    own = sys.argv[1:]
    if TUNABLE in tunables or sys.orig_argv[len(sys.orig_argv) - len(own) :] != own or not _on_request():
        return
    os.environ[VARIABLE] = ":".join([*([tunables] if tunables else []), f"{TUNABLE}=1"])
    sys.stderr.write(f"starting over to have memory in huge pages: {VARIABLE}={os.environ[VARIABLE]}\n")
    sys.stderr.flush()
    with contextlib.suppress(OSError):  # a user who may not start the interpreter anew runs it as it is
        os.execv(sys.executable, sys.orig_argv)


def _on_request() -> bool:
    """Return whether the kernel gives huge pages on request, and the allocator can request them."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        is_known = name == "glibc" and tuple(map(int, version.split(".")[:2])) >= _OLDEST
        return is_known and "[madvise]" in _KERNEL.read_text(encoding="ascii")
    except (AttributeError, OSError, ValueError):  # no such system
        return False

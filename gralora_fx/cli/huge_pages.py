"""Memory in huge pages, for which a process has to ask its allocator before it starts."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

VARIABLE, TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
_OLDEST = (2, 35)  # oldest glibc that supports it
_KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use_huge_pages() -> None:
    """Restart the program with memory in huge pages, if the kernel gives them on request.

    Every token reads all weights, and address translation is faster with pages of 2 MiB than of 4 KiB. Most Linux
    systems give them on request (`madvise`), and glibc requests them if a variable is set when a program starts: so it
    is set, and the program replaces itself, keeping its process id and printing one line to stderr. First use of memory
    takes longer then, so this is for long-running programs. Nothing happens on other systems, if the variable is set
    already, if the program was not started by its arguments as `serve`, or if the interpreter cannot be restarted.
    """
    tunables = os.environ.get(VARIABLE, "")
    own = sys.argv[1:]
    is_started = sys.orig_argv[len(sys.orig_argv) - len(own) :] == own and "serve" in own[:1]
    if TUNABLE in tunables or not is_started or not _on_request():
        return
    os.environ[VARIABLE] = ":".join([*([tunables] if tunables else []), f"{TUNABLE}=1"])
    sys.stderr.write(f"restarting with huge pages, for faster memory: {VARIABLE}={os.environ[VARIABLE]}\n")
    sys.stderr.flush()
    with contextlib.suppress(OSError):  # if the interpreter may not be restarted, go on
        os.execv(sys.executable, sys.orig_argv)


def _on_request() -> bool:
    """Return whether the kernel gives huge pages on request, and the allocator can request them."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        is_known = name == "glibc" and tuple(map(int, version.split(".")[:2])) >= _OLDEST
        return is_known and "[madvise]" in _KERNEL.read_text(encoding="ascii")
    except (AttributeError, OSError, ValueError):  # no such system
        return False

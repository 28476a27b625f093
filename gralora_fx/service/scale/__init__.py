"""The service on several processes."""

from __future__ import annotations

import os
import secrets


def prepare() -> None:
    """Set what Ray is to read; call this before it is imported.

    Its processes listen on every address of the machine, so whoever speaks to them has to know a token, which is drawn
    anew. Nothing is reported to Ray's makers.
    """
    # a proxy that imports more slowly than this is killed by Ray's controller, on a busy machine again and again
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}

"""The service on several processes."""

from __future__ import annotations

import os
import secrets


def prepare() -> None:
    """Set Ray's environment variables; call this before importing Ray.

    Ray's processes listen on every address of the machine, so they require a token, drawn at each start. Usage
    reports to Ray's makers are off.
    """
    # Ray's controller kills a proxy that imports more slowly, repeatedly on a busy machine
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}

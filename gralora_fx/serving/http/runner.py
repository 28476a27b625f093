"""The service on uvicorn."""

from __future__ import annotations

import uvicorn
from fastapi import FastAPI


def run(app: FastAPI, *, host: str, port: int) -> None:
    """Serve until the process is told to end; uvicorn then takes no more requests and waits for those that run.

    Args:
        app: The service.
        host: The address to listen on.
        port: The port; 0 for a free one.
    """
    uvicorn.run(app, host=host, port=port, log_level="info")

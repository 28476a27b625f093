"""HTTP clients over plain sockets, whose own cost is negligible."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

HOST = "127.0.0.1"


@dataclass
class Load:
    """The clients' measurements."""

    seconds: float = 0.0  # duration of the load
    statuses: Counter[int] = field(default_factory=Counter)  # answers by status
    latencies: list[float] = field(default_factory=list)  # seconds of each answer with status 200

    @property
    def rate(self) -> float:
        """Answers with status 200 per second."""
        return self.statuses[200] / self.seconds


@contextmanager
def served(directory: Path, *options: str) -> Iterator[tuple[int, psutil.Process]]:
    """Run `gralora-fx serve` over an export within the block; yield its port and process."""
    command = [sys.executable, "-m", "gralora_fx.cli", "serve", str(directory), "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        found = (re.search(r"running on http://127\.0\.0\.1:(\d+)", line) for line in process.stderr)
        port = next((int(match[1]) for match in found if match), None)
        if port is None:
            raise RuntimeError(f"gralora-fx serve ended with status {process.wait()}")
        yield port, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(30)


def ask(port: int, path: str, bodies: Sequence[dict[str, Any]], *, clients: int, seconds: float) -> Load:
    """Let clients post bodies in turns for some seconds, each one after its previous answer."""
    requests = []
    for body in bodies:
        content = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n"
        )
        requests.append(head.encode() + b"\r\n" + content)
    return asyncio.run(_ask(port, requests, clients, seconds))


async def _ask(port: int, requests: Sequence[bytes], clients: int, seconds: float) -> Load:
    load = Load()
    started = time.perf_counter()
    await asyncio.gather(
        *(_client(port, requests[index::clients], load, started + seconds) for index in range(clients))
    )
    load.seconds = time.perf_counter() - started
    return load


async def _client(port: int, requests: Sequence[bytes], load: Load, end: float) -> None:
    reader, writer = await asyncio.open_connection(HOST, port)
    turn = 0
    while (begin := time.perf_counter()) < end:
        writer.write(requests[turn % len(requests)])
        turn += 1
        head = await reader.readuntil(b"\r\n\r\n")
        status, length = int(head[9:12]), re.search(rb"content-length: (\d+)", head)
        await reader.readexactly(int(length[1]) if length else 0)
        load.statuses[status] += 1
        if status == 200:
            load.latencies.append(time.perf_counter() - begin)
        else:
            await asyncio.sleep(0.05)
    writer.close()
    await writer.wait_closed()

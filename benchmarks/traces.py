"""The cost of spans: requests to a traced service, compared with the same requests without tracing.

SmolLM2-135M, int4, two threads. One app answers both sides in turns, with and without the middleware that creates
spans, which are sent in batches to a collector in its own process, by OTLP over HTTP. A traced request has a sampled
parent; on a third side the parent is not sampled.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from benchmarks import smollm2
from benchmarks.harness import Claim, Ratio, Report, Table, progress
from gralora_fx.core.config.service_settings import ServiceSettings
from gralora_fx.service.app import create_app
from gralora_fx.service.spans import SpanMiddleware, tracing_of_environment

RUNS = Path("runs/generation")
THREADS, CLIENTS, NEW, SHORT = 2, 8, 16, 10  # concurrent requests and their tokens, and short sequential requests
PRECISION = "int4"
PLAIN, TRACED, UNSAMPLED = "without spans", "with spans", "not sampled"
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-0"
_COLLECTOR = """
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Receiver(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_): pass
server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
print(server.server_port, flush=True)
server.serve_forever()
"""


def run(iterations: int = 8) -> Report:
    """Measure all sides in turns, `iterations` rounds each."""
    report = Report("traces", f"spans of requests: SmolLM2-135M, {CLIENTS} clients")
    with _collector() as address:
        os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = address
        tracing = tracing_of_environment()
        del os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"]
        assert tracing is not None
        directory = dict(smollm2.exports(RUNS))[PRECISION]
        progress("all sides in turns")
        app = create_app(ServiceSettings(directory, threads=THREADS))
        sides = {PLAIN: app, TRACED: SpanMiddleware(app, tracing.tracer)}
        asyncio.run(_compare(report, app, {**sides, UNSAMPLED: sides[TRACED]}, iterations))
        tracing.close()
    return report


async def _compare(report: Report, app: Any, sides: dict[str, Any], iterations: int) -> None:
    long: dict[str, list[float]] = {side: [] for side in sides}
    short: dict[str, list[float]] = {side: [] for side in sides}
    async with app.router.lifespan_context(app):
        for iteration in range(-1, iterations):
            for side in list(sides)[:: 1 if iteration % 2 else -1]:
                took = await _ask(sides[side], side)
                if iteration >= 0:
                    long[side].append(took[0])
                    short[side].append(took[1])
    rows = [
        {"requests": side, f"{CLIENTS} at once, {NEW} tokens each, s": statistics.median(long[side])}
        | {"one of one token, ms of the event loop": 1e3 * statistics.median(short[side])}
        for side in sides
    ]
    report.tables.append(Table(PRECISION, rows))
    for side in (TRACED, UNSAMPLED):
        ratio = Ratio.between(long[side], long[PLAIN])
        report.claims.append(
            Claim(f"{CLIENTS} requests {side} over those {PLAIN}", ratio.median_of_pairs, at_most=1.02)
        )
        added = statistics.median(a - b for a, b in zip(short[side], short[PLAIN], strict=True))
        report.claims.append(Claim(f"a request {side}, ms of the event loop more", 1e3 * added, at_most=1.0))


async def _ask(app: Any, side: str) -> tuple[float, float]:
    """Return the seconds of all concurrent requests, and the event loop's median CPU time for a short one."""
    headers = {"traceparent": PARENT + ("0" if side == UNSAMPLED else "1")}
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://service", headers=headers) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]

        async def ask(count: int) -> None:
            body = {"model": model, "prompt": "Once upon a time", "max_tokens": count, "ignore_eos": True}
            (await client.post("/v1/completions", json=body, timeout=600)).raise_for_status()

        started = time.perf_counter()
        await asyncio.gather(*(ask(NEW) for _ in range(CLIENTS)))
        middle = time.perf_counter()
        short = []
        for _ in range(SHORT):
            begun = time.thread_time()  # CPU time of the loop's thread
            await ask(1)
            short.append(time.thread_time() - begun)
        return middle - started, statistics.median(short)


@contextmanager
def _collector() -> Iterator[str]:
    """Run a collector that discards spans within the block; yield its address."""
    process = subprocess.Popen([sys.executable, "-c", _COLLECTOR], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
    finally:
        process.kill()
        process.communicate()

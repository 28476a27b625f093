"""What the service tells Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector

from gralora_fx.serving.http.rejections import REASONS

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_METHODS = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE")
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The metrics of one service and its process, in a registry of its own; an observer of its scheduler.

    Attributes:
        registry: The registry.
    """

    def __init__(self) -> None:
        """Register the metrics."""
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "gralora_fx_requests",
            "Requests, by route, method and status.",
            ("route", "method", "code"),
            registry=registry,
        )
        self._in_flight = Gauge("gralora_fx_requests_in_flight", "Requests that are being answered.", registry=registry)
        self._rejections = Counter(
            "gralora_fx_rejections", "Requests that were rejected.", ("reason",), registry=registry
        )
        for reason in REASONS:
            self._rejections.labels(reason)
        self._length = Gauge("gralora_fx_queue_length", "Requests, or rows of them, that wait.", registry=registry)
        self._queue = Histogram(
            "gralora_fx_queue_seconds", "From a request to its first run.", buckets=_SECONDS, registry=registry
        )
        self._first = Histogram(
            "gralora_fx_time_to_first_token_seconds",
            "From a request to the first token of its answer.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._run = Histogram("gralora_fx_run_seconds", "Runs of a batch.", buckets=_SECONDS, registry=registry)
        self._failures = Counter("gralora_fx_run_failures", "Runs that failed.", registry=registry)
        self._rows = Histogram("gralora_fx_batch_size", "Rows of a batch.", buckets=_ROWS, registry=registry)
        self._tokens = Counter("gralora_fx_tokens", "Tokens, by kind.", ("kind",), registry=registry)
        for kind in ("prompt", "generated"):
            self._tokens.labels(kind)
        self._model = Info("gralora_fx_model", "The model that is served.", registry=registry)
        self._loads = Counter(
            "gralora_fx_adapter_loads", "Loads of adapters at run time, by outcome.", ("outcome",), registry=registry
        )
        for outcome in ("ok", "refused"):
            self._loads.labels(outcome)
        self._adapters = Gauge("gralora_fx_adapters_loaded", "Adapters that requests may name.", registry=registry)
        self._versions = Gauge(
            "gralora_fx_adapter_versions", "Versions of adapters in memory, replaced ones included.", registry=registry
        )

    def watch_adapters(self, loaded: Callable[[], int], versions: Callable[[], int]) -> None:
        """Take what counts the adapters that are loaded, and their versions in memory."""
        self._adapters.set_function(loaded)
        self._versions.set_function(versions)

    def adapter_load(self, outcome: Literal["ok", "refused"]) -> None:
        """A load of an adapter ended."""
        self._loads.labels(outcome).inc()

    def describe(self, model: Mapping[str, str], queue_length: Callable[[], int]) -> None:
        """Say what is served.

        Args:
            model: Facts of the model, by their names.
            queue_length: How many requests, or rows of them, wait now.
        """
        self._model.info(dict(model))
        self._length.set_function(queue_length)

    def in_flight(self) -> AbstractContextManager[None]:
        """Counts a request while it is being answered."""
        return self._in_flight.track_inprogress()

    def answered(self, route: str, method: str, code: int) -> None:
        """A request was answered; all methods that HTTP does not have count as one, so that labels are bounded."""
        self._requests.labels(route, method if method in _METHODS else "other", str(code)).inc()

    def rejected(self, reason: str) -> None:
        """A request was rejected.

        Args:
            reason: One of `REASONS`.
        """
        self._rejections.labels(reason).inc()

    def waited(self, seconds: float) -> None:
        """A request, or a row of one, waited before the first of its tokens was read."""
        self._queue.observe(seconds)

    def began(self, seconds: float, waited: float) -> None:
        """The first token of an answer was chosen, so long after its request, which waited so much of that."""
        self._first.observe(seconds)

    def ran(self, seconds: float, rows: int) -> None:
        """A batch ran."""
        self._run.observe(seconds)
        self._rows.observe(rows)

    def failed(self) -> None:
        """A run failed."""
        self._failures.inc()

    def read(self, tokens: int) -> None:
        """Tokens of prompts or texts were read."""
        self._tokens.labels("prompt").inc(tokens)

    def generated(self, tokens: int) -> None:
        """New tokens were chosen."""
        self._tokens.labels("generated").inc(tokens)

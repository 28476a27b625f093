"""What the service tells Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The metrics of one service, in a registry of its own; an observer of its scheduler.

    Attributes:
        registry: The registry.
    """

    def __init__(self) -> None:
        """Register the metrics."""
        registry = self.registry = CollectorRegistry()
        self._requests = Counter(
            "gralora_fx_requests",
            "Requests, by route, method and status.",
            ("route", "method", "code"),
            registry=registry,
        )
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
        self._rows = Histogram("gralora_fx_batch_size", "Rows of a batch.", buckets=_ROWS, registry=registry)
        self._tokens = Counter("gralora_fx_tokens", "Tokens, by kind.", ("kind",), registry=registry)
        for kind in ("prompt", "generated"):
            self._tokens.labels(kind)

    def answered(self, route: str, method: str, code: int) -> None:
        """A request was answered."""
        self._requests.labels(route, method, str(code)).inc()

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

    def read(self, tokens: int) -> None:
        """Tokens of prompts or texts were read."""
        self._tokens.labels("prompt").inc(tokens)

    def generated(self, tokens: int) -> None:
        """New tokens were chosen."""
        self._tokens.labels("generated").inc(tokens)

"""Prometheus metrics; some also under the names that vLLM and the Gateway API's endpoint picker use."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector
from starlette.types import Scope

from gralora_fx.run.engine.cache_memory import CacheMemory, NoRoomError
from gralora_fx.run.engine.limits import TooLargeError
from gralora_fx.run.engine.prefix_cache import PrefixCache
from gralora_fx.service.adapter_store.store import AdapterStore
from gralora_fx.service.scheduling.queue import JobQueue

_KEY, _COUNTED = "gralora_fx.rejection", "gralora_fx.counted"
_BY_STATUS = {
    401: "unauthorized",
    404: "not_found",
    405: "not_found",
    408: "timeout",
    413: "too_large",
    429: "queue_full",
    503: "stopping",
    504: "timeout",
}
REASONS = ("invalid", "no_memory", *sorted(set(_BY_STATUS.values())))
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_METHODS = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE")
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


def mark_counted(scope: Scope) -> None:
    """Mark a request as counted, here or by the process that answered it."""
    scope[_COUNTED] = True


def note_rejection(scope: Any, error: Exception) -> None:
    """Record the reason of a rejection if its status alone does not tell."""
    for kind, reason in ((TooLargeError, "too_large"), (NoRoomError, "no_memory")):
        if isinstance(error, kind):
            scope[_KEY] = reason


class _Now(Collector):
    """Gauges computed when they are scraped; per process, so they are not summed across processes."""

    def __init__(self) -> None:
        """Start with no gauges."""
        self.model: dict[str, str] = {}
        self._watched: dict[str, tuple[str, Callable[[], int]]] = {}

    def watch(self, name: str, text: str, count: Callable[[], int]) -> None:
        """Add a gauge."""
        self._watched[f"gralora_fx_{name}"] = text, count

    def collect(self) -> Iterator[Metric]:
        """Yield the gauges, for Prometheus' client."""
        for name, (text, count) in self._watched.items():
            yield GaugeMetricFamily(name, text, value=count())
        if self.model:
            yield InfoMetricFamily("gralora_fx_model", "The model that is served.", value=self.model)


class Metrics:
    """The metrics of one service process, in its own registry; an observer of its scheduler.

    `registry` has counters and histograms, `now` the gauges of this process.
    """

    def __init__(self) -> None:
        """Register the metrics."""
        registry, self.now = CollectorRegistry(), CollectorRegistry()
        self.registry = registry
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "gralora_fx_requests",
            "Requests, by route, method and status.",
            ("route", "method", "code"),
            registry=registry,
        )
        self._now = _Now()
        self.now.register(self._now)
        self._in_flight = 0
        self._now.watch("requests_in_flight", "Requests that are being answered.", lambda: self._in_flight)
        self._rejections = Counter(
            "gralora_fx_rejections", "Requests that were rejected.", ("method", "reason"), registry=registry
        )
        for reason in REASONS:
            self._rejections.labels("POST", reason)
        self._queue = Histogram(
            "gralora_fx_queue_seconds", "From a request to its first run.", buckets=_SECONDS, registry=registry
        )
        self._run = Histogram("gralora_fx_run_seconds", "Runs of a batch.", buckets=_SECONDS, registry=registry)
        self._failures = Counter("gralora_fx_run_failures", "Runs that failed.", registry=registry)
        self._rows = Histogram("gralora_fx_batch_size", "Rows of a batch.", buckets=_ROWS, registry=registry)
        self._tokens: Counter | None = None
        self._first: Histogram | None = None
        self._prefixes: tuple[Counter, ...] = ()
        self._proposed: tuple[Counter, ...] = ()
        self._loads = Counter(
            "gralora_fx_adapter_loads", "Loads of adapters at run time, by outcome.", ("outcome",), registry=registry
        )
        for outcome in ("ok", "refused"):
            self._loads.labels(outcome)
        self._load_seconds = Histogram(
            "gralora_fx_adapter_load_seconds",
            "Loads of adapters that requests name.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._evictions = Counter(
            "gralora_fx_adapter_evictions", "Adapters that were freed for the room of others.", registry=registry
        )

    def watch_adapters(self, models: AdapterStore) -> None:
        """Add metrics of the adapters in memory, their loads and evictions."""
        models.when_evicted, models.pending.when_loaded = self._evictions.inc, self._adapter_loaded
        versions = "Versions of adapters in memory, replaced ones included."
        self._now.watch("adapters_loaded", "Adapters in memory.", lambda: len(models.adapters))
        self._now.watch("adapter_versions", versions, lambda: len(models))
        self._now.watch("adapter_bytes", "Bytes of these versions.", lambda: models.memory)

    def _adapter_loaded(self, is_loaded: bool, seconds: float) -> None:
        self.adapter_load("ok" if is_loaded else "refused")
        self._load_seconds.observe(seconds)

    def adapter_load(self, outcome: Literal["ok", "refused"]) -> None:
        """Count a finished adapter load."""
        self._loads.labels(outcome).inc()

    def describe(self, model: Mapping[str, str], queue_length: Callable[[], int]) -> None:
        """Set the facts of the served model."""
        self._now.model = dict(model)
        self._now.watch("queue_length", "Requests, or rows of them, that wait.", queue_length)

    def measure_tokens(self, *, generated: bool) -> None:
        """Add token metrics, for a model that reads tokens."""
        self._tokens = Counter("gralora_fx_tokens", "Tokens, by kind.", ("kind",), registry=self.registry)
        for kind in ("prompt", "generated") if generated else ("prompt",):
            self._tokens.labels(kind)
        if generated:
            self._first = Histogram(
                "gralora_fx_time_to_first_token_seconds",
                "From a request to the first token of its answer.",
                buckets=_SECONDS,
                registry=self.registry,
            )

    def measure_memory(self, memory: CacheMemory) -> None:
        """Add the memory of a decoder's caches."""
        text = "Memory of all caches: of rows, of their adapters, of what prompts share."
        self._now.watch("cache_bytes", text, lambda: memory.taken)
        if memory.limit is not None:
            self._now.watch("cache_limit_bytes", "The most memory of all caches.", lambda: memory.limit or 0)

    def measure_prefixes(self, cache: PrefixCache) -> None:
        """Add prefix cache metrics; queries and hits also under vLLM's names."""
        text = "Tokens of prompts that the prefix cache was asked for"
        for prefix in ("gralora_fx_", "vllm:"):
            queries = Counter(f"{prefix}prefix_cache_queries", f"{text}.", registry=self.registry)
            hits = Counter(f"{prefix}prefix_cache_hits", f"{text}, and had.", registry=self.registry)
            self._prefixes += queries, hits
        self._now.watch("prefix_cache_bytes", "Memory of the prefix cache.", lambda: cache.size)
        self._now.watch("prefix_cache_limit_bytes", "The most memory of the prefix cache.", lambda: cache.limit)
        self._now.watch("prefix_cache_blocks", "Blocks of tokens in the prefix cache.", lambda: len(cache))
        if cache.keeps_states:
            self._now.watch("prefix_cache_snapshots", "Snapshots of states among them.", lambda: cache.snapshots)
        made_room = "Blocks, or snapshots, that made room for others."
        self._now.watch("prefix_cache_evictions", made_room, lambda: cache.evictions)

    def measure_proposed(self) -> None:
        """Add metrics of proposed and accepted tokens, also under vLLM's names."""
        proposed, accepted = "Tokens that were proposed, and verified.", "Proposed tokens that were chosen."
        for prefix in ("gralora_fx_", "vllm:spec_decode_num_"):
            self._proposed += (
                Counter(f"{prefix}draft_tokens", proposed, registry=self.registry),
                Counter(f"{prefix}accepted_tokens", accepted, registry=self.registry),
            )

    @property
    def answering(self) -> int:
        """Number of requests in flight."""
        return self._in_flight

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry) + generate_latest(self.now)

    @contextmanager
    def in_flight(self) -> Iterator[None]:
        """Count a request as in flight while the block runs; call from the event loop's thread."""
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1

    def answered(self, scope: Scope, code: int) -> None:
        """Count an answered request; unknown HTTP methods share one label, to bound the labels."""
        if _COUNTED in scope:
            return
        mark_counted(scope)
        route = getattr(scope.get("route"), "path", "other")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._requests.labels(route, method, str(code)).inc()
        reason = scope.get(_KEY) or _BY_STATUS.get(code)
        if reason is None and 400 <= code < 499:  # 499: its client went away
            reason = "invalid"
        if reason is not None:
            self._rejections.labels(method, reason).inc()

    def waited(self, seconds: float) -> None:
        """Record how long a request, or a row of one, waited until its first token was read."""
        self._queue.observe(seconds)

    def began(self, seconds: float) -> None:
        """Record the time to first token."""
        if self._first is not None:
            self._first.observe(seconds)

    def ran(self, seconds: float, rows: int) -> None:
        """Record a batch."""
        self._run.observe(seconds)
        self._rows.observe(rows)

    def failed(self) -> None:
        """Count a failed run."""
        self._failures.inc()

    def read(self, tokens: int) -> None:
        """Count tokens read from prompts or texts."""
        self._count("prompt", tokens)

    def looked_up(self, tokens: int, found: int) -> None:
        """Count a prompt's tokens, and those of them found in the prefix cache."""
        for counter, count in zip(self._prefixes, (tokens, found) * 2, strict=False):
            counter.inc(count)

    def proposed(self, tokens: int, accepted: int) -> None:
        """Count the proposed tokens that a step verified, and those of them accepted."""
        for counter, count in zip(self._proposed, (tokens, accepted) * 2, strict=False):
            counter.inc(count)

    def generated(self, tokens: int) -> None:
        """Count generated tokens."""
        self._count("generated", tokens)

    def _count(self, kind: str, tokens: int) -> None:
        if self._tokens is not None:
            self._tokens.labels(kind).inc(tokens)


class GatewayMetrics(Collector):
    """Running and waiting requests, cache usage, and the adapters in memory.

    A Gateway API Inference Extension endpoint picker reads these, under vLLM's names, to choose a model server:
    https://github.com/kubernetes-sigs/gateway-api-inference-extension, docs/proposals/003-model-server-protocol.
    """

    def __init__(self, models: AdapterStore, queue: JobQueue[Any]) -> None:
        """Set the models and the queue to measure."""
        self._models, self._queue = models, queue

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics, for Prometheus' client."""
        models, queue = self._models, self._queue
        yield self._gauge("num_requests_running", "Requests, or rows of them, that run.", queue.running)
        yield self._gauge(
            "num_requests_waiting", "Requests, or rows of them, that wait.", queue.waiting + models.pending.requests
        )
        yield self._gauge("kv_cache_usage_perc", "Share of the rows' caches that is filled.", queue.cache_usage)
        adapters = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "When the adapters in memory, and those that requests wait for, were read.",
            labels=("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        )
        most = str(models.limits.count or len(models.adapters))
        adapters.add_metric((most, ",".join(models.adapters), ",".join(models.pending.names)), time.time())
        yield adapters

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=("model_name",))
        gauge.add_metric((self._models.base,), value)
        return gauge

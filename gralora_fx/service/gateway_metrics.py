"""What the Gateway API Inference Extension reads of a model server, under vLLM's names, to choose one for a request.

See https://github.com/kubernetes-sigs/gateway-api-inference-extension, docs/proposals/003-model-server-protocol.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from gralora_fx.service.adapter_store.store import AdapterStore
from gralora_fx.service.scheduling.queue import JobQueue


class GatewayMetrics(Collector):
    """Requests that run and wait, how full the caches of rows are, and which adapters are in memory."""

    def __init__(self, models: AdapterStore, queue: JobQueue[Any]) -> None:
        """Take what is measured."""
        self._models, self._queue = models, queue

    def collect(self) -> Iterator[Metric]:
        """The metrics, as Prometheus' client asks for them."""
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

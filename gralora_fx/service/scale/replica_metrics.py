"""What replicas measure when they are asked: of all of them together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample
from ray.serve.exceptions import RayServeException

from gralora_fx.service.metrics import Metrics

_SHARES, _WAITING = ("vllm:kv_cache_usage_perc",), "vllm:num_requests_waiting"
_RUNNING, _NAMES = "vllm:num_requests_running", ("running_lora_adapters", "waiting_lora_adapters")


class ReplicaMetrics:
    """Asks all replicas, and adds up what they say; shares of something are averaged, and names joined."""

    def __init__(self, replicas: Any, metrics: Metrics) -> None:
        """Take the replicas."""
        self._replicas, self._metrics = replicas, metrics

    async def text(self) -> bytes:
        """The metrics, as Prometheus reads them; without those of replicas that have just ended."""
        try:
            answers = await self._replicas.broadcast("measured").results_async(return_exceptions=True)
        except RayServeException:  # no replica runs
            answers = []
        families: dict[str, list[Metric]] = {}
        for metric in (metric for answer in answers if not isinstance(answer, Exception) for metric in answer):
            families.setdefault(metric.name, []).append(metric)
        registry = CollectorRegistry()
        registry.register(_Given([_together(each) for each in families.values()], self._metrics.answering))
        return generate_latest(registry)


class _Given(Collector):
    """Metrics that are there; of requests that wait, those in the frontend too."""

    def __init__(self, metrics: Sequence[Metric], answering: int) -> None:
        self._metrics, self._answering = metrics, answering

    def collect(self) -> Iterable[Metric]:
        running = sum(metric.samples[0].value for metric in self._metrics if metric.name == _RUNNING)
        for metric in self._metrics:
            if metric.name == _WAITING:
                (only,) = metric.samples
                metric.samples = [only._replace(value=max(self._answering - running, 0))]
            yield metric


def _together(metrics: Sequence[Metric]) -> Metric:
    """One metric of those of all replicas, each of which has one sample or none."""
    whole, samples = metrics[0], [sample for metric in metrics for sample in metric.samples]
    if whole.type == "info" or not samples:
        return whole
    value = sum(sample.value for sample in samples)
    if whole.name in _SHARES:
        value /= len(samples)
    elif any(name in samples[0].labels for name in _NAMES):
        value = max(sample.value for sample in samples)
    whole.samples = [Sample(samples[0].name, _labels([sample.labels for sample in samples]), value)]
    return whole


def _labels(several: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The labels of all: of those that list names, each name once."""
    joined = dict(several[0])
    for label in _NAMES:
        if label in joined:
            names = {name for labels in several for name in labels[label].split(",") if name}
            joined[label] = ",".join(sorted(names))
    return joined

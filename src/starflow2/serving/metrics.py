"""Metrics in Prometheus' form: what a service did and is doing, and requests by route, status and time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from starflow2.serving.service import Service

__all__ = ["Metrics"]

BUCKETS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)


class Metrics(Collector):
    """Everything that is counted about one service."""

    def __init__(self, service: Service) -> None:
        self._service, self._registry = service, CollectorRegistry()
        labels = ("route", "status")
        self._requests = Counter("starflow2_requests", "Requests over HTTP.", labels, registry=self._registry)
        self._seconds = Histogram(
            "starflow2_request_seconds", "Their duration.", ("route",), buckets=BUCKETS, registry=self._registry
        )
        self._registry.register(self)

    def record(self, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        stats = self._service.stats()
        for each in fields(stats.counts):
            value = getattr(stats.counts, each.name)
            yield CounterMetricFamily(f"starflow2_service_{each.name}", "See serving/stats.py.", value=value)
        gauges = {
            "waiting": stats.waiting,
            "replying": stats.replying,
            "engine_bytes": stats.engine_bytes,
            "engine_positions": stats.engine_positions,
            "sessions_in_memory": stats.in_memory[0],
            "sessions_in_memory_bytes": stats.in_memory[1],
            "sessions_on_disk": stats.on_disk[0],
            "sessions_on_disk_bytes": stats.on_disk[1],
        }
        for name, number in gauges.items():
            yield GaugeMetricFamily(f"starflow2_{name}", name.replace("_", " "), value=number)

"""Prometheus metrics of a server: the queue, latency by stage, tokens, cache and memory."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

from ssd_export.serve.batcher import BatchObserver, Seconds

LATENCY_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics(BatchObserver):
    """One registry a server: two of them in a process do not share numbers.

    Resident memory is process_resident_memory_bytes.
    """

    def __init__(self) -> None:
        """Registers everything at its zero."""
        self.tokens_an_image = 0  # of the bundle that is open
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._waiting = Gauge("ssd_queue_images", "Images that wait", registry=registry)
        self._latency = Histogram(
            "ssd_stage_seconds",
            "Seconds by stage: queue (an image), batch (tokens and pixels of a batch), request",
            ["stage"],
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )
        self._batch = Histogram(
            "ssd_batch_images", "Images of a batch", buckets=BATCH_BUCKETS, registry=registry
        )
        self._images = Counter("ssd_images", "Images by how they ended", ["end"], registry=registry)
        self._tokens = Counter("ssd_image_tokens", "Image tokens generated", registry=registry)
        self._speed = Gauge(
            "ssd_image_tokens_per_second", "Of the latest batch, pixels included", registry=registry
        )
        self._cache = Gauge("ssd_cache_bytes", "KV cache of the latest batch", registry=registry)
        self._requests = Counter(
            "ssd_requests", "Requests for images by HTTP status", ["status"], registry=registry
        )

    def waiting(self, images: int) -> None:
        """Sets the queue's length."""
        self._waiting.set(images)

    def waited(self, seconds: Seconds) -> None:
        """Observes an image's time in the queue."""
        self._latency.labels("queue").observe(seconds)

    def generated(self, images: int, seconds: Seconds) -> None:
        """Counts a batch and its tokens."""
        tokens = images * self.tokens_an_image
        self._batch.observe(images)
        self._latency.labels("batch").observe(seconds)
        self._images.labels("finished").inc(images)
        self._tokens.inc(tokens)
        self._speed.set(tokens / seconds if seconds else 0)

    def dropped(self, images: int, why: str) -> None:
        """Counts images that were not finished."""
        self._images.labels(why).inc(images)

    def cache_bytes(self, num_bytes: int) -> None:
        """Sets the allocated cache bytes."""
        self._cache.set(num_bytes)

    def request(self, status: int, seconds: Seconds) -> None:
        """Counts a request for images and observes its time."""
        self._requests.labels(str(status)).inc()
        self._latency.labels("request").observe(seconds)

    def exposition(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)

"""What `/metrics` shows, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from otil_xdit.serve.engine import Engine
from otil_xdit.serve.jobs import Jobs
from otil_xdit.serve.requests import DrawnImage

_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
"""Upper bounds of the histograms' bins."""


class Metrics:
    """The counters of one server, in a registry of its own.

    Args:
        engine: whose state is shown.
    """

    def __init__(self, engine: Engine) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter(
            "xfuser_serve_requests", "Answers, by route and status", ("route", "status"), registry=registry
        )
        self._images = Counter("xfuser_serve_images", "Images made", registry=registry)
        self._seconds = Histogram(
            "xfuser_serve_image_seconds", "Seconds of an image", buckets=_SECONDS, registry=registry
        )
        self._sent = Counter("xfuser_serve_sent_bytes", "Bytes that one rank sent for images", registry=registry)
        self._waited = Counter(
            "xfuser_serve_waited_seconds", "Seconds that one rank waited for others", registry=registry
        )
        waiting = Gauge("xfuser_serve_queue_length", "Requests that wait", registry=registry)
        running = Gauge("xfuser_serve_running", "Requests whose images are being made", registry=registry)
        ready = Gauge("xfuser_serve_ready", "1 when images can be made", registry=registry)
        restarts = Gauge("xfuser_serve_rank_restarts", "How often the ranks were started again", registry=registry)
        ready.set_function(lambda: float(engine.status.state == "ready"))
        restarts.set_function(lambda: float(engine.status.restarts))
        self._waiting, self._running = waiting, running

    def follow(self, jobs: Jobs) -> None:
        """Show the length of that queue."""
        self._waiting.set_function(lambda: float(len(jobs)))
        self._running.set_function(lambda: float(jobs.current is not None))

    def count(self, image: DrawnImage) -> None:
        """Count an image that is done."""
        self._images.inc()
        self._seconds.observe(image.seconds)
        self._sent.inc(image.sent_bytes)
        self._waited.inc(image.waited_seconds)

    def text(self) -> bytes:
        """Return all of it, in Prometheus' text format."""
        return generate_latest(self._registry)

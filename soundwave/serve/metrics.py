"""Counts and times for Prometheus, in a registry of their own."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

PATHS = ("/v1/audio/transcriptions", "/v1/chat/completions", "/v1/models", "/health", "/metrics", "/")


class Metrics:
    """What a server counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        own = {"registry": self.registry, "namespace": "soundwave"}
        self.requests = Counter(
            "requests", "Requests by path and status; 499 is a client that left.", ["path", "status"], **own
        )
        self.seconds = Histogram(
            "request_seconds", "Time from the first byte of a request to the last one of its answer.", ["path"],
            buckets=(0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512), **own,
        )  # fmt: skip
        self.windows = Histogram(
            "batch_windows", "Windows or chats that the model answered together.", ["kind"],
            buckets=(1, 2, 4, 8, 12, 16, 24, 32, 48, 64), **own,
        )  # fmt: skip
        self.audio = Counter("audio_seconds", "Speech that the model has read.", ["kind"], **own)
        self.busy = Counter("model_seconds", "Time in which the model was at work.", ["kind"], **own)
        self.open = Gauge("open_requests", "Requests that have no answer yet.", **own)
        self.waiting = Gauge("waiting_windows", "Windows that wait for the model.", **own)

    def on_request(self, path: str, status: int, seconds: float) -> None:
        """A request has ended. Unknown paths are one, because each value makes a series of its own."""
        path = path if path in PATHS else "/v1/models" if path.startswith("/v1/models/") else "other"
        self.requests.labels(path, str(status)).inc()
        self.seconds.labels(path).observe(seconds)

    def on_batch(self, kind: str, windows: int, audio: float, seconds: float) -> None:
        """The model has answered a batch."""
        self.windows.labels(kind).observe(windows)
        self.audio.labels(kind).inc(audio)
        self.busy.labels(kind).inc(seconds)

    def set_load(self, requests: int, windows: int) -> None:
        """What is waiting now."""
        self.open.set(requests)
        self.waiting.set(windows)

"""What has happened, in Prometheus' text format."""

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

disable_created_metrics()  # when each count began: a line for every line

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counts; of any thread."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self._requests = Counter(
            "t5_requests", "Requests by path and status.", ["path", "status"],
            registry=registry,
        )  # fmt: skip
        self._tokens = Counter(
            "t5_tokens", "Tokens read in prompts, and written.", ["kind"],
            registry=registry,
        )  # fmt: skip
        self._rounds = Counter(
            "t5_rounds", "Passes of the target's decoder, of a whole batch each.",
            registry=registry,
        )  # fmt: skip
        self._judged = Counter(
            "t5_draft_tokens", "Draft tokens that stood, and that fell.", ["fate"],
            registry=registry,
        )  # fmt: skip
        self._waiting = Gauge(
            "t5_texts_waiting", "Texts that have no row yet.", registry=registry
        )
        self._running = Gauge(
            "t5_texts_running", "Texts of the last round.", registry=registry
        )
        self._batch = Histogram(
            "t5_round_texts", "Texts of each round.", buckets=_ROWS, registry=registry
        )
        self._first = Histogram(
            "t5_first_text_seconds", "From a request to its first text.",
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._whole = Histogram(
            "t5_request_seconds", "From a request to its end.",
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        for kind in ("prompt", "completion"):
            self._tokens.labels(kind)
        for fate in ("accepted", "rejected"):
            self._judged.labels(fate)

    def request(self, path: str, status: int, seconds: float) -> None:
        """A request was answered."""
        self._requests.labels(path, status).inc()
        if path.startswith("/v1/c") and status == 200:
            self._whole.observe(seconds)

    def first_text(self, seconds: float) -> None:
        """It has got some text."""
        self._first.observe(seconds)

    def prompt(self, tokens: int) -> None:
        """A prompt of so many tokens was taken."""
        self._tokens.labels("prompt").inc(tokens)

    def round(self, texts: int) -> None:
        """One round, of so many texts; none where a prompt is being encoded."""
        if texts:
            self._rounds.inc()
            self._batch.observe(texts)
            self._running.set(texts)

    def written(self, tokens: int) -> None:
        """A text has got so many tokens."""
        self._tokens.labels("completion").inc(tokens)

    def finished(self, accepted: int, rejected: int) -> None:
        """What became of a text's draft tokens."""
        self._judged.labels("accepted").inc(accepted)
        self._judged.labels("rejected").inc(rejected)

    def waiting(self, texts: int) -> None:
        """So many texts wait."""
        self._waiting.set(texts)

    def idle(self) -> None:
        """There is no round."""
        self._running.set(0)

    def text(self) -> bytes:
        """All of it."""
        return generate_latest(self._registry)

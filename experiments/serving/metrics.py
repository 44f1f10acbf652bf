"""What a server counts, for Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    """Counters, gauges and histograms of one server; times in seconds."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "dsv3_jax_requests",
            "Requests by how they ended: completed, invalid, full, unavailable, timeout, disconnected or failed.",
            ["endpoint", "outcome"],
            registry=self.registry,
        )
        self.prompt_tokens = Counter("dsv3_jax_prompt_tokens", "Tokens of prompts that were read to their end.", registry=self.registry)
        self.generated_tokens = Counter("dsv3_jax_generated_tokens", "Tokens generated.", registry=self.registry)
        self.drafted_tokens = Counter("dsv3_jax_drafted_tokens", "Tokens that MTP modules drafted.", registry=self.registry)
        self.accepted_tokens = Counter("dsv3_jax_accepted_tokens", "Drafts that the model accepted.", registry=self.registry)
        self.first_token = Histogram(
            "dsv3_jax_time_to_first_token_seconds", "From a request's acceptance, waiting included.", registry=self.registry, buckets=_FIRST
        )
        self.between_tokens = Histogram(
            "dsv3_jax_inter_token_seconds",
            "Between two tokens of a request; those of a round share its time equally.",
            registry=self.registry,
            buckets=_BETWEEN,
        )

    def watch(self, waiting: Callable[[], float], running: Callable[[], float]) -> None:
        """Adds the gauges whose values these functions give."""
        for name, text, value in (
            ("dsv3_jax_waiting_requests", "Accepted requests that have no row yet.", waiting),
            ("dsv3_jax_running_rows", "Rows of the batch that hold a sequence.", running),
        ):
            Gauge(name, text, registry=self.registry).set_function(value)

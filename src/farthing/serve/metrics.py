"""Prometheus metrics under vLLM's names, so that its dashboards work; what it lacks (dollars, joules) under ours."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from farthing.serve.answers import Run
from farthing.serve.served import Served, Spoken

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = [
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
]
_TOKENS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000]


class Metrics:
    """What the models of a server have done."""

    def __init__(self, models: Sequence[Spoken]) -> None:
        self.registry = CollectorRegistry()

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"vllm:{name}", text, ["model_name"], registry=self.registry, buckets=buckets)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, ["model_name", *labels], registry=self.registry)

        self._first = histogram("time_to_first_token_seconds", "Seconds to the first token.", _SECONDS)
        self._between = histogram(
            "inter_token_latency_seconds", "Mean seconds between a request's tokens.", _SECONDS
        )
        self._whole = histogram("e2e_request_latency_seconds", "Seconds of a request.", _SECONDS)
        self._prompt = histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self._answer = histogram("request_generation_tokens", "Tokens of an answer.", _TOKENS)
        self._prompts = counter("vllm:prompt_tokens", "Prompt tokens read.")
        self._tokens = counter("vllm:generation_tokens", "Tokens generated.")
        self._ended = counter("vllm:request_success", "Answers that ended, by reason.", "finished_reason")
        self._usd = counter("farthing:cost_usd", "Dollars of the machine's time in answers.")
        self._joules = counter("farthing:energy_joules", "Joules in answers.")
        self.registry.register(_Engines([served for served in models if isinstance(served, Served)]))

    def ended(self, run: Run) -> None:
        """Count a request that has ended."""
        name, usage = run.served.name, run.usage
        if run.first is not None and run.last is not None:
            self._first.labels(name).observe(run.first - run.asked)
            self._whole.labels(name).observe(run.last - run.asked)
            each = usage.completion_tokens / run.request.samples
            if each > 1:
                self._between.labels(name).observe((run.last - run.first) / (each - 1))
        self._prompt.labels(name).observe(usage.prompt_tokens)
        self._answer.labels(name).observe(usage.completion_tokens)
        self._prompts.labels(name).inc(usage.prompt_tokens)
        self._tokens.labels(name).inc(usage.completion_tokens)
        for reason in run.reasons:
            self._ended.labels(name, reason).inc()
        for _ in range(run.request.samples - len(run.reasons)):
            self._ended.labels(name, "abort").inc()
        self._usd.labels(name).inc(usage.usd)
        self._joules.labels(name).inc(usage.joules)

    def text(self) -> bytes:
        """All of it, in Prometheus's form."""
        return generate_latest(self.registry)


class _Engines(Collector):
    """What the engines say when asked."""

    def __init__(self, models: Sequence[Served]) -> None:
        self._models = models

    def collect(self) -> Iterable[Metric]:
        gauges: dict[str, tuple[str, Any]] = {
            "num_requests_running": ("Samples in the batch.", lambda e: len(e.scheduler.running)),
            "num_requests_waiting": ("Requests that wait.", lambda e: len(e.scheduler.waiting)),
            "kv_cache_usage_perc": (
                "Share of the cache in use.",
                lambda e: e.cache.used / len(e.cache.users),
            ),
        }
        counters: dict[str, tuple[str, Any]] = {
            "num_preemptions": ("Samples put back to make room.", lambda e: e.scheduler.preemptions),
            "prefix_cache_queries": (
                "Prompt tokens looked up in the cache.",
                lambda e: e.scheduler.looked_up,
            ),
            "prefix_cache_hits": ("Prompt tokens found in the cache.", lambda e: e.scheduler.found),
            "spec_decode_num_draft_tokens": ("Guessed tokens.", lambda e: e.guessed),
            "spec_decode_num_accepted_tokens": ("Guessed tokens that were right.", lambda e: e.accepted),
        }
        return itertools.chain(
            self._family(GaugeMetricFamily, gauges), self._family(CounterMetricFamily, counters)
        )

    def _family(self, kind: type[Any], all_of: dict[str, tuple[str, Any]]) -> Iterator[Metric]:
        for name, (text, value) in all_of.items():
            family = kind(f"vllm:{name}", text, labels=["model_name"])
            for served in self._models:
                family.add_metric([served.name], float(value(served.engine)))
            yield family

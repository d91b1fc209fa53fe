"""Counters of a reward server in the text format of Prometheus."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping

_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class Metrics:
    """Requests, samples, unscored samples, latency and model time since the start."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._status: Counter[int] = Counter()
        self._buckets: Counter[float] = Counter()
        self._latency = 0.0
        self._samples = self._unscored = self._calls = self._failed = 0
        self._busy = 0.0

    def request(self, status: int, seconds: float) -> None:
        """One answered request: HTTP status and time from its arrival to its answer."""
        with self._lock:
            self._status[status] += 1
            self._latency += seconds
            self._buckets[next((b for b in _BUCKETS if seconds <= b), float("inf"))] += 1

    def call(self, samples: int, unscored: int, seconds: float) -> None:
        """One call of the model that returned."""
        with self._lock:
            self._calls += 1
            self._samples += samples
            self._unscored += unscored
            self._busy += seconds

    def failure(self) -> None:
        """One call of the model that raised."""
        with self._lock:
            self._failed += 1

    def render(self, waiting: int, labels: Mapping[str, str]) -> str:
        """All numbers; ``waiting`` is the length of the queue, ``labels`` describe the reward."""
        with self._lock:
            return "".join(f"{line}\n" for line in self._lines(waiting, labels))

    def _lines(self, waiting: int, labels: Mapping[str, str]) -> Iterator[str]:
        text = ",".join(f'{k}="{_escaped(v)}"' for k, v in labels.items())
        yield from _family("info", "gauge", "what is served")
        yield f"mmalign_reward_info{{{text}}} 1"
        yield from _family("requests_total", "counter", "answered requests by HTTP status")
        for status, count in sorted(self._status.items()):
            yield f'mmalign_reward_requests_total{{status="{status}"}} {count}'
        for name, kind, value, text in (
            ("samples_total", "counter", self._samples, "samples the reward has seen"),
            ("unscored_total", "counter", self._unscored, "samples that could not be scored"),
            ("calls_total", "counter", self._calls, "calls of the reward that returned"),
            ("failures_total", "counter", self._failed, "calls of the reward that raised"),
            ("busy_seconds_total", "counter", self._busy, "time spent in the reward"),
            ("waiting_requests", "gauge", waiting, "requests waiting for the reward"),
        ):
            yield from _family(name, kind, text)
            yield f"mmalign_reward_{name} {value}"
        yield from self._histogram()

    def _histogram(self) -> Iterator[str]:
        name, total = "mmalign_reward_request_seconds", 0
        yield from _family("request_seconds", "histogram", "time from arrival to answer")
        for bound in _BUCKETS:
            total += self._buckets[bound]
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        total += self._buckets[float("inf")]
        yield f'{name}_bucket{{le="+Inf"}} {total}'
        yield f"{name}_sum {self._latency}"
        yield f"{name}_count {total}"


def _family(name: str, kind: str, text: str) -> Iterator[str]:
    yield f"# HELP mmalign_reward_{name} {text}"
    yield f"# TYPE mmalign_reward_{name} {kind}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

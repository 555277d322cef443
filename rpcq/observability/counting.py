"""The numbers behind the metrics, with a bound for how many series there are, whatever peers send."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import Final

from prometheus_client.core import HistogramMetricFamily

from rpcq.errors import DOMAIN_CODE, STATUS_CODES
from rpcq.observer import OK, Observed, ObservedBatch

BUCKETS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper bounds of the buckets, seconds. A call on an idle broker takes about a millisecond."""

JOB_BUCKETS: Final = (
    *(0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0),
    *(60.0, 300.0, 900.0, 1800.0),
    *(3600.0, 4 * 3600.0, 12 * 3600.0, 24 * 3600.0),
)
"""The same for jobs, which may wait for hours."""

SIZE_BUCKETS: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0)
"""Upper bounds of the buckets for sizes of batches, calls."""

MAX_METHODS: Final = 1000
"""Methods that have series of their own at one side; calls of further methods are counted together, as `OTHER`."""

OTHER: Final = "other"

MAX_CODES: Final = 50
"""Codes of services' own errors that have series of their own for each method at one side."""

OTHER_CODE: Final = "OTHER"
"""Counts all further codes and reasons. In capitals, because a service's own error may have the code "other"."""

STATUSES: Final = frozenset({OK, *STATUS_CODES})
"""Codes that always have series of their own."""


class Histogram:
    """How many values were at most each bound, and their sum."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...] = BUCKETS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def sample(self, into: HistogramMetricFamily, labels: Sequence[str]) -> None:
        """Add a sample to the family, if anything was counted."""
        if not any(self.counts):
            return
        bounds = [*(str(bound) for bound in self.bounds), "+Inf"]
        into.add_metric(labels, list(zip(bounds, accumulate(self.counts), strict=True)), self.sum)


class MethodCounts:
    """The numbers of one method at one side; `labels` are its service and its name."""

    __slots__ = ("codes", "labels", "queue", "seconds", "started")

    def __init__(self, service: str, method: str) -> None:
        self.labels = service, method
        self.started = 0
        self.codes: dict[str, int] = {}
        self.seconds = Histogram()
        self.queue = Histogram()


class JobCounts:
    """The numbers of one job at one side; `labels` are its service and its name."""

    __slots__ = ("ended", "labels", "queue", "running", "seconds", "started")

    def __init__(self, service: str, method: str, bounds: tuple[float, ...]) -> None:
        self.labels = service, method
        self.started = 0
        self.running = 0
        self.ended: Counter[tuple[str, ...]] = Counter()
        """Ends by `queued` at a client, by outcome and reason at a worker."""
        self.seconds = Histogram(bounds)
        self.queue = Histogram(bounds)


class BatchCounts:
    """The batches of one method; `labels` are its service and its name."""

    __slots__ = ("labels", "seconds", "sizes")

    def __init__(self, service: str, method: str) -> None:
        self.labels = service, method
        self.sizes = Histogram(SIZE_BUCKETS)
        self.seconds = Histogram()


def new_code(codes: dict[str, int], code: str) -> str:
    """Return the code to count for a code that is new to a method: a worker may send any text."""
    is_own = DOMAIN_CODE.match(code) is not None and len(codes.keys() - STATUSES) < MAX_CODES
    code = code if code in STATUSES or is_own else OTHER_CODE
    codes.setdefault(code, 0)
    return code


def job_counts(jobs: dict[str, JobCounts], observed: Observed, bounds: tuple[float, ...]) -> JobCounts:
    """The numbers of a job; those of all further ones once there are `MAX_METHODS`."""
    found = jobs.get(observed.label)
    if found is None and len(jobs) < MAX_METHODS:
        found = jobs[observed.label] = JobCounts(observed.service, observed.method, bounds)
    return found or jobs.setdefault(OTHER, JobCounts(OTHER, "", bounds))


def method_counts(methods: dict[str, MethodCounts], observed: Observed) -> MethodCounts:
    """The numbers of a method; those of all further ones once there are `MAX_METHODS`."""
    if len(methods) < MAX_METHODS:
        return methods.setdefault(observed.label, MethodCounts(observed.service, observed.method))
    return methods.setdefault(OTHER, MethodCounts(OTHER, ""))


def batch_counts(batches: dict[str, BatchCounts], observed: ObservedBatch) -> BatchCounts:
    """The numbers of a method's batches; those of all further ones once there are `MAX_METHODS`."""
    found = batches.get(observed.label)
    if found is not None:
        return found
    if len(batches) < MAX_METHODS:
        return batches.setdefault(observed.label, BatchCounts(observed.service, observed.method))
    return batches.setdefault(OTHER, BatchCounts(OTHER, ""))

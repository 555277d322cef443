"""The results of a load test, and their JSON. Pure.

Times of calls are milliseconds, times of a run are seconds since it began, rates are calls a second. In a run whose
`kind` is "jobs", "call" stands for a job, "request" too, and a job "ended with a result" when it was done.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final, Literal

import pydantic
from hdrh.histogram import HdrHistogram

from rpcq.errors import ConfigurationError

FORMAT: Final = "rpcq-bench/1"
"""Version of the schema. New fields keep it; a field whose meaning changes needs a new one."""

PERCENTILES: Final = (50.0, 75.0, 90.0, 95.0, 99.0, 99.9, 99.99)

NOT_DONE: Final = "not done"
"""Instead of the class of an error: a job that was not known to be done within its timeout, or when the test ended."""

HIGHEST: Final = 3_600_000_000
"""Microseconds: an hour. Longer calls count as this."""

DIGITS: Final = 3
"""Significant decimal digits that a histogram keeps."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """The distribution of times, in milliseconds.

    Attributes:
        count: number of values.
        mean: mean of the values.
        min: least value.
        max: greatest value.
        percentiles: "50", "75", "90", "95", "99", "99.9" and "99.99" -> the percentile.
        hdr: all values, to three digits: an HdrHistogram of microseconds, compressed, in base64 (its V2 format).

    """

    count: int
    mean: float
    min: float
    max: float
    percentiles: Mapping[str, float]
    hdr: str

    @classmethod
    def of(cls, histogram: HdrHistogram) -> Distribution:
        """The distribution of a histogram of microseconds."""
        count = histogram.get_total_count()
        found = histogram.get_percentile_to_value_dict(list(PERCENTILES))
        return cls(
            count=count,
            mean=histogram.get_mean_value() / 1000 if count else 0.0,
            min=histogram.get_min_value() / 1000 if count else 0.0,
            max=histogram.get_max_value() / 1000 if count else 0.0,
            percentiles={f"{it:g}": found.get(it, 0) / 1000 for it in PERCENTILES},
            hdr=histogram.encode().decode(),
        )

    def histogram(self) -> HdrHistogram:
        """All values as a histogram of microseconds."""
        return HdrHistogram.decode(self.hdr.encode())


def new_histogram() -> HdrHistogram:
    """An empty histogram of microseconds."""
    return HdrHistogram(1, HIGHEST, DIGITS)


def merged(histograms: Iterable[HdrHistogram]) -> HdrHistogram:
    """One histogram with the values of all of these."""
    whole = new_histogram()
    for one in histograms:
        whole.add(one)
    return whole


@dataclass(frozen=True, slots=True)
class Second:
    """A second of a run.

    Attributes:
        at: when it began.
        offered: calls that were due in it; None in the closed model.
        sent: calls that were sent in it.
        ok: calls that ended in it with a result.
        failed: calls that ended in it with an error.
        p50: median latency of the calls that ended in it; None if none ended, as for `p99` and `max`.
        p99: 99th percentile of the same.
        max: maximum of the same.
        depth: requests that waited in the queue at its end; None if that is not known.
        lag: the longest that the event loop of a generator was late in it, in milliseconds.

    """

    at: int
    offered: int | None
    sent: int
    ok: int
    failed: int
    p50: float | None
    p99: float | None
    max: float | None
    depth: int | None
    lag: float


@dataclass(frozen=True, slots=True)
class Step:
    """A part of a run at one rate.

    Attributes:
        rate: calls a second that were due.
        begins: when it began.
        seconds: how long it was.
        achieved: calls a second that ended in it.
        failed: calls that ended in it with an error.
        latency: latency of the calls that were due in it.

    """

    rate: float
    begins: float
    seconds: float
    achieved: float
    failed: int
    latency: Distribution


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a load test.

    It has more than 15 fields because it is a plain record, which is read as JSON.

    Attributes:
        model: "open": calls are sent when they are due, and do not wait for earlier ones. "closed": each caller waits
            for its reply before it calls again, so a stall delays the calls that would have shown it.
        began: when measuring began, in UTC (ISO 8601).
        seconds: how long it measured, without warm-up.
        offered: calls a second that were due; None in the closed model.
        achieved: calls a second that ended; of jobs, those that were done or failed.
        sent: calls that were sent.
        ok: calls that ended with a result.
        errors: class of the error -> calls that ended with it. For jobs also `NOT_DONE`, and JobFailed has its reason.
        executed: "no", "maybe" and "yes" -> calls that failed and did not, may have, or did run.
        warm_up: calls of the warm-up; they are counted nowhere else.
        checked: whether `lost`, `duplicated` and `mismatched` were checked, with the nonces of the built-in echo.
        lost: calls that did not end: `sent` without `ok` and `errors`.
        duplicated: runs of handlers with a nonce that was seen before, and replies that belonged to no call. Jobs may
            run again, so it is no fault of theirs.
        mismatched: results that belonged to another call.
        handled: runs of handlers, warm-up included; None if the target is not the built-in echo.
        latency: from when a call was due until it ended, with a result or an error. In the closed model, a call is due
            when it is sent.
        service_time: from when a call was sent until it ended.
        queue: from the client to the handler, by the clocks of both, as workers report it; None if none did.
        handler: in the handler, as workers report it; None if none did.
        transport: the rest of the service time; None if `queue` is.
        late: calls that were sent more than 10 ms after they were due.
        dropped: calls that were not sent, because too many were under way.
        cpu: share of one core that the busiest generator used; 1.0 is all of it.
        lag_p99: 99th percentile of how late the event loop of a generator was, in milliseconds.
        lag_max: maximum of the same.
        bottleneck: reasons why the generator may have limited the result; empty if there are none.
        series: the run second by second.
        steps: the steps of the run, if it had several rates.
        kind: what was sent: "calls" or "jobs".
        confirm: from when a job was sent until the broker confirmed it; it counts those that were confirmed. None
            for calls.

    """

    model: Literal["open", "closed"]
    began: str
    seconds: float
    offered: float | None
    achieved: float
    sent: int
    ok: int
    errors: Mapping[str, int]
    executed: Mapping[str, int]
    warm_up: int
    checked: bool
    lost: int
    duplicated: int
    mismatched: int
    handled: int | None
    latency: Distribution
    service_time: Distribution
    queue: Distribution | None
    handler: Distribution | None
    transport: Distribution | None
    late: int
    dropped: int
    cpu: float
    lag_p99: float
    lag_max: float
    bottleneck: tuple[str, ...]
    series: tuple[Second, ...]
    steps: tuple[Step, ...] = ()
    kind: Literal["calls", "jobs"] = "calls"
    confirm: Distribution | None = None

    @property
    def failed(self) -> int:
        """Calls that ended with an error."""
        return sum(self.errors.values())

    @property
    def correct(self) -> bool:
        """Whether no call was lost, duplicated or mixed up. A job may run again: that is not wrong."""
        return not (self.lost or self.mismatched or (self.duplicated and self.kind == "calls"))

    @property
    def not_done(self) -> int:
        """Jobs that were not known to be done within their timeout, or when the test ended; part of `failed`."""
        return self.errors.get(NOT_DONE, 0)

    @property
    def confirmed(self) -> float | None:
        """Jobs a second that the broker confirmed: the send rate; None for calls."""
        return None if self.confirm is None else self.confirm.count / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class Report:
    """The report of a load test, with one run or several.

    Attributes:
        settings: the settings of the test by name; a password in the URL is masked.
        host: where the test ran: "platform", "cpus", "python", "rpcq", "broker".
        runs: the runs: one, or as many as `--repeat` asked for.
        interrupted: whether the test was ended early.
        format: version of this schema.

    """

    settings: Mapping[str, Any]
    host: Mapping[str, Any]
    runs: tuple[Run, ...]
    interrupted: bool = False
    format: Literal["rpcq-bench/1"] = field(default=FORMAT, kw_only=True)

    def to_json(self) -> bytes:
        """The report as JSON, for `read_report`."""
        return _adapter().dump_json(self, indent=1)


def read_report(text: str | bytes, name: str) -> Report:
    """A report from its JSON; `name` is the name of the file, for the error.

    Raises:
        ConfigurationError: the text is not a report, or has another version.

    """
    try:
        return _adapter().validate_json(text)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the text"
        raise ConfigurationError(f"{name} is not a report of rpcq bench ({FORMAT}): {where}: {first['msg']}") from error


@cache
def _adapter() -> pydantic.TypeAdapter[Report]:
    return pydantic.TypeAdapter(Report)

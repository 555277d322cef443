"""What a load test found: values, and their JSON. Pure.

Times of calls are milliseconds, times of a run are seconds since it began; rates are calls a second.
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
"""The version of the schema; what is added keeps it, what changes its meaning does not."""

PERCENTILES: Final = (50.0, 75.0, 90.0, 95.0, 99.0, 99.9, 99.99)

HIGHEST: Final = 3_600_000_000
"""Microseconds: an hour, which no call lasts."""

DIGITS: Final = 3
"""Significant decimal digits that a histogram keeps."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """How something was spread, in milliseconds.

    Attributes:
        count: values.
        mean: of all of them.
        min: the least.
        max: the greatest.
        percentiles: "50", "75", "90", "95", "99", "99.9" and "99.99" -> milliseconds that so many were not above.
        hdr: all of it, to three digits: an HdrHistogram of microseconds, compressed, in base64 (its V2 format).

    """

    count: int
    mean: float
    min: float
    max: float
    percentiles: Mapping[str, float]
    hdr: str

    @classmethod
    def of(cls, histogram: HdrHistogram) -> Distribution:
        """What a histogram of microseconds holds."""
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
        """All of it, in microseconds."""
        return HdrHistogram.decode(self.hdr.encode())


def new_histogram() -> HdrHistogram:
    """An empty one, of microseconds."""
    return HdrHistogram(1, HIGHEST, DIGITS)


def merged(histograms: Iterable[HdrHistogram]) -> HdrHistogram:
    """One that holds all that these hold."""
    whole = new_histogram()
    for one in histograms:
        whole.add(one)
    return whole


@dataclass(frozen=True, slots=True)
class Second:
    """A second of a run.

    Attributes:
        at: when it began.
        offered: calls that should have been sent in it; None in the closed model.
        sent: calls that were sent in it.
        ok: calls that ended in it, with a result.
        failed: calls that ended in it, with an error.
        p50: of the latencies of those that ended in it; so are p99 and max; None where none ended.
        depth: requests that waited in the queue at its end; None where that is not known.
        lag: the longest that the generator's event loop was late in it, in milliseconds.

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
        rate: what was asked for.
        begins: when it began.
        seconds: how long it was.
        achieved: calls that ended in it, a second.
        failed: calls that ended in it, with an error.
        latency: of those that should have been sent in it.

    """

    rate: float
    begins: float
    seconds: float
    achieved: float
    failed: int
    latency: Distribution


@dataclass(frozen=True, slots=True)
class Run:
    """One run.

    Attributes:
        model: "open": calls are sent when they are due, whatever became of earlier ones; "closed": each caller waits
            for its answer before it calls again, so that a stall holds up the calls that would have shown it.
        began: when, in UTC (ISO 8601).
        seconds: how long it was measured, without warm-up.
        offered: calls a second that should have been sent; None in the closed model.
        achieved: calls a second that ended.
        sent: calls that were sent.
        ok: calls that ended with a result.
        errors: class of the error -> calls that ended with it.
        executed: "no", "maybe" and "yes" -> calls that failed, and did, may have, or did not run.
        warm_up: calls that were made before, and are counted nowhere else.
        checked: whether the next three were looked at: each call of the built-in echo carries a nonce.
        lost: calls of which nothing was heard: `sent` without `ok` and `errors`.
        duplicated: nonces that handlers saw more than once, and replies that were for no call.
        mismatched: results that were another call's.
        handled: nonces that handlers saw, warm-up included; None where the target is not the built-in echo.
        latency: from when a call was due to when it ended, whatever with. In the closed model it is due when sent.
        service_time: from when it was sent to when it ended.
        queue: from the client to the handler, by the clocks of both, as workers tell it; None where none did.
        handler: in the handler, as workers tell it.
        transport: what is left of the service time.
        late: calls that were sent more than 10 ms after they were due.
        dropped: calls that were not sent at all, since too many were under way.
        cpu: of one core, what the busiest generator used: 1.0 is all.
        lag_p99: milliseconds that the generator's event loop was late.
        lag_max: the same, at most.
        bottleneck: why the generator itself may have been what was measured; empty if it was not.
        series: second by second.
        steps: where there were several rates.

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

    @property
    def failed(self) -> int:
        """Calls that ended with an error."""
        return sum(self.errors.values())

    @property
    def correct(self) -> bool:
        """Nothing was lost, doubled or mixed up."""
        return not (self.lost or self.duplicated or self.mismatched)


@dataclass(frozen=True, slots=True)
class Report:
    """What a test found, in one run or several.

    Attributes:
        settings: what was asked for, by name; a password in the URL is masked.
        host: where it was: "platform", "cpus", "python", "rpcq", "broker".
        runs: one, or as many as `--repeat` asked for.
        interrupted: whether it was ended before its time.
        format: the version of this schema.

    """

    settings: Mapping[str, Any]
    host: Mapping[str, Any]
    runs: tuple[Run, ...]
    interrupted: bool = False
    format: Literal["rpcq-bench/1"] = field(default=FORMAT, kw_only=True)

    def to_json(self) -> bytes:
        """The report as JSON, to be read again with `read_report`."""
        return _adapter().dump_json(self, indent=1)


def read_report(text: str | bytes, name: str) -> Report:
    """A report from its JSON; `name` says whose it is.

    Raises:
        ConfigurationError: it is none, or of another version.

    """
    try:
        return _adapter().validate_json(text)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "it"
        raise ConfigurationError(f"{name} is no report of `rpcq bench` ({FORMAT}): {where}: {first['msg']}") from error


@cache
def _adapter() -> pydantic.TypeAdapter[Report]:
    return pydantic.TypeAdapter(Report)

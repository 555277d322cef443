"""Writes a report for the terminal, as CSV and as HdrHistogram's text; conditions that make a test fail. Pure."""

from __future__ import annotations

import csv
import difflib
import io
import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, TextIO

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rpcq.bench.result import PERCENTILES, Distribution, Report, Run
from rpcq.errors import ConfigurationError

COLUMNS: Final[Mapping[str, str]] = {
    "at": "seconds since measuring began",
    "offered": "calls that were due in the second; empty in the closed model",
    "sent": "calls that were sent in it",
    "ok": "calls that ended in it with a result",
    "failed": "calls that ended in it with an error",
    "p50_ms": "median latency of the calls that ended in it, in milliseconds; empty if none did",
    "p99_ms": "99th percentile of the same",
    "max_ms": "maximum of the same",
    "depth": "requests that waited in the queue at its end; empty if that is not known",
    "lag_ms": "the longest that the event loop of a generator was late in it, in milliseconds",
}
"""The columns of `write_csv`, in their order, and what each one contains."""

PARTS: Final = ("queue", "handler", "transport")
"""The parts of the service time: names of attributes of `Run`."""

OPEN: Final = (
    "Open model: calls are sent when they are due, and do not wait for earlier ones. Latency counts from when a call "
    "was due, so it includes the time that a caller waits during a stall."
)

OPEN_JOBS: Final = (
    "Open model: jobs are sent when they are due, and do not wait for earlier ones. Latency counts from when a job was "
    "due until its sender heard that it was done, so it includes the time that it waits during a stall."
)

CLOSED: Final = (
    "Closed model: it hides stalls. Each caller waits for its reply before it calls again, so a stall delays the "
    "calls that would have shown it: the percentiles look better than what independent callers would see. "
    "To see stalls, use the open model: --rate."
)


def time_text(milliseconds: float | None) -> str:
    """The text of a time: three digits, in µs, ms or s; a dash for None."""
    if milliseconds is None:
        return "-"
    rounded = _three_digits(milliseconds)
    size = abs(rounded)
    if size == 0:
        return "0 ms"
    if size < 1:
        return f"{_digits(_three_digits(rounded * 1000))} µs"
    return f"{_digits(rounded)} ms" if size < 1000 else f"{_digits(rounded / 1000)} s"


def number_text(number: float | None) -> str:
    """The text of a number, with separators of thousands; a fraction is rounded to three digits in all."""
    if number is None:
        return "-"
    return (
        f"{number:,}" if isinstance(number, int) else _digits(_three_digits(number) if abs(number) < 1000 else number)
    )


def share_text(part: float, whole: float) -> str:
    """The share of a part in percent. It is 100% only for the whole, and 0% only for nothing."""
    if not whole:
        return "-"
    percent = 100 * part / whole
    text = f"{percent:.2f}" if percent < 10 else f"{percent:.1f}"
    if part and float(text) == 0:
        return "<0.01%"
    if part != whole and float(text) == 100:
        return ">99.9%"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text}%"


def _three_digits(number: float) -> float:
    return float(f"{number:.3g}")


def _digits(number: float) -> str:
    """The whole number with separators, and decimal places up to three digits in all."""
    size = abs(number)
    places = 0 if size >= 100 or number == int(number) else 1 if size >= 10 else 2 if size >= 1 else 3
    text = f"{number:,.{places}f}"
    return text.rstrip("0").rstrip(".") if places else text


def model_text(run: Run) -> str:
    """What the model of a run means for its latencies."""
    return CLOSED if run.model == "closed" else OPEN_JOBS if run.kind == "jobs" else OPEN


def subject(report: Report) -> str:
    """The target and the load of a test, in one line."""
    kind = report.runs[0].kind if report.runs else "calls"
    target = str(report.settings.get("target") or kind)
    return f"{target} {load(report)}" if report.runs else target


def load(report: Report) -> str:
    """The load of a test, in a few words."""
    run = report.runs[0]
    if len(run.steps) > 1:
        rates = [step.rate for step in run.steps]
        return f"at {number_text(min(rates))} to {number_text(max(rates))} {run.kind}/s in {len(rates)} steps"
    if run.model == "open":
        return f"at {number_text(run.offered)} {run.kind}/s"
    callers = report.settings.get("concurrency")
    if isinstance(callers, int):
        return f"with {number_text(callers)} {'callers' if callers != 1 else 'caller'} in a closed loop"
    return "with callers in a closed loop"


def checks(run: Run) -> str:
    """Whether results were correct, in one line."""
    if not run.checked:
        return f"not checked: only {run.kind} of the built-in echo carry a nonce"
    if run.kind == "jobs":
        return f"done twice {run.duplicated:,}, mismatched {run.mismatched:,}, lost by the generator {run.lost:,}"
    return f"lost {run.lost:,}, duplicated {run.duplicated:,}, mismatched {run.mismatched:,}"


def by_count(counts: Mapping[str, int]) -> str:
    """Names with their counts, the most frequent first."""
    return ", ".join(
        f"{name} {count:,}" for name, count in sorted(counts.items(), key=lambda it: (-it[1], it[0])) if count
    )


# The terminal


def summary(run: Run, report: Report) -> RenderableType:
    """The summary of a run for the terminal."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column()
    for name, text, style in _facts(run, report):
        facts.add_row(name, Text(text, style=style))
    parts: list[RenderableType] = [Text(subject(report), style="bold"), facts, _percentiles(run)]
    if any(getattr(run, name) for name in PARTS):
        parts.append(_parts(run))
    parts += [
        Text(f"the generator itself may be what was measured: {why}", style="bold yellow") for why in run.bottleneck
    ]
    if report.interrupted:
        parts.append(Text("interrupted: this is what was measured until then", style="bold yellow"))
    return Group(*parts)


def _facts(run: Run, report: Report) -> list[tuple[str, str, str]]:
    ended = run.ok + run.failed
    offered = "" if run.offered is None else f" of {number_text(run.offered)} offered"
    ended_as = "ended" if run.kind == "jobs" else "achieved"
    facts = [
        ("model", model_text(run), "" if run.model == "open" else "bold yellow"),
        ("rate", f"{number_text(run.achieved)} {run.kind}/s {ended_as}{offered}", ""),
        (run.kind, f"{run.sent:,} in {number_text(run.seconds)} s, after {run.warm_up:,} to warm up", ""),
        ("done" if run.kind == "jobs" else "ok", f"{run.ok:,} ({share_text(run.ok, ended)})", ""),
    ]
    if run.confirmed is not None:
        facts.insert(1, ("send rate", f"{number_text(run.confirmed)} jobs/s confirmed{offered}", ""))
        facts.append(
            ("not done", f"{run.not_done:,} in time, as far as their sender heard", "bold red" if run.not_done else "")
        )
    if run.failed:
        facts.append(
            ("errors", f"{run.failed:,} ({share_text(run.failed, ended)}): {by_count(run.errors)}", "bold red")
        )
        facts.append(("did they run", by_count(run.executed) or "not known", ""))
    else:
        facts.append(("errors", "0", ""))
    facts.append(("results", checks(run), "" if run.correct else "bold red"))
    if run.handled is not None:
        facts.append(("handled", f"{run.handled:,} {run.kind}, warm-up included", ""))
    if run.late or run.dropped:
        facts.append(("late", f"{run.late:,} sent late, {run.dropped:,} not sent at all", "yellow"))
    lag = f"event loop late by {time_text(run.lag_p99)} (p99), {time_text(run.lag_max)} (max)"
    facts.append(("generator", f"{share_text(run.cpu, 1.0)} of a core; {lag}", ""))
    if len(report.runs) > 1 and run in report.runs:
        facts.insert(0, ("run", f"{report.runs.index(run) + 1} of {len(report.runs)}", ""))
    return facts


def rows(distribution: Distribution) -> list[tuple[str, float | None]]:
    """Percentiles, maximum and mean, by name, in milliseconds; None if there were no values."""
    values: list[tuple[str, float | None]] = [
        (f"p{it:g}", distribution.percentiles.get(f"{it:g}") if distribution.count else None) for it in PERCENTILES
    ]
    some = distribution.count > 0
    return [*values, ("max", distribution.max if some else None), ("mean", distribution.mean if some else None)]


def _percentiles(run: Run) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2), title_justify="left")
    table.add_column("", style="dim")
    latency = "latency, from when due" if run.model == "open" else "latency (stalls hidden)"
    table.add_column(latency, justify="right", style="bold")
    table.add_column("service time, from when sent", justify="right")
    columns = [run.latency, run.service_time]
    if run.confirm is not None:
        table.add_column("confirm, from when sent", justify="right")
        columns.append(run.confirm)
    for each in zip(*(rows(it) for it in columns), strict=True):
        table.add_row(each[0][0], *(time_text(milliseconds) for _, milliseconds in each))
    return table


def _parts(run: Run) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    table.add_column("where the time goes", style="dim")
    for name in ("mean", "share", "p50", "p99", "max"):
        table.add_column(name, justify="right")
    whole = sum(getattr(run, name).mean for name in PARTS if getattr(run, name))
    for name in PARTS:
        part: Distribution | None = getattr(run, name)
        if part is not None and part.count:
            of = part.percentiles
            table.add_row(
                name,
                time_text(part.mean),
                share_text(part.mean, whole),
                time_text(of.get("50")),
                time_text(of.get("99")),
                time_text(part.max),
            )
    return table


# Files


def write_csv(run: Run, file: TextIO) -> None:
    """Write the run as CSV: a header, and a line for each second. `COLUMNS` describes the columns."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for it in run.series:
        writer.writerow((it.at, it.offered, it.sent, it.ok, it.failed, it.p50, it.p99, it.max, it.depth, it.lag))


def write_hgrm(run: Run, file: TextIO) -> None:
    """Write the latency in milliseconds as HdrHistogram's percentile distribution, a text that its plotters read."""
    histogram = run.latency.histogram()
    text = io.BytesIO()
    histogram.output_percentile_distribution(text, 1000.0)
    # The library scales all values except the standard deviation, which stays in microseconds.
    deviation = f"StdDeviation   = {histogram.get_stddev() / 1000:12.3f}]"
    file.write(re.sub(r"StdDeviation +=[^\]]*\]", deviation, text.getvalue().decode()))


# Conditions

Kind = Literal["time", "rate", "percent", "count"]

DISTRIBUTIONS: Final[Mapping[str, str]] = {
    "": "latency",
    "service_": "service_time",
    "confirm_": "confirm",
    "queue_": "queue",
    "handler_": "handler",
    "transport_": "transport",
}
"""Prefix of the name of a percentile -> attribute of `Run`."""

COUNTS: Final = ("errors", "lost", "duplicated", "mismatched", "late", "dropped", "not_done")
POINTS: Final = (*(f"p{it:g}" for it in PERCENTILES), "max", "mean")
UNITS: Final[Mapping[Kind, Mapping[str, float]]] = {
    "time": {"us": 0.001, "µs": 0.001, "ms": 1.0, "s": 1000.0},
    "rate": {"": 1.0, "/s": 1.0},
    "percent": {"": 1.0, "%": 1.0},
    "count": {"": 1.0},
}
OPERATORS: Final[Mapping[str, Callable[[float, float], bool]]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_MEASURES: Final[Mapping[str, Kind]] = {
    **{prefix + point: "time" for prefix in DISTRIBUTIONS for point in POINTS},
    **dict.fromkeys(COUNTS, "count"),
    **dict.fromkeys(("errors%", "error_rate"), "percent"),
    **dict.fromkeys(("achieved", "offered", "confirmed"), "rate"),
}
_SPLIT: Final = re.compile(r"([^<>=!]*)([<>=!]+)(.*)", re.DOTALL)
_NUMBER: Final = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(\S*)")


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition under which a test fails, such as `p99 > 50 ms`.

    Attributes:
        measure: the measure. `p50`, `p75`, `p90`, `p95`, `p99`, `p99.9`, `p99.99`, `max` and `mean` are those of the
            latency; with the prefix `service_`, `confirm_`, `queue_`, `handler_` or `transport_`, those of that part.
            `errors`, `lost`, `duplicated`, `mismatched`, `late`, `dropped` and `not_done` are numbers of calls;
            `errors%` (or `error_rate`) is the share of the calls that ended; `achieved`, `offered` and `confirmed` are
            calls a second.
        operator: `>`, `>=`, `<`, `<=`, `==` or `!=`.
        limit: the value to compare with, in milliseconds, percent, calls a second, or calls.

    """

    measure: str
    operator: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> Condition:
        """A condition from its text: a measure, an operator, and a number with its unit, as in `p99>50ms`.

        Raises:
            ConfigurationError: the measure, the operator, the number or the unit is wrong.

        """
        found = _SPLIT.fullmatch(text)
        if not found:
            raise ConfigurationError(f"a condition must be like 'p99>50ms', with {_list(OPERATORS)}; got {text!r}")
        measure, sign, right = found[1].strip(), found[2], found[3].strip()
        if sign not in OPERATORS:
            raise ConfigurationError(f"the operator must be one of {_list(OPERATORS)}; got {sign!r} in {text!r}")
        if measure not in _MEASURES:
            close = difflib.get_close_matches(measure, _MEASURES, 1)
            hint = f": did you mean {close[0]!r}?" if close else ""
            known = _list([*POINTS, *COUNTS, "errors%", "achieved", "offered", "service_p99"])
            raise ConfigurationError(f"the measure must be {known}, ...; got {measure!r} in {text!r}{hint}")
        number = _NUMBER.fullmatch(right)
        if not number:
            raise ConfigurationError(
                f"the limit must be a number, like '{_example(measure)}'; got {right!r} in {text!r}"
            )
        if measure == "errors" and number[2] == "%":
            measure = "errors%"
        units = UNITS[_MEASURES[measure]]
        unit = number[2]
        if unit not in units and float(number[1]) == 0 and not unit:
            unit = next(iter(units))  # 0 is the same in every unit
        if unit not in units:
            wrong = f"the unit {unit!r}" if unit else "no unit"
            raise ConfigurationError(
                f"{measure} must be {_kind(measure)}, like '{_example(measure)}'; got {wrong} in {text!r}"
            )
        return cls(measure, sign, float(number[1]) * units[unit])

    def __str__(self) -> str:
        return f"{self.measure} {self.operator} {self.text(self.limit)}"

    def text(self, value: float | None) -> str:
        """The text of a value of this measure, with its unit."""
        if value is None:
            return "not known"
        match _MEASURES[self.measure]:
            case "time":
                unit, size = (
                    ("s", 1000.0) if value >= 1000 else ("ms", 1.0) if value >= 1 or not value else ("µs", 0.001)
                )
                return f"{value / size:.10g} {unit}"
            case "percent":
                return f"{value:.6g}%"
            case "rate":
                return f"{value:.10g} /s"
            case _:
                return f"{value:.15g}"

    def value(self, run: Run) -> float | None:
        """The value in a run, in the unit of `limit`.

        None if it is not known: a percentile of no calls, `offered` in the closed model, `lost` if nothing was checked,
        `confirmed` and `not_done` of calls.
        """
        ended = run.ok + run.failed
        if self.measure in {"errors%", "error_rate"}:
            return 100 * run.failed / ended if ended else None
        if self.measure in {"lost", "duplicated", "mismatched"} and not run.checked:
            return None
        if self.measure == "not_done" and run.kind == "calls":
            return None
        if self.measure in COUNTS or self.measure in {"achieved", "offered", "confirmed"}:
            value: float | None = getattr(run, "failed" if self.measure == "errors" else self.measure)
            return value
        prefix, point = re.fullmatch(r"([a-z]+_|)(.+)", self.measure).groups()  # type: ignore[union-attr]  # was parsed
        distribution: Distribution | None = getattr(run, DISTRIBUTIONS[prefix])
        return None if distribution is None else dict(rows(distribution)).get(point)

    def holds(self, run: Run) -> bool:
        """Whether the condition holds; also if the value is not known: a test must not pass without a value."""
        value = self.value(run)
        if value is None or math.isnan(value):
            return True
        return OPERATORS[self.operator](value, self.limit)


def _kind(measure: str) -> str:
    return {
        "time": "a time in us, ms or s",
        "rate": "a rate in calls a second",
        "percent": "a share in %",
        "count": "a number of calls",
    }[_MEASURES[measure]]


def _example(measure: str) -> str:
    return measure + {"time": ">50ms", "rate": "<1000/s", "percent": ">1%", "count": ">0"}[_MEASURES[measure]]


def _list(names: Any) -> str:
    return ", ".join(names)

"""Compares two reports: what is better or worse, and what may be chance. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rpcq.bench.outputs import number_text, rows, time_text
from rpcq.bench.result import Distribution, Report, Run

Verdict = Literal["better", "worse", "within noise", "unknown noise"]

REPEAT: Final = "run both with --repeat 5"
"""How to measure the noise."""


@dataclass(frozen=True, slots=True)
class Spread:
    """The values of a measure in the runs of one report.

    Attributes:
        median: median of the values.
        low: least value.
        high: greatest value.
        runs: number of runs that have a value.

    """

    median: float
    low: float
    high: float
    runs: int


@dataclass(frozen=True, slots=True)
class Change:
    """A measure in both reports.

    Attributes:
        name: name of the measure.
        kind: "time" in milliseconds, "rate" in calls a second, or "percent" of the calls that ended.
        a: its values in the first report; None if it was not measured there.
        b: its values in the second report; None if it was not measured there.
        percent: change from the median of `a` to that of `b`; None if the median of `a` is 0, or one is missing.
        verdict: judges `b`: "within noise" if the ranges of both overlap, "unknown noise" if one has a single run;
            None if one is missing.

    """

    name: str
    kind: Literal["time", "rate", "percent"]
    a: Spread | None
    b: Spread | None
    percent: float | None
    verdict: Verdict | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """The differences between two reports.

    Attributes:
        changes: the change of each measure.
        models: models of the first and of the second report: "open", "closed", or "" for a report without runs.
        settings: name -> both values, for the settings that differ; None for a value that is missing.
        host: the same for the hosts.
        warnings: reasons not to trust the comparison, the most serious first.

    """

    changes: tuple[Change, ...]
    models: tuple[str, str]
    settings: Mapping[str, tuple[Any, Any]]
    host: Mapping[str, tuple[Any, Any]]
    warnings: tuple[str, ...]

    def __rich__(self) -> RenderableType:
        return table(self)


def compare(a: Report, b: Report) -> Comparison:
    """The differences from `a` to `b`."""
    changes = [_change(name, kind, of, a.runs, b.runs) for name, kind, of in _measures()]
    models = (_model(a), _model(b))
    settings = _differences(a.settings, b.settings)
    host = _differences(a.host, b.host)
    return Comparison(
        changes=tuple(change for change in changes if change.a or change.b),
        models=models,
        settings=settings,
        host=host,
        warnings=tuple(_warnings(a, b, models, settings, host)),
    )


Measure = tuple[str, Literal["time", "rate", "percent"], Callable[[Run], float | None]]


def _measures() -> list[Measure]:
    found: list[Measure] = [("achieved", "rate", lambda run: run.achieved)]
    found += [(name, "time", _point("latency", name)) for name in ("p50", "p90", "p99", "p99.9", "max")]
    found += [("confirmed", "rate", lambda run: run.confirmed), ("confirm p50", "time", _point("confirm", "p50"))]
    found += [("confirm p99", "time", _point("confirm", "p99"))]
    found += [("service p99", "time", _point("service_time", "p99")), ("errors", "percent", _errors)]
    found += [(f"{part} p50", "time", _point(part, "p50")) for part in ("queue", "handler", "transport")]
    return found


def _point(attribute: str, name: str) -> Callable[[Run], float | None]:
    def of(run: Run) -> float | None:
        distribution: Distribution | None = getattr(run, attribute)
        return None if distribution is None else dict(rows(distribution))[name]

    return of


def _errors(run: Run) -> float | None:
    ended = run.ok + run.failed
    return 100 * run.failed / ended if ended else None


def _change(
    name: str,
    kind: Literal["time", "rate", "percent"],
    of: Callable[[Run], float | None],
    a: Sequence[Run],
    b: Sequence[Run],
) -> Change:
    one, two = _spread(of, a), _spread(of, b)
    if one is None or two is None:
        return Change(name, kind, one, two, None, None)
    percent = 100 * (two.median - one.median) / one.median if one.median else None
    return Change(name, kind, one, two, percent, _verdict(one, two, more_is_better=kind == "rate"))


def _spread(of: Callable[[Run], float | None], runs: Sequence[Run]) -> Spread | None:
    values = [value for run in runs if (value := of(run)) is not None]
    return Spread(statistics.median(values), min(values), max(values), len(values)) if values else None


def _verdict(a: Spread, b: Spread, *, more_is_better: bool) -> Verdict:
    if a.runs < 2 or b.runs < 2:
        return "unknown noise"
    if a.low <= b.high and b.low <= a.high:
        return "within noise"
    return "better" if (b.low > a.high) == more_is_better else "worse"


def _model(report: Report) -> str:
    return report.runs[0].model if report.runs else ""


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {name: (a.get(name), b.get(name)) for name in {**a, **b} if a.get(name) != b.get(name)}


def _warnings(
    a: Report,
    b: Report,
    models: tuple[str, str],
    settings: Mapping[str, tuple[Any, Any]],
    host: Mapping[str, tuple[Any, Any]],
) -> list[str]:
    found = []
    if models[0] != models[1]:
        first, second = (model or "none" for model in models)
        found.append(
            f"the models differ ({first}, {second}): the closed model hides stalls, so their latencies do not compare"
        )
    elif len(kinds := {run.kind for run in (*a.runs, *b.runs)}) > 1:
        found.append(f"one is of {' and the other of '.join(sorted(kinds))}: their latencies do not compare")
    elif models[0] == "closed":
        found.append("both use the closed model, which hides stalls")
    if settings:
        found.append(f"the settings differ: {_listed(settings)}")
    if host:
        found.append(f"the hosts differ: {_listed(host)}")
    for name, report in (("first", a), ("second", b)):
        if report.interrupted:
            found.append(f"the {name} was interrupted")
        if not all(run.correct for run in report.runs):
            found.append(f"the {name} lost, duplicated or mixed up {report.runs[0].kind}")
        reasons = dict.fromkeys(why for run in report.runs for why in run.bottleneck)
        if reasons:
            found.append(f"in the {name}, the generator itself may be what was measured: {'; '.join(reasons)}")
    if len(a.runs) < 2 or len(b.runs) < 2:
        found.append(f"the noise is not known, because one or both have a single run: {REPEAT}")
    return found


def _listed(differences: Mapping[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{name} {_text(a)} -> {_text(b)}" for name, (a, b) in differences.items())


def _text(value: Any) -> str:
    return "not set" if value is None else str(value)


# The terminal

STYLES: Final[Mapping[str | None, str]] = {
    "better": "bold green",
    "worse": "bold red",
    "within noise": "dim",
    "unknown noise": "yellow",
    None: "dim",
}


def table(comparison: Comparison, a: str = "first", b: str = "second") -> RenderableType:
    """The comparison for the terminal; `a` and `b` are the names of the two reports."""
    found = Table(box=None, pad_edge=False, padding=(0, 2))
    found.add_column("", style="dim")
    for name in (Text(a), Text(b), Text("change"), Text("")):
        found.add_column(name, justify="right", overflow="fold")
    for change in comparison.changes:
        found.add_row(
            change.name,
            _cell(change.a, change.kind),
            _cell(change.b, change.kind),
            change_text(change),
            Text(change.verdict or "not in both", style=STYLES[change.verdict]),
        )
    warnings = [Text(f"! {warning}", style="bold yellow") for warning in comparison.warnings]
    return Group(*warnings, found)


def change_text(change: Change) -> str:
    """The text of a change, in percent."""
    if change.a is None or change.b is None:
        return "-"
    if change.percent is None:
        return "same" if change.a.median == change.b.median else "from 0"
    return f"{change.percent:+.1f}%" if abs(change.percent) < 1000 else f"{change.percent:+,.0f}%"


def _cell(spread: Spread | None, kind: str) -> str:
    if spread is None:
        return "-"
    if spread.runs < 2:
        return _value(spread.median, kind)
    return f"{_value(spread.median, kind)} ({_value(spread.low, kind)} to {_value(spread.high, kind)})"


def _value(value: float, kind: str) -> str:
    return time_text(value) if kind == "time" else number_text(value) + ("/s" if kind == "rate" else "%")

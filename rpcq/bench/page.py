"""A report as one page of HTML, which needs no other file and no network. Pure; needs Jinja2.

The template `page.html.jinja` has the markup; this module prepares its values. The page has no script, and its
Content-Security-Policy allows no request.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from markupsafe import Markup

from rpcq.bench.outputs import (
    CLOSED,
    PARTS,
    by_count,
    checks,
    model_text,
    number_text,
    rows,
    share_text,
    subject,
    time_text,
)
from rpcq.bench.plots import (
    CHUNKS,
    Line,
    count_axis,
    curve,
    figure,
    linear_axis,
    percentile_axis,
    second_axis,
    short_texts,
    time_axis,
)
from rpcq.bench.rendering import render
from rpcq.bench.result import Distribution, Report, Run, Second, Step
from rpcq.bench.sheet import Card


def page(report: Report) -> str:
    """The report as a page of HTML."""
    shown = _typical(report.runs)
    run = None if shown is None else report.runs[shown]
    text = render(
        "page.html.jinja",
        title=f"rpcq bench: {subject(report)}",
        format=report.format,
        count=len(report.runs),
        number=None if shown is None else shown + 1,
        began=report.runs[0].began if report.runs else "",
        facts=_facts(report),
        notes=_notes(report, run),
        open_model="" if run is None else model_text(run),
        run=None if run is None else _shown(run),
        runs=_all_runs(report.runs, shown) if shown is not None and len(report.runs) > 1 else None,
        details=[(name, _texts(values)) for name, values in _details(report) if values],
    )
    return str(text)


# What the page says


class _Note(NamedTuple):
    """A warning at the top of the page; a wrong result or a doubtful one stands out."""

    head: str
    text: str
    is_wrong: bool = False
    reasons: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class _Table:
    """A table: each row has a name, and its cells."""

    heads: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]
    foot: Sequence[tuple[str, Sequence[str]]] = ()


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of the service time; `width` is its share of the mean in percent."""

    name: str
    share: str
    width: float
    cells: Sequence[str]


@dataclass(frozen=True, slots=True)
class _Shown:
    """The run that is shown in detail."""

    of: Run
    errors: str
    executed: str
    checks: str
    cards: Sequence[Card]
    latency: tuple[_Table, Markup]
    parts: Sequence[_Part]
    over_time: Sequence[Markup]
    by_rate: tuple[_Table, Sequence[Markup]] | None


def _shown(run: Run) -> _Shown:
    return _Shown(
        of=run,
        errors=by_count(run.errors),
        executed=by_count(run.executed) or "not known",
        checks=checks(run),
        cards=_cards(run),
        latency=_latency(run),
        parts=_parts(run),
        over_time=_over_time(run) if run.series else (),
        by_rate=_by_rate(run.steps) if len(run.steps) > 1 else None,
    )


def _facts(report: Report) -> list[str]:
    facts = []
    if report.runs:
        facts.append(f"{number_text(report.runs[0].seconds)} s measured")
    if len(report.runs) > 1:
        facts.append(f"{len(report.runs)} runs")
    for name, before in (("rpcq", "rpcq "), ("broker", "")):
        if report.host.get(name):
            facts.append(before + _text(report.host[name]))
    return facts


def _notes(report: Report, run: Run | None) -> list[_Note]:
    notes = []
    if run and run.model == "closed":
        name, text = CLOSED.split(": ", 1)
        notes.append(_Note(name, text[:1].upper() + text[1:]))
    if report.interrupted:
        notes.append(_Note("Interrupted", "The test was ended early; this is what was measured until then."))
    reasons = list(dict.fromkeys(why for one in report.runs for why in one.bottleneck))
    if reasons:
        notes.append(
            _Note(
                "The generator itself may be what was measured",
                "Use more processes, or a lower rate, before you trust these numbers.",
                is_wrong=True,
                reasons=reasons,
            )
        )
    wrong = [str(at) for at, one in enumerate(report.runs, 1) if not one.correct]
    if wrong and len(report.runs) > 1:
        text = f"{report.runs[0].kind.capitalize()} were lost, duplicated or mixed up in run {', '.join(wrong)}."
        notes.append(_Note("Results are wrong", text, is_wrong=True))
    return notes


def _cards(run: Run) -> list[Card]:
    of = dict(rows(run.latency))
    offered = "" if run.offered is None else f"of {number_text(run.offered)} offered"
    sent = [] if run.confirmed is None else [Card("Confirmed", f"{number_text(run.confirmed)}/s", offered)]
    if run.confirm is not None:
        sent.append(Card("Confirm p99", time_text(dict(rows(run.confirm))["p99"]), "from when a job was sent"))
    return [
        *sent,
        Card("Ended" if sent else "Achieved", f"{number_text(run.achieved)}/s", offered),
        Card("Latency p50", time_text(of["p50"]), "50% are slower"),
        Card("Latency p99", time_text(of["p99"]), "1% are slower"),
        Card("Latency p99.9", time_text(of["p99.9"]), "0.1% are slower"),
        Card("Latency max", time_text(of["max"]), "the longest"),
        Card("Failed", share_text(run.failed, run.ok + run.failed), f"{run.failed:,} {run.kind}"),
        Card("Generator", share_text(run.cpu, 1.0), f"of a core; lag {time_text(run.lag_p99)} at p99"),
    ]


def _typical(runs: Sequence[Run]) -> int | None:
    """Index of the run with the median p99, which is shown in detail; None if there are no runs."""
    if not runs:
        return None
    order = sorted(range(len(runs)), key=lambda at: runs[at].latency.percentiles.get("99", 0.0))
    return order[(len(order) - 1) // 2]


def _all_runs(runs: Sequence[Run], shown: int) -> tuple[_Table, Markup]:
    columns: list[tuple[str, Callable[[Run], float | None], Callable[[float | None], str]]] = [
        ("Achieved /s", lambda run: run.achieved, number_text),
        *[(name, _latency_point(name), time_text) for name in ("p50", "p99", "p99.9", "max")],
        ("Failed", lambda run: run.failed, number_text),
    ]
    known = [[value for run in runs if (value := of(run)) is not None] for _, of, _ in columns]
    table = _Table(
        heads=["Run", *(name for name, _, _ in columns)],
        rows=[(f"Run {at}", [text(of(run)) for _, of, text in columns]) for at, run in enumerate(runs, 1)],
        foot=[
            (
                name,
                [
                    text(float(how(values)) if values else None)
                    for values, (_, _, text) in zip(known, columns, strict=True)
                ],
            )
            for name, how in (("Median", statistics.median), ("Least", min), ("Greatest", max))
        ],
    )
    curves = [curve(run.latency) for run in runs]
    others = [points for at, points in enumerate(curves) if at != shown]
    lines = [Line("" if at else "other runs", "thin", points) for at, points in enumerate(others)]
    lines.append(Line(f"run {shown + 1}", "a", curves[shown]))
    return table, figure(
        "All runs: latency by percentile",
        "A difference between two tests may be chance if it is not larger than the differences between these runs.",
        percentile_axis(max(run.latency.count for run in runs)),
        time_axis(lines),
        lines,
    )


def _latency_point(name: str) -> Callable[[Run | Step], float | None]:
    return lambda it: dict(rows(it.latency))[name]


def _latency(run: Run) -> tuple[_Table, Markup]:
    columns = [("Latency", run.latency), ("Service time", run.service_time)]
    lines = [Line("service time", "b", curve(run.service_time)), Line("latency", "a", curve(run.latency))]
    if run.confirm is not None:
        columns.append(("Confirm", run.confirm))
        lines.insert(0, Line("confirm", "c", curve(run.confirm)))
    table = _Table(
        heads=["Percentile", *(name for name, _ in columns)],
        rows=[
            (each[0][0], [time_text(milliseconds) for _, milliseconds in each])
            for each in zip(*(rows(it) for _, it in columns), strict=True)
        ],
    )
    return table, figure(
        "Latency by percentile",
        f"The share of all {run.kind} that ended within a time; each mark to the right is ten times rarer.",
        percentile_axis(run.latency.count),
        time_axis(lines),
        lines,
    )


def _parts(run: Run) -> list[_Part]:
    parts: list[tuple[str, Distribution]] = [
        (name, part) for name in PARTS if (part := getattr(run, name)) is not None and part.count
    ]
    whole = sum(part.mean for _, part in parts)
    return [
        _Part(
            name.capitalize(),
            share_text(part.mean, whole),
            100 * max(0.0, part.mean) / whole if whole > 0 else 0.0,
            [time_text(it) for it in (part.mean, part.percentiles.get("50"), part.percentiles.get("99"))],
        )
        for name, part in parts
    ]


def _over_time(run: Run) -> list[Markup]:
    def line(name: str, style: str, of: Callable[[Second], float | None], *, both: bool = False) -> Line:
        return Line(name, style, [(it.at + 0.5, of(it)) for it in run.series], both)

    x, kind = second_axis(run.series), run.kind.capitalize()
    together = math.ceil(len(run.series) / CHUNKS)
    most = f" The maximum of each {together} seconds." if together > 1 else ""
    both = f" The median of each {together} seconds, and the range of what was ok." if together > 1 else ""
    latency = [
        line("max", "c", lambda it: it.max),
        line("p99", "b", lambda it: it.p99),
        line("p50", "a", lambda it: it.p50),
    ]
    rate = [line("sent", "b", lambda it: it.sent, both=True), line("ok", "a", lambda it: it.ok, both=True)]
    if any(it.offered is not None for it in run.series):
        rate.insert(0, line("offered", "wide", lambda it: it.offered, both=True))
    plots = [
        figure(
            "Latency over time", f"Of the {run.kind} that ended in each second.{most}", x, time_axis(latency), latency
        ),
        figure(f"{kind} a second", "What was due, sent, and ended with a result." + both, x, count_axis(rate), rate),
    ]
    if any(it.depth is not None for it in run.series):
        waiting = "Jobs" if run.kind == "jobs" else "Requests"
        depth = [line("waiting", "a", lambda it: it.depth)]
        plots.append(
            figure("Queue depth", f"{waiting} that waited, at each second's end.{most}", x, count_axis(depth), depth)
        )
    if any(it.failed for it in run.series):
        failed = [line("failed", "bars", lambda it: it.failed)]
        plots.append(
            figure("Errors", f"{kind} that ended with an error, in each second.{most}", x, count_axis(failed), failed)
        )
    lag = [line("lag", "a", lambda it: it.lag)]
    about = "How late its event loop was, at most. Where this is high, the generator is what was measured." + most
    plots.append(figure("Lag of the generator", about, x, time_axis(lag), lag))
    return plots


def _by_rate(steps: Sequence[Step]) -> tuple[_Table, Sequence[Markup]]:
    def line(name: str, style: str, of: Callable[[Step], float | None]) -> Line:
        return Line(name, style, [(it.rate, of(it)) for it in sorted(steps, key=lambda it: it.rate)])

    offered = [it.rate for it in steps]
    x = linear_axis(offered, short_texts(offered), lambda value: f"{number_text(value)}/s", 1.0)
    times = [line(name, style, _latency_point(name)) for name, style in (("max", "c"), ("p99", "b"), ("p50", "a"))]
    rates = [line("asked for", "wide", lambda it: it.rate), line("achieved", "a", lambda it: it.achieved)]
    names = ("p50", "p90", "p99", "p99.9", "max")
    table = _Table(
        heads=["Rate /s", "Lasted", "Achieved /s", "Failed", *names],
        rows=[
            (
                number_text(it.rate),
                [
                    f"{number_text(it.seconds)} s",
                    number_text(it.achieved),
                    f"{it.failed:,}",
                    *(time_text(_latency_point(name)(it)) for name in names),
                ],
            )
            for it in steps
        ],
    )
    return table, [
        figure("Latency by rate", "Where it rises steeply, the target is at its limit.", x, time_axis(times), times),
        figure("Achieved by rate", "What ended, a second.", x, count_axis(rates), rates),
    ]


def _details(report: Report) -> list[tuple[str, Mapping[str, Any]]]:
    return [("Settings", report.settings), ("Host", report.host)]


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: _text(value) for name, value in values.items()}


def _text(value: Any) -> str:
    """The text of a setting."""
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case int() | float():
            return number_text(value)
        case str():
            return value
        case Mapping():
            return json.dumps(dict(value), default=str, ensure_ascii=False)
        case Iterable():
            return ", ".join(_text(one) for one in value) or "-"
        case _:
            return str(value)

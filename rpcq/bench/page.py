"""A report as one page of HTML, which needs nothing from anywhere. Pure.

The plots are SVG, made here: the page has no script, and its Content-Security-Policy allows no request. What is at a
place of a plot stands in a `<title>`, which browsers show where the pointer rests.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from rpcq.bench.outputs import (
    CLOSED,
    OPEN,
    PARTS,
    by_count,
    checks,
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
from rpcq.bench.result import Report, Run, Second, Step


def page(report: Report) -> str:
    """The report as a page of HTML, whole in itself."""
    title = f"rpcq bench: {subject(report)}"
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="quiet">{_about(report)}</p>']
    if report.runs:
        shown = _typical(report.runs)
        run = report.runs[shown]
        parts += [_verdict(report, shown), _notes(report, run), _cards(run)]
        if len(report.runs) > 1:
            parts.append(_runs(report.runs, shown))
        parts += [_latency(run), _over_time(run)]
        if len(run.steps) > 1:
            parts.append(_by_rate(run.steps))
    else:
        parts += ["<p>There is no run in this report.</p>", _notes(report, None)]
    parts += [_asked(report), f"<footer>Made by rpcq bench; format {escape(report.format)}.</footer>"]
    text = files("rpcq.bench").joinpath("page.html").read_text("utf-8")
    return Template(text).substitute(title=escape(title), body="\n".join(part for part in parts if part))


# What is said


def _about(report: Report) -> str:
    said = []
    if report.runs:
        began = report.runs[0].began
        said.append(f'<time datetime="{escape(began)}">{escape(began[:19].replace("T", " "))} UTC</time>')
        said.append(f"{number_text(report.runs[0].seconds)} s measured")
    if len(report.runs) > 1:
        said.append(f"{len(report.runs)} runs")
    for name, before in (("rpcq", "rpcq "), ("broker", "")):
        if report.host.get(name):
            said.append(escape(before + _text(report.host[name])))
    return " · ".join(said)


def _verdict(report: Report, shown: int) -> str:
    run = report.runs[shown]
    if not run.sent:
        return '<p class="verdict">No call was made.</p>'
    ended = run.ok + run.failed
    which = f"Run {shown + 1}: " if len(report.runs) > 1 else ""
    said = [f"{which}<b>{run.sent:,}</b> calls in {number_text(run.seconds)} s: <b>{run.ok:,}</b> ok"]
    if run.failed:
        said.append(
            f'<b class="bad">{run.failed:,} failed</b> ({share_text(run.failed, ended)}: '
            f"{escape(by_count(run.errors))}; did they run: {escape(by_count(run.executed)) or 'not known'})"
        )
    else:
        said.append("<b>none</b> failed")
    if not run.checked:
        results = f"Results were {escape(checks(run))}."
    elif run.correct:
        results = '<span class="good">No call was lost, none ran twice, no result was mixed up.</span>'
    else:
        results = f'<b class="bad">Results are wrong: {escape(checks(run))}.</b>'
    handled = f" Handlers saw {run.handled:,} calls, warm-up included." if run.handled is not None else ""
    return f'<p class="verdict">{", ".join(said)}. {results}{handled}</p>'


def _notes(report: Report, run: Run | None) -> str:
    notes = []
    if run and run.model == "closed":
        notes.append(_note(*CLOSED.split(": ", 1)))
    if report.interrupted:
        notes.append(_note("Interrupted", "The test was ended before its time; this is what was measured until then."))
    reasons = list(dict.fromkeys(why for one in report.runs for why in one.bottleneck))
    if reasons:
        listed = "".join(f"<li>{escape(why)}</li>" for why in reasons)
        notes.append(
            '<div class="note wrong"><b>The generator itself may be what was measured</b>'
            f"<ul>{listed}</ul><p>Use more processes, or a lower rate, before you trust these numbers.</p></div>"
        )
    wrong = [str(at) for at, one in enumerate(report.runs, 1) if not one.correct]
    if wrong and len(report.runs) > 1:
        notes.append(
            _note("Results are wrong", f"Calls were lost, doubled or mixed up in run {', '.join(wrong)}.", "wrong")
        )
    return "".join(notes)


def _note(head: str, text: str, kind: str = "") -> str:
    return f'<div class="note {kind}"><b>{escape(head)}</b><p>{escape(text[:1].upper() + text[1:])}</p></div>'


def _cards(run: Run) -> str:
    of = dict(rows(run.latency))
    offered = "" if run.offered is None else f"of {number_text(run.offered)} offered"
    lag = f"of a core; lag {time_text(run.lag_p99)} at p99"
    cards = [
        ("Achieved", f"{number_text(run.achieved)}/s", offered),
        ("Latency p50", time_text(of["p50"]), "50% are slower"),
        ("Latency p99", time_text(of["p99"]), "1% are slower"),
        ("Latency p99.9", time_text(of["p99.9"]), "0.1% are slower"),
        ("Latency max", time_text(of["max"]), "the longest"),
        ("Failed", share_text(run.failed, run.ok + run.failed), f"{run.failed:,} calls"),
        ("Generator", share_text(run.cpu, 1.0), lag),
    ]
    listed = "".join(f"<div><dt>{name}</dt><dd>{text}<small>{small}</small></dd></div>" for name, text, small in cards)
    return f'<dl class="cards">{listed}</dl>'


def _typical(runs: Sequence[Run]) -> int:
    """Which run has the median p99: the one that is shown in detail."""
    order = sorted(range(len(runs)), key=lambda at: runs[at].latency.percentiles.get("99", 0.0))
    return order[(len(order) - 1) // 2]


def _runs(runs: Sequence[Run], shown: int) -> str:
    columns: list[tuple[str, Callable[[Run], float | None], Callable[[float | None], str]]] = [
        ("Achieved /s", lambda run: run.achieved, number_text),
        *[(name, _point(name), time_text) for name in ("p50", "p99", "p99.9", "max")],
        ("Failed", lambda run: run.failed, number_text),
    ]
    head = _heads("Run", *(name for name, _, _ in columns))
    body = "".join(
        f'<tr><th scope="row">Run {at + 1}</th>'
        + "".join(f"<td>{text(of(run))}</td>" for _, of, text in columns)
        + "</tr>"
        for at, run in enumerate(runs)
    )
    known = [[value for run in runs if (value := of(run)) is not None] for _, of, _ in columns]
    foot = ""
    for name, how in (("Median", statistics.median), ("Least", min), ("Greatest", max)):
        cells = zip(known, columns, strict=True)
        foot += f'<tr><th scope="row">{name}</th>'
        foot += "".join(f"<td>{text(float(how(values)) if values else None)}</td>" for values, (_, _, text) in cells)
        foot += "</tr>"
    table = (
        '<div class="scroll" tabindex="0" role="region" aria-label="All runs"><table class="runs">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody><tfoot>{foot}</tfoot></table></div>"
    )
    curves = [curve(run.latency) for run in runs]
    lines = [
        Line("other runs" if at == min(set(range(len(runs))) - {shown}) else "", "thin", points)
        for at, points in enumerate(curves)
        if at != shown
    ]
    lines.append(Line(f"run {shown + 1}", "a", curves[shown]))
    plot = figure(
        "All runs: latency by percentile",
        "How far the runs are apart is how far a difference between two tests may be chance.",
        percentile_axis(max(run.latency.count for run in runs)),
        time_axis(lines),
        lines,
    )
    said = f"Run {shown + 1} is the one whose p99 is the median; what follows is about it."
    pair = f'<div class="pair top all"><div class="sheet">{table}</div>{plot}</div>'
    return f'<h2>{len(runs)} runs</h2><p class="quiet">{said}</p>{pair}'


def _point(name: str) -> Callable[[Run], float | None]:
    return lambda run: dict(rows(run.latency))[name]


def _latency(run: Run) -> str:
    said = "Latency from when a call was due; service time from when it was sent."
    if run.model == "closed":
        said = "In the closed model, latency is the service time: stalls are hidden."
    body = "".join(
        f'<tr><th scope="row">{name}</th><td>{time_text(latency)}</td><td>{time_text(service)}</td></tr>'
        for (name, latency), (_, service) in zip(rows(run.latency), rows(run.service_time), strict=True)
    )
    table = (
        f'<div class="sheet"><table><caption>Percentiles<span>{said}</span>'
        f"</caption><thead><tr>{_heads('Percentile', 'Latency', 'Service time')}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )
    lines = [Line("service time", "b", curve(run.service_time)), Line("latency", "a", curve(run.latency))]
    plot = figure(
        "Latency by percentile",
        "Of all calls, so many ended within this time; each mark to the right is ten times rarer.",
        percentile_axis(run.latency.count),
        time_axis(lines),
        lines,
    )
    model = f'<p class="quiet">{OPEN}</p>' if run.model == "open" else ""
    return f'<h2>Latency</h2>{model}<div class="pair">{table}{plot}</div>{_parts(run)}'


def _parts(run: Run) -> str:
    parts = [(name, part) for name in PARTS if (part := getattr(run, name)) is not None and part.count]
    if not parts:
        return ""
    whole = sum(part.mean for _, part in parts)
    body = ""
    for name, part in parts:
        share = share_text(part.mean, whole)
        width = 100 * max(0.0, part.mean) / whole if whole > 0 else 0.0
        body += (
            f'<tr><th scope="row">{name.capitalize()}<small>{share}</small><svg class="bar" viewBox="0 0 100 8" '
            f'preserveAspectRatio="none" role="img" aria-label="{share} of the mean"><rect class="all" width="100" '
            f'height="8"/><rect width="{width:.2f}" height="8"/></svg></th><td>{time_text(part.mean)}</td>'
            f"<td>{time_text(part.percentiles.get('50'))}</td><td>{time_text(part.percentiles.get('99'))}</td></tr>"
        )
    return (
        '<div class="sheet"><table class="parts"><caption>Where the time goes<span>Queue: from the client to the '
        "handler. Transport: what is left of the service time.</span></caption>"
        f"<thead><tr>{_heads('Part', 'Mean', 'p50', 'p99')}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _heads(*names: str) -> str:
    return "".join(f'<th scope="col">{name}</th>' for name in names)


def _over_time(run: Run) -> str:
    if not run.series:
        return ""

    def line(name: str, style: str, of: Callable[[Second], float | None], *, both: bool = False) -> Line:
        return Line(name, style, [(it.at + 0.5, of(it)) for it in run.series], both)

    x = second_axis(run.series)
    together = math.ceil(len(run.series) / CHUNKS)
    most = f" The greatest of each {together} seconds." if together > 1 else ""
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
        figure("Latency over time", "Of the calls that ended in each second." + most, x, time_axis(latency), latency),
        figure("Calls a second", "What was due, sent, and ended with a result." + both, x, count_axis(rate), rate),
    ]
    if any(it.depth is not None for it in run.series):
        depth = [line("waiting", "a", lambda it: it.depth)]
        plots.append(
            figure("Queue depth", "Requests that waited, at each second's end." + most, x, count_axis(depth), depth)
        )
    if any(it.failed for it in run.series):
        failed = [line("failed", "bars", lambda it: it.failed)]
        plots.append(
            figure("Errors", "Calls that ended with an error, in each second." + most, x, count_axis(failed), failed)
        )
    lag = [line("lag", "a", lambda it: it.lag)]
    about = "How late its event loop was, at most. Where this is high, the generator is what was measured." + most
    plots.append(figure("Lag of the generator", about, x, time_axis(lag), lag))
    return f'<h2>Over time</h2><div class="pair">{"".join(plots)}</div>'


def _by_rate(steps: Sequence[Step]) -> str:
    def line(name: str, style: str, of: Callable[[Step], float | None]) -> Line:
        return Line(name, style, [(it.rate, of(it)) for it in sorted(steps, key=lambda it: it.rate)])

    def latency(name: str) -> Callable[[Step], float | None]:
        return lambda step: dict(rows(step.latency))[name]

    asked = [it.rate for it in steps]
    x = linear_axis(asked, short_texts(asked), lambda value: f"{number_text(value)}/s", 1.0)
    times = [line("max", "c", latency("max")), line("p99", "b", latency("p99")), line("p50", "a", latency("p50"))]
    rates = [line("asked for", "wide", lambda it: it.rate), line("achieved", "a", lambda it: it.achieved)]
    plots = figure(
        "Latency by rate", "Where it rises steeply, the target has no more to give.", x, time_axis(times), times
    )
    plots += figure("Achieved by rate", "Calls that ended, a second.", x, count_axis(rates), rates)
    names = ("p50", "p90", "p99", "p99.9", "max")
    body = "".join(
        f'<tr><th scope="row">{number_text(it.rate)}</th><td>{number_text(it.seconds)} s</td>'
        f"<td>{number_text(it.achieved)}</td><td>{it.failed:,}</td>"
        + "".join(f"<td>{time_text(latency(name)(it))}</td>" for name in names)
        + "</tr>"
        for it in steps
    )
    head = _heads("Rate /s", "Lasted", "Achieved /s", "Failed", *names)
    table = (
        '<div class="scroll sheet" tabindex="0" role="region" aria-label="Rates"><table class="runs">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
    return f'<h2>By rate</h2><div class="pair">{plots}</div>{table}'


def _asked(report: Report) -> str:
    tables = "".join(
        f'<div class="sheet"><table class="names"><caption>{name}</caption><tbody>'
        + "".join(
            f'<tr><th scope="row">{escape(str(key))}</th><td class="mono">{escape(_text(value))}</td></tr>'
            for key, value in values.items()
        )
        + "</tbody></table></div>"
        for name, values in (("Settings", report.settings), ("Host", report.host))
        if values
    )
    return f'<h2>What was asked for, and where</h2><div class="pair top">{tables}</div>' if tables else ""


def _text(value: Any) -> str:
    """A setting for people."""
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

"""The report: numbers and plots, as a page in the look of `rpcq bench`. Pure."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from examples.black_friday.sampling import Sample, Times
from rpcq.bench.outputs import number_text, time_text
from rpcq.bench.plots import Axis, Line, Point, count_axis, figure, span_axis, time_axis
from rpcq.bench.sheet import Card, Section, sheet


@dataclass(frozen=True)
class Outcome:
    """A run that is over.

    Attributes:
        came: when each customer came, in seconds since the epoch, the first one first.
        answers: when each customer came whose order was taken, and the seconds until the answer.
        postponed: times that a customer was asked to come again.
        unanswered: customers whose connection broke.
        killed: whether a worker was killed.
        samples: what was seen meanwhile.
        times: the times of each order.
        faults: what does not add up in the books.
        settings: what was asked for, for the last table.

    """

    came: Sequence[float]
    answers: Sequence[tuple[float, float]]
    postponed: int
    unanswered: int
    killed: bool
    samples: Sequence[Sample]
    times: Mapping[str, Times]
    faults: Sequence[str]
    settings: Mapping[str, str]

    @property
    def began(self) -> float:
        """When the first customer came."""
        return self.came[0]

    @property
    def rush(self) -> float:
        """Seconds from the first order to the last one that was taken."""
        return max(it.taken for it in self.times.values()) - self.began

    @property
    def settled(self) -> float:
        """Seconds from the first order until the last customer was told."""
        return max(it.told for it in self.times.values() if it.told is not None) - self.began

    @property
    def verdict(self) -> str:
        """What came out."""
        if self.faults:
            return f"The books do not add up: {'; '.join(self.faults)}."
        return f"{len(self.times):,} orders taken, as many settled: none is lost, and no card was charged twice."


def percentile(values: Sequence[float], share: float) -> float:
    """The value that so many are not above, by the nearest rank; 0 for none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def oldest(times: Iterable[Times], moments: Sequence[float]) -> list[float]:
    """How old the oldest order is at each moment whose customer was not told yet; 0 if there is none."""
    every = sorted(times, key=lambda it: it.taken)
    ages = []
    for moment in moments:
        waits = (it.taken for it in every if it.taken <= moment and (it.told is None or it.told > moment))
        first = next(waits, None)
        ages.append(0.0 if first is None else moment - first)
    return ages


def _by_second(times: Iterable[float], began: float) -> dict[int, int]:
    counts: dict[int, int] = defaultdict(int)
    for at in times:
        counts[int(at - began)] += 1
    return counts


def _rate(name: str, style: str, times: Iterable[float], outcome: Outcome, seconds: int) -> Line:
    counts = _by_second(times, outcome.began)
    return Line(name, style, [(at + 0.5, float(counts.get(at, 0))) for at in range(seconds)], range=True)


def _spread(values: Iterable[tuple[float, float]], began: float) -> list[Line]:
    """Lines of the median and of the slowest 1 %, in milliseconds, of the values of each second."""
    seconds: dict[int, list[float]] = defaultdict(list)
    for at, value in values:
        seconds[int(at - began)].append(1000 * value)
    found = sorted(seconds.items())
    return [
        Line("p99", "b", [(at + 0.5, percentile(each, 0.99)) for at, each in found]),
        Line("p50", "a", [(at + 0.5, statistics.median(each)) for at, each in found]),
    ]


def page(outcome: Outcome) -> str:
    """The report as a page of HTML."""
    told = [it.told - it.taken for it in outcome.times.values() if it.told is not None]
    answers = [seconds for _, seconds in outcome.answers]
    peak = max((sum(it.waiting.values()) for it in outcome.samples), default=0)
    pools = sorted({name for it in outcome.samples for name in it.processes})
    most = {name: max(it.processes.get(name, 0) for it in outcome.samples) for name in pools}
    cards = [
        Card("Orders", f"{len(outcome.times):,}", f"taken in {number_text(round(outcome.rush))} s"),
        Card("All settled", time_text(1000 * outcome.settled), "after the first order"),
        Card("Answer p50", time_text(1000 * percentile(answers, 0.5)), "what a customer waits for"),
        Card("Answer p99", time_text(1000 * percentile(answers, 0.99)), "1% are slower"),
        Card("Settled p50", time_text(1000 * percentile(told, 0.5)), "from taken to told"),
        Card("Settled p99", time_text(1000 * percentile(told, 0.99)), "1% are slower"),
        Card("Deepest", f"{peak:,}", "events that wait, at most"),
        Card("Processes", " + ".join(str(most[name]) for name in pools), " + ".join(pools) + ", at most"),
        Card("Come again", f"{outcome.postponed:,}", "times that the shop was full"),
    ]
    facts = [f"{len(outcome.came):,} customers in {number_text(round(outcome.came[-1] - outcome.began))} s"]
    if outcome.killed:
        facts.append("1 worker killed")
    if outcome.unanswered:
        facts.append(f"connections of customers that broke: {outcome.unanswered}")
    return sheet(
        "Black Friday",
        facts,
        [
            Section(cards=cards),
            Section("Over time", plots=_plots(outcome)),
            Section("What was asked for", values=list(outcome.settings.items())),
        ],
        verdict=outcome.verdict,
        is_good=not outcome.faults,
    )


def _plots(outcome: Outcome) -> list[Markup]:
    seconds = int(outcome.settled) + 1
    x = span_axis(0.0, float(seconds))
    began, samples = outcome.began, [it for it in outcome.samples if 0 <= it.at - outcome.began <= seconds]
    every = outcome.times.values()
    rate = [
        _rate("came", "wide", outcome.came, outcome, seconds),
        _rate("taken", "b", (it.taken for it in every), outcome, seconds),
        _rate("settled", "a", (it.told for it in every if it.told is not None), outcome, seconds),
    ]
    services = sorted({name for it in samples for name in it.waiting if name})
    others = [name for name in services if name != "payment"]

    def line(name: str, style: str, of: Sequence[float]) -> Line:
        points: list[Point] = [(it.at - began, value) for it, value in zip(samples, of, strict=True)]
        return Line(name, style, points)

    depth = [
        line("outbox", "c", [float(it.outbox) for it in samples]),
        line("other services", "b", [float(sum(it.waiting.get(name, 0) for name in others)) for it in samples]),
        line("payment", "a", [float(it.waiting.get("payment", 0)) for it in samples]),
    ]
    pools = sorted({name for it in samples for name in it.processes}, reverse=True)
    processes = [
        line(name, style, [float(it.processes.get(name, 0)) for it in samples])
        for name, style in zip(pools, ("a", "b", "c"), strict=False)
    ]
    moments = [began + at for at in range(seconds)]
    age = [Line("age", "a", [(at - began, 1000 * it) for at, it in zip(moments, oldest(every, moments), strict=True)])]
    answer = _spread(outcome.answers, began)
    settled = _spread(((it.told, it.told - it.taken) for it in every if it.told is not None), began)

    def plot(head: str, about: str, y: Axis, lines: Sequence[Line]) -> Markup:
        return figure(head, about, x, y, lines, empty="nothing was measured")

    return [
        plot(
            "Orders a second",
            "Customers who came, orders that were taken, customers who were told.",
            count_axis(rate),
            rate,
        ),
        plot("What waits", "Events in the queues, and orders in the outbox, each second.", count_axis(depth), depth),
        plot(
            "Worker processes", "Of each pool: more when more waits for each process.", count_axis(processes), processes
        ),
        plot("Age", "Of the oldest order whose customer was not told yet.", time_axis(age), age),
        plot("How long a customer waits for an answer", "By when they came.", time_axis(answer), answer),
        plot("How long an order takes", "From taken to told, by when that was.", time_axis(settled), settled),
    ]

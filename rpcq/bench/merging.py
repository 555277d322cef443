"""Merges what several generators measured into one run. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Final

from hdrh.histogram import HdrHistogram

from rpcq.bench.echo import NonceRecord
from rpcq.bench.plan import Phase, Plan
from rpcq.bench.recording import Measured, Tally
from rpcq.bench.result import NOT_DONE, Distribution, Run, Second, Step, merged

BUSY: Final = 0.9
"""Share of a core. A generator that uses more is short of processor time."""

LAG: Final = 20.0
"""Milliseconds. A generator whose event loop is later than this at the 99th percentile is too slow."""


def merge_run(plan: Plan, found: Sequence[Measured], nonces: NonceRecord | None, depths: Mapping[int, int]) -> Run:
    """One run from the measurements of all generators.

    Args:
        plan: the plan of all generators together.
        found: measurements of each generator.
        nonces: what the handlers of the built-in echo saw; None if the target is another service.
        depths: number of the second -> depth of the queue.

    """
    phases = plan.phases
    histograms = {
        name: merged(HdrHistogram.decode(it.histograms[name].encode()) for it in found if name in it.histograms)
        for name in {name for it in found for name in it.histograms}
    }

    def spread(name: str) -> Distribution | None:
        return Distribution.of(histograms[name]) if name in histograms else None

    nothing = Distribution.of(merged([]))
    seconds = max(it.seconds for it in found)
    ended, sent = sum(it.ended for it in found), sum(it.sent for it in found)
    lag, errors = histograms.get("lag"), _total([it.errors for it in found])
    run = Run(
        model="open" if phases else "closed",
        began=datetime.fromtimestamp(min(it.began for it in found), UTC).isoformat(timespec="milliseconds"),
        seconds=round(seconds, 6),
        offered=_offered(phases, found, seconds),
        achieved=(ended - errors.get(NOT_DONE, 0)) / seconds if seconds else 0.0,
        sent=sent,
        ok=sum(it.ok for it in found),
        errors=errors,
        executed=_total([it.executed for it in found]),
        warm_up=sum(it.warm_up for it in found),
        checked=nonces is not None,
        lost=sent - ended,
        # What is told late of a job that is not watched any more is no second run of it.
        duplicated=(nonces.doubled if nonces is not None else 0) + sum(it.stray for it in found if not plan.is_job),
        mismatched=sum(it.mismatched for it in found),
        handled=None if nonces is None else nonces.runs,
        latency=spread("latency") or nothing,
        service_time=spread("service") or nothing,
        queue=spread("queue"),
        handler=spread("handler"),
        transport=spread("transport"),
        late=sum(it.late for it in found),
        dropped=sum(it.dropped for it in found),
        cpu=max(it.cpu / it.seconds if it.seconds else 0.0 for it in found),
        lag_p99=lag.get_value_at_percentile(99) / 1000 if lag is not None else 0.0,
        lag_max=lag.get_max_value() / 1000 if lag is not None else 0.0,
        bottleneck=(),
        series=_series(found, depths, is_open=bool(phases)),
        steps=_steps(phases, found, histograms),
        kind="jobs" if plan.is_job else "calls",
        confirm=(spread("confirm") or nothing) if plan.is_job else None,
    )
    return replace(run, bottleneck=tuple(_bottleneck(run)))


def merge_tallies(tallies: Sequence[Tally]) -> Tally:
    """The counts of one second of all generators together."""
    latencies = [HdrHistogram.decode(it.latency.encode()) for it in tallies if it.latency]
    return Tally(
        offered=sum(it.offered for it in tallies),
        sent=sum(it.sent for it in tallies),
        ok=sum(it.ok for it in tallies),
        failed=sum(it.failed for it in tallies),
        lag=max((it.lag for it in tallies), default=0.0),
        latency=merged(latencies).encode().decode() if latencies else "",
    )


def _total(counts: Sequence[Counter[str]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for it in counts:
        total.update(it)
    return dict(total)


def _offered(phases: Sequence[Phase], found: Sequence[Measured], seconds: float) -> float | None:
    """Calls a second that were due; None in the closed model, or if nothing was measured."""
    planned = sum(it.seconds for it in phases)
    measured_for = min(seconds, planned) if planned else seconds
    if not phases or not measured_for:
        return None
    return sum(tally.offered for it in found for tally in it.series.values()) / measured_for


def _series(found: Sequence[Measured], depths: Mapping[int, int], *, is_open: bool) -> tuple[Second, ...]:
    rows = []
    for second in range(1 + max((at for it in found for at in it.series), default=-1)):
        tally = merge_tallies([it.series[second] for it in found if second in it.series])
        spread = Distribution.of(HdrHistogram.decode(tally.latency.encode())) if tally.latency else None
        rows.append(
            Second(
                at=second,
                offered=tally.offered if is_open else None,
                sent=tally.sent,
                ok=tally.ok,
                failed=tally.failed,
                p50=spread.percentiles["50"] if spread else None,
                p99=spread.percentiles["99"] if spread else None,
                max=spread.max if spread else None,
                depth=depths.get(second),
                lag=tally.lag * 1000,
            )
        )
    return tuple(rows)


def _steps(
    phases: Sequence[Phase], found: Sequence[Measured], histograms: Mapping[str, HdrHistogram]
) -> tuple[Step, ...]:
    if len(phases) < 2:
        return ()
    steps, begins = [], 0.0
    for number, phase in enumerate(phases):
        steps.append(
            Step(
                rate=(phase.first + phase.last) / 2,
                begins=begins,
                seconds=phase.seconds,
                achieved=sum(it.ended_by_step.get(number, 0) for it in found) / phase.seconds,
                failed=sum(it.failed_by_step.get(number, 0) for it in found),
                latency=Distribution.of(histograms.get(f"step-{number}") or merged([])),
            )
        )
        begins += phase.seconds
    return tuple(steps)


def _bottleneck(run: Run) -> list[str]:
    """Why the generator may have limited the result, and not the target."""
    why = []
    if run.cpu > BUSY:
        why.append(f"a generator used {run.cpu:.0%} of a core; give it more with --processes")
    if run.lag_p99 > LAG:
        why.append(f"the event loop of a generator was {run.lag_p99:.0f} ms late at the 99th percentile")
    if run.dropped:
        why.append(f"{run.dropped} {run.kind} were not sent, because too many were under way")
    if run.late > 0.01 * max(run.sent, 1):
        why.append(f"{run.late} of {run.sent} {run.kind} were sent more than 10 ms after they were due")
    return why

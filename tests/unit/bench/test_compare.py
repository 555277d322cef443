"""Two reports of load tests beside each other: what changed, and what may be chance."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from rpcq.bench.compare import Change, Comparison, Verdict, compare, table
from rpcq.bench.result import Report
from support import bench_reports


def change(comparison: Comparison, name: str) -> Change:
    return next(it for it in comparison.changes if it.name == name)


def achieving(*rates: float) -> Report:
    return bench_reports.a_report(*[bench_reports.a_run(stall=None, achieved=rate) for rate in rates])


def shown(comparison: Comparison) -> str:
    console = Console(width=130, file=io.StringIO(), color_system=None)
    console.print(table(comparison, "before.json", "after[1].json"))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_all_measures_are_compared() -> None:
    names = [it.name for it in compare(bench_reports.repeated(2), bench_reports.repeated(2)).changes]
    points = ["p50", "p90", "p99", "p99.9", "max", "service p99"]
    assert names == ["achieved", *points, "errors", "queue p50", "handler p50", "transport p50"]


def test_the_medians_of_the_runs_are_what_is_compared() -> None:
    found = change(compare(achieving(100.0, 900.0, 110.0), achieving(220.0, 230.0, 10.0)), "achieved")
    assert found.a
    assert found.b
    assert (found.a.low, found.a.median, found.a.high, found.a.runs) == (100.0, 110.0, 900.0, 3)
    assert found.b.median == 220.0
    assert found.percent == pytest.approx(100.0)


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        ((100.0, 110.0), (120.0, 130.0), "better"),
        ((120.0, 130.0), (100.0, 110.0), "worse"),
        ((100.0, 120.0), (110.0, 130.0), "within noise"),
        ((100.0, 110.0), (110.0, 130.0), "within noise"),
        ((100.0, 130.0), (110.0, 120.0), "within noise"),
        ((100.0,), (200.0, 210.0), "unknown noise"),
        ((100.0, 110.0), (200.0,), "unknown noise"),
    ],
)
def test_a_higher_rate_is_better_unless_the_ranges_of_both_overlap(
    a: tuple[float, ...], b: tuple[float, ...], verdict: Verdict
) -> None:
    assert change(compare(achieving(*a), achieving(*b)), "achieved").verdict == verdict


def test_a_longer_time_is_worse() -> None:
    fast, slow = bench_reports.repeated(3), bench_reports.repeated(3, middle=2.4)
    assert change(compare(fast, slow), "p50").verdict == "worse"
    assert change(compare(slow, fast), "p50").verdict == "better"
    assert change(compare(fast, slow), "p50").percent == pytest.approx(100.0, abs=0.5)
    assert change(compare(fast, fast), "p50").verdict == "within noise"


def test_more_errors_are_worse_and_no_percentage_is_made_of_none() -> None:
    good = bench_reports.repeated(2)
    bad = bench_reports.a_report(bench_reports.a_run(1), bench_reports.a_run(2))
    found = change(compare(good, bad), "errors")
    assert (found.verdict, found.percent) == ("worse", None)
    assert found.b
    assert found.b.median == pytest.approx(100 * 40 / 120_000)
    assert "from 0" in shown(compare(good, bad))


def test_a_single_run_has_no_noise_that_is_known_and_the_fix_is_named() -> None:
    found = compare(bench_reports.a_report(), bench_reports.a_report())
    assert {it.verdict for it in found.changes} == {"unknown noise"}
    assert "--repeat 5" in found.warnings[-1]
    assert not compare(bench_reports.repeated(2), bench_reports.repeated(2)).warnings


def test_settings_and_hosts_that_differ_are_named_with_both_values() -> None:
    a = bench_reports.repeated(2)
    b = replace(a, settings={**a.settings, "payload": 1024, "extra": True}, host={**a.host, "cpus": 2})
    found = compare(a, b)
    assert found.settings == {"payload": (256, 1024), "extra": (None, True)}
    assert found.host == {"cpus": (8, 2)}
    assert found.warnings == (
        "the settings differ: payload 256 -> 1024, extra not set -> True",
        "the hosts differ: cpus 8 -> 2",
    )
    assert "the settings differ" in shown(found)


def test_models_that_differ_are_the_first_warning() -> None:
    found = compare(bench_reports.a_report(), bench_reports.a_report(bench_reports.closed(), concurrency=4))
    assert found.models == ("open", "closed")
    assert "the models differ (open, closed)" in found.warnings[0]
    both = compare(bench_reports.a_report(bench_reports.closed()), bench_reports.a_report(bench_reports.closed()))
    assert both.warnings[0] == "both use the closed model, which hides stalls"


def test_jobs_are_compared_by_their_confirms_too_and_not_with_calls() -> None:
    of_jobs = bench_reports.a_report(bench_reports.jobs())
    found = compare(of_jobs, of_jobs)
    assert {"confirmed", "confirm p50", "confirm p99"} <= {it.name for it in found.changes}
    assert not any("do not compare" in warning for warning in found.warnings)
    mixed = compare(bench_reports.a_report(), of_jobs)
    assert mixed.warnings[0] == "one is of calls and the other of jobs: their latencies do not compare"


def test_a_report_that_is_not_to_be_trusted_is_warned_of() -> None:
    bad = bench_reports.a_report(replace(bench_reports.stepped(), lost=1), interrupted=True)
    warnings = compare(bench_reports.a_report(), bad).warnings
    assert "the second was interrupted" in warnings
    assert "the second lost, duplicated or mixed up calls" in warnings
    assert any(warning.startswith("in the second, the generator itself") for warning in warnings)


def test_what_only_one_side_measured_is_not_judged_and_what_none_did_is_left_out() -> None:
    found = compare(bench_reports.a_report(), bench_reports.a_report(bench_reports.all_failed()))
    queue = change(found, "queue p50")
    assert queue.a
    assert (queue.b, queue.percent, queue.verdict) == (None, None, None)
    assert "not in both" in shown(found)
    none = compare(bench_reports.a_report(bench_reports.no_calls()), bench_reports.a_report(bench_reports.no_calls()))
    assert [it.name for it in none.changes] == ["achieved"]
    assert change(none, "achieved").percent is None


def test_reports_without_runs_can_be_compared() -> None:
    found = compare(Report({}, {}, ()), Report({}, {}, ()))
    assert (found.changes, found.models) == ((), ("", ""))
    assert "the models differ (none, open)" in compare(Report({}, {}, ()), bench_reports.a_report()).warnings[0]


def test_the_table_has_both_names_with_medians_and_ranges() -> None:
    text = shown(compare(achieving(1000.0, 1010.0, 1020.0), achieving(2000.0, 2010.0, 2020.0)))
    assert "before.json" in text
    assert "after[1].json" in text
    assert "1,010/s (1,000/s to 1,020/s)" in text
    assert "+99.0%" in text
    assert "better" in text


def test_a_comparison_can_be_printed_as_it_is() -> None:
    console = Console(width=130, file=io.StringIO(), color_system=None)
    console.print(compare(achieving(1000.0), achieving(2000.0)))
    assert isinstance(console.file, io.StringIO)
    assert "+100.0%" in console.file.getvalue()

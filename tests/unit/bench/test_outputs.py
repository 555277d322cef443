"""What a report of a load test is in the terminal, as CSV and as HdrHistogram's text; and what makes a test fail."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from rpcq.bench.outputs import (
    COLUMNS,
    Condition,
    number_text,
    share_text,
    subject,
    summary,
    time_text,
    write_csv,
    write_hgrm,
)
from rpcq.bench.result import Report, Run
from rpcq.errors import ConfigurationError
from support import bench_reports


def shown(run: Run, report: Report | None = None) -> str:
    console = Console(width=110, file=io.StringIO(), color_system=None)
    console.print(summary(run, report or bench_reports.a_report(run)))
    assert isinstance(console.file, io.StringIO)
    return re.sub(r"\s+", " ", console.file.getvalue())


# Numbers


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [
        (None, "-"),
        (0.0, "0 ms"),
        (0.001, "1 µs"),
        (0.0457, "45.7 µs"),
        (0.9994, "999 µs"),
        (0.9996, "1 ms"),
        (1.0, "1 ms"),
        (12.345, "12.3 ms"),
        (999.4, "999 ms"),
        (999.9, "1 s"),
        (1234.5, "1.23 s"),
        (3_600_000.0, "3,600 s"),
        (-2.5, "-2.5 ms"),
    ],
)
def test_a_time_has_three_digits_and_the_unit_that_fits(milliseconds: float | None, text: str) -> None:
    assert time_text(milliseconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (None, "-"),
        (0, "0"),
        (1234567, "1,234,567"),
        (1234.6, "1,235"),
        (99.94, "99.9"),
        (1.5, "1.5"),
        (2000.0, "2,000"),
    ],
)
def test_a_number_has_separators_of_thousands(number: float | None, text: str) -> None:
    assert number_text(number) == text


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [
        (0, 0, "-"),
        (0, 10, "0%"),
        (10, 10, "100%"),
        (1, 3, "33.3%"),
        (1, 1_000_000, "<0.01%"),
        (999_999, 1_000_000, ">99.9%"),
        (12, 1000, "1.2%"),
    ],
)
def test_a_share_is_never_rounded_to_nothing_or_to_all(part: int, whole: int, text: str) -> None:
    assert share_text(part, whole) == text


# The terminal


def test_the_summary_says_what_was_called_and_what_became_of_it() -> None:
    text = shown(bench_reports.a_run())
    assert "bench.echo at 2,000 calls/s" in text
    assert "1,999 calls/s achieved of 2,000 offered" in text
    assert "120,000 in 60 s, after 4,000 to warm up" in text
    assert "40 (0.03%): CallTimeout 31, Overloaded 9" in text
    assert "maybe 31, no 9" in text
    assert "lost 0, duplicated 0, mismatched 0" in text
    assert "Open model" in text


def test_the_summary_has_latency_and_service_time_side_by_side() -> None:
    run = bench_reports.a_run()
    text = shown(run)
    for name in ("50", "99", "99.99"):
        both = f"{time_text(run.latency.percentiles[name])} {time_text(run.service_time.percentiles[name])}"
        assert f"p{name} {both}" in text
    assert f"max {time_text(run.latency.max)} {time_text(run.service_time.max)}" in text


def test_the_summary_says_where_the_time_goes() -> None:
    text = shown(bench_reports.a_run(stall=None))
    assert re.search(r"queue \S+ µs 28%", text)
    assert re.search(r"handler \S+ µs 11%", text)
    assert re.search(r"transport \S+ µs 61%", text)
    assert "where the time goes" not in shown(bench_reports.all_failed())


def test_the_summary_of_the_closed_model_says_that_it_hides_stalls() -> None:
    text = shown(bench_reports.closed(), bench_reports.a_report(bench_reports.closed(), concurrency=16))
    assert "with 16 callers in a closed loop" in text
    assert "Closed model: it hides stalls" in text
    assert "latency (stalls hidden)" in text
    assert "offered" not in text


def test_the_summary_of_jobs_has_the_send_rate_the_confirms_and_what_was_not_done() -> None:
    run = bench_reports.jobs()
    assert run.confirm
    text = shown(run, bench_reports.a_report(run, target=None))
    assert "jobs at 2,000 jobs/s" in text
    assert "send rate 100 jobs/s confirmed of 2,000 offered" in text
    assert "rate 1,999 jobs/s ended of 2,000 offered" in text
    assert "done 119,960 (>99.9%)" in text
    assert "not done 38 in time, as far as their sender heard" in text
    assert "errors 40 (0.03%): not done 38, JobFailed attempts 1, SendError 1" in text
    assert "done twice 2, mismatched 0" in text
    three = [time_text(it.percentiles["99"]) for it in (run.latency, run.service_time, run.confirm)]
    assert f"p99 {' '.join(three)}" in text
    assert not re.search(r"\bcalls?\b", text)


def test_a_job_that_was_done_twice_is_counted_and_is_not_wrong() -> None:
    assert bench_reports.jobs(duplicated=2).correct
    assert not bench_reports.a_run(duplicated=2).correct
    assert not bench_reports.jobs(mismatched=1).correct


def test_the_summary_warns_of_a_generator_that_was_too_slow() -> None:
    run = bench_reports.stepped()
    text = shown(run, bench_reports.a_report(run, interrupted=True))
    assert "at 1,000 to 16,000 calls/s in 5 steps" in text
    assert "the generator itself may be what was measured: a generator used 97% of its core" in text
    assert "812 sent late, 11 not sent at all" in text
    assert "interrupted" in text


def test_the_summary_says_which_of_several_runs_it_is_about() -> None:
    report = bench_reports.repeated(3)
    assert "run 2 of 3" in shown(report.runs[1], report)
    assert "run 1 of" not in shown(bench_reports.a_run())


def test_the_summary_says_that_results_were_not_checked_or_are_wrong() -> None:
    assert "not checked" in shown(bench_reports.a_run(checked=False, handled=None))
    assert "lost 2, duplicated 0, mismatched 1" in shown(bench_reports.a_run(lost=2, mismatched=1))


@pytest.mark.parametrize("run", [bench_reports.no_calls(), bench_reports.one_second(), bench_reports.all_failed()])
def test_the_summary_of_a_run_with_hardly_anything_in_it_can_be_made(run: Run) -> None:
    assert "p99.99" in shown(run)


def test_markup_in_a_name_is_not_obeyed() -> None:
    run = bench_reports.a_run(errors={"[red]X[/red]": 40})
    assert "[red]X[/red] 40" in shown(run)


def test_a_report_without_runs_still_has_a_subject() -> None:
    assert subject(Report({"target": "a.b"}, {}, ())) == "a.b"
    assert subject(Report({}, {}, ())) == "calls"


# Files


def test_the_csv_has_a_line_a_second_and_nothing_where_nothing_is_known() -> None:
    run = bench_reports.a_run(stall=38)
    file = io.StringIO()
    write_csv(run, file)
    lines = list(csv.DictReader(io.StringIO(file.getvalue())))
    assert list(lines[0]) == list(COLUMNS)
    assert [int(line["at"]) for line in lines] == list(range(60))
    assert lines[38] == {**lines[38], "ok": "0", "p50_ms": "", "p99_ms": "", "max_ms": "", "depth": "2000"}
    assert float(lines[39]["max_ms"]) == 1020.0
    assert "\r" not in file.getvalue()


def test_the_csv_of_the_closed_model_has_no_offered_calls() -> None:
    file = io.StringIO()
    write_csv(bench_reports.closed(), file)
    assert {line["offered"] for line in csv.DictReader(io.StringIO(file.getvalue()))} == {""}


def test_the_csv_of_no_calls_has_only_its_header() -> None:
    file = io.StringIO()
    write_csv(bench_reports.no_calls(), file)
    assert file.getvalue() == ",".join(COLUMNS) + "\n"


def test_the_percentile_distribution_is_in_milliseconds_down_to_its_deviation() -> None:
    run = bench_reports.a_run(latency=bench_reports.spread([1.0] * 50 + [3.0] * 50))
    file = io.StringIO()
    write_hgrm(run, file)
    lines = file.getvalue().splitlines()
    assert lines[0].split() == ["Value", "Percentile", "TotalCount", "1/(1-Percentile)"]
    data = [line.split() for line in lines[2:] if not line.startswith("#")]
    assert [float(data[0][0]), float(data[-1][0])] == pytest.approx([1.0, 3.0], rel=0.001)
    assert data[-1][1:] == ["1.000000000000", "100"]
    mean, deviation = re.findall(r"= +([\d.]+)", next(line for line in lines if "StdDeviation" in line))
    assert [float(mean), float(deviation)] == pytest.approx([2.0, 1.0], rel=0.001)


def test_the_percentile_distribution_of_no_calls_is_empty() -> None:
    file = io.StringIO()
    write_hgrm(bench_reports.no_calls(), file)
    assert "#[Mean    =        0.000, StdDeviation   =        0.000]" in file.getvalue()


# Conditions


@pytest.mark.parametrize(
    ("text", "limit", "said"),
    [
        ("p99>50ms", 50.0, "p99 > 50 ms"),
        (" p50 >= 500us ", 0.5, "p50 >= 500 µs"),
        ("p99.99<1.5s", 1500.0, "p99.99 < 1.5 s"),
        ("max>0", 0.0, "max > 0 ms"),
        ("service_p99 <= 3 µs", 0.003, "service_p99 <= 3 µs"),
        ("queue_mean>2ms", 2.0, "queue_mean > 2 ms"),
        ("errors>0", 0.0, "errors > 0"),
        ("errors%>0.1%", 0.1, "errors% > 0.1%"),
        ("errors > 1%", 1.0, "errors% > 1%"),
        ("error_rate>=1", 1.0, "error_rate >= 1%"),
        ("achieved<1000/s", 1000.0, "achieved < 1000 /s"),
        ("achieved<1234567.5", 1234567.5, "achieved < 1234567.5 /s"),
        ("lost!=0", 0.0, "lost != 0"),
        ("dropped==.5", 0.5, "dropped == 0.5"),
    ],
)
def test_a_condition_is_read_with_its_unit_and_said_so_that_it_can_be_read_again(
    text: str, limit: float, said: str
) -> None:
    condition = Condition.parse(text)
    assert condition.limit == pytest.approx(limit)
    assert str(condition) == said
    again = Condition.parse(said)
    assert (again.measure, again.operator) == (condition.measure, condition.operator)
    assert again.limit == pytest.approx(limit)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "a condition must be like 'p99>50ms', with >=, <=, ==, !=, >, <; got ''"),
        ("p99", "a condition must be like 'p99>50ms'"),
        ("p99=50ms", "the operator must be one of >=, <=, ==, !=, >, <; got '='"),
        ("p99=>50ms", "the operator must be one of >=, <=, ==, !=, >, <; got '=>'"),
        ("p9>50ms", "got 'p9' in 'p9>50ms': did you mean 'p99'?"),
        ("speed>1", "the measure must be p50, p75"),
        (">1ms", "got '' in '>1ms'"),
        ("p99>", "the limit must be a number, like 'p99>50ms'; got ''"),
        ("p99>fast", "the limit must be a number, like 'p99>50ms'; got 'fast'"),
        ("p99>-1ms", "the limit must be a number, like 'p99>50ms'; got '-1ms'"),
        ("p99>nan", "the limit must be a number, like 'p99>50ms'; got 'nan'"),
        ("p99>50", "p99 must be a time in us, ms or s, like 'p99>50ms'; got no unit"),
        ("p99>50sec", "p99 must be a time in us, ms or s, like 'p99>50ms'; got the unit 'sec'"),
        ("p99>5%", "got the unit '%'"),
        ("lost>5ms", "lost must be a number of calls, like 'lost>0'; got the unit 'ms'"),
        ("achieved<5ms", "achieved must be a rate in calls a second, like 'achieved<1000/s'; got the unit 'ms'"),
        ("errors%>1ms", "errors% must be a share in %, like 'errors%>1%'; got the unit 'ms'"),
        ("p99>5ms>3ms", "got the unit 'ms>3ms'"),
    ],
)
def test_a_condition_that_is_wrong_says_what_is_wrong_and_what_would_be_right(text: str, words: str) -> None:
    with pytest.raises(ConfigurationError) as found:
        Condition.parse(text)
    assert words in str(found.value)
    assert repr(text) in str(found.value)


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("lost>1", True),
        ("lost>2", False),
        ("lost>=2", True),
        ("lost<3", True),
        ("lost<2", False),
        ("lost<=2", True),
        ("lost==2", True),
        ("lost!=2", False),
    ],
)
def test_each_operator_compares_as_its_sign_says(text: str, holds: bool) -> None:
    assert Condition.parse(text).holds(bench_reports.a_run(lost=2)) is holds


def test_a_condition_knows_its_value_in_a_run() -> None:
    run = bench_reports.a_run(late=3, dropped=4, duplicated=5, mismatched=6, lost=7)
    assert run.queue
    assert run.handler
    expected = {
        "p99>0": run.latency.percentiles["99"],
        "p99.9>0": run.latency.percentiles["99.9"],
        "mean>0": run.latency.mean,
        "max>0": run.latency.max,
        "service_p99>0": run.service_time.percentiles["99"],
        "queue_p50>0": run.queue.percentiles["50"],
        "handler_max>0": run.handler.max,
        "errors>0": 40,
        "errors%>0": 100 * 40 / 120_000,
        "error_rate>0": 100 * 40 / 120_000,
        "achieved>0": 1999.3,
        "offered>0": 2000.0,
        "late>0": 3,
        "dropped>0": 4,
        "duplicated>0": 5,
        "mismatched>0": 6,
        "lost>0": 7,
    }
    assert {text: Condition.parse(text).value(run) for text in expected} == pytest.approx(expected)


def test_a_condition_knows_its_value_in_a_run_of_jobs() -> None:
    run = bench_reports.jobs()
    assert run.confirm
    expected = {"confirm_p99>0": run.confirm.percentiles["99"], "confirmed>0": 100.0, "not_done>0": 38, "errors>0": 40}
    assert {text: Condition.parse(text).value(run) for text in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "run"),
    [
        ("p99>1s", bench_reports.no_calls()),
        ("errors%>50", bench_reports.no_calls()),
        ("offered<1", bench_reports.closed()),
        ("queue_p99>1s", bench_reports.all_failed()),
        ("confirm_p99>1s", bench_reports.one_second()),
        ("confirmed<1", bench_reports.one_second()),
        ("not_done>0", bench_reports.one_second()),
        ("lost>0", replace(bench_reports.one_second(), checked=False)),
    ],
)
def test_a_condition_holds_where_its_value_is_not_known_so_that_no_test_passes_for_want_of_it(
    text: str, run: Run
) -> None:
    condition = Condition.parse(text)
    assert condition.value(run) is None
    assert condition.holds(run)
    assert condition.text(condition.value(run)) == "not known"

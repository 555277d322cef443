"""A report as a page: what it says, that it needs no other file, and how it looks in a real browser."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from playwright.sync_api import Browser, Page

from rpcq.bench.page import page
from rpcq.bench.plots import CHUNKS, Line, curve, percentile_axis, second_axis, thin, time_axis
from rpcq.bench.result import Report, Second
from support import bench_reports
from support.programs import CONTRAST, launched

REPORTS = {
    "a stall": bench_reports.a_report,
    "several rates": lambda: bench_reports.a_report(bench_reports.stepped(), interrupted=True),
    "several runs": bench_reports.repeated,
    "closed": lambda: bench_reports.a_report(bench_reports.closed(), concurrency=16, rate=None),
    "an hour": lambda: bench_reports.a_report(bench_reports.an_hour()),
    "no calls": lambda: bench_reports.a_report(bench_reports.no_calls(), interrupted=True),
    "one second": lambda: bench_reports.a_report(bench_reports.one_second()),
    "all failed": lambda: bench_reports.a_report(bench_reports.all_failed()),
    "jobs": lambda: bench_reports.a_report(bench_reports.jobs(), target=None),
    "no runs": lambda: Report({}, {}, ()),
}


CONTRASTS = (
    f"() => {{{CONTRAST}"
    """
  const texts = [], lines = [];
  for (const element of document.querySelectorAll('body *')) {
    if (element.tagName === 'title' || getComputedStyle(element).display === 'none') continue;
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
    const style = getComputedStyle(element);
    if (own) texts.push([element.textContent, ratio(element, element.closest('svg') ? style.fill : style.color)]);
    if (element.matches('path.a, path.b, path.c, path.wide, path.thin, path.bars'))
      lines.push([element.getAttribute('class'), ratio(element, style.stroke)]);
  }
  return [texts, lines];
}"""
)
"""The contrast of each text and each line of a plot with its background, as WCAG 2 defines it."""

LABELS = """() => [...document.querySelectorAll('svg.plot')].flatMap(plot => {
  const [all, size] = [plot.getBoundingClientRect(), Number(plot.viewBox.baseVal.width)];
  const labels = [...plot.querySelectorAll('text')].filter(it => getComputedStyle(it).display !== 'none');
  const boxes = labels.map(it => [it.textContent, it.getBoundingClientRect()]);
  const wrong = [];
  for (const [text, box] of boxes) {
    if (box.left < all.left - 1 || box.right > all.right + 1 || box.top < all.top - 1 || box.bottom > all.bottom + 1)
      wrong.push(`cut: ${text}`);
  }
  for (const [i, [text, a]] of boxes.entries()) for (const [other, b] of boxes.slice(i + 1)) {
    // The boxes of lines have room above and below; letters meet where half of them do.
    const [x, y] = [Math.min(a.right, b.right) - Math.max(a.left, b.left),
                    Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top)];
    if (x > 0 && y > a.height / 3) wrong.push(`over one another: ${text}, ${other}`);
  }
  const letters = parseFloat(getComputedStyle(labels[0]).fontSize) * all.width / size;
  if (letters < 9) wrong.push(`letters of ${letters} px`);
  return wrong;
})"""
"""Labels of plots that are cut, overlap, or are too small."""


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return {name: page(report()) for name, report in REPORTS.items()}


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    with launched(chromium) as running:
        yield running


class Seen:
    """A page in the browser, with its requests and its complaints."""

    def __init__(self, browser: Browser, text: str, folder: Path, **how: Any) -> None:
        file = folder / "report.html"
        file.write_text(text, "utf-8")
        self.uri = file.as_uri()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page: Page = browser.new_page(**how)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(self.uri)


# What it says


def test_the_page_says_what_was_tested_and_how_it_went(pages: dict[str, str]) -> None:
    text = pages["a stall"]
    assert "<title>rpcq bench: bench.echo at 2,000 calls/s</title>" in text
    assert "<b>120,000</b> calls in 60 s: <b>119,960</b> ok" in text
    assert '<b class="bad">40 failed</b> (0.03%: CallTimeout 31, Overloaded 9; did they run: maybe 31, no 9)' in text
    assert "No call was lost, none ran twice, no result was mixed up." in text
    assert "Handlers saw 123,991 calls, warm-up included." in text
    for head in ("Latency by percentile", "Latency over time", "Calls a second", "Queue depth", "Errors", "Lag of the"):
        assert f"<h3>{head}" in text
    for setting in ("amqp://guest:***@localhost:5672/", "poisson", "1 process, prefetch 100", "RabbitMQ 4.0.5"):
        assert setting in text


def test_a_page_about_jobs_says_what_was_confirmed_and_what_was_done(pages: dict[str, str]) -> None:
    text = pages["jobs"]
    assert "<title>rpcq bench: jobs at 2,000 jobs/s</title>" in text
    assert "<b>120,000</b> jobs in 60 s: <b>119,960</b> done" in text
    assert "not done 38, JobFailed attempts 1, SendError 1; did they run: maybe 38, no 1, yes 1" in text
    assert "No result was mixed up.</span> Jobs that were done twice: 2." in text
    assert "<dt>Confirmed</dt><dd>100/s<small>of 2,000 offered</small>" in text
    assert "<dt>Confirm p99</dt>" in text
    assert re.search(r"<th scope=.col.>Service time</th><th scope=.col.>Confirm</th>", text)
    assert "until its sender heard that it was done" in text
    assert "<h3>Jobs a second" in text
    without_settings = re.sub(r"<h2>What was asked for.*", "", text, flags=re.DOTALL)
    assert not re.search(r"\bcalls?\b", re.sub(r"<style>.*</style>", "", without_settings, flags=re.DOTALL))


def test_plots_that_have_nothing_to_show_are_left_out(pages: dict[str, str]) -> None:
    assert "Queue depth" not in pages["closed"]
    assert "<h3>Errors" not in pages["closed"]
    assert "Over time" not in pages["no calls"]
    assert "Where the time goes" not in pages["all failed"]
    assert "By rate" not in pages["a stall"]


def test_the_closed_model_is_said_to_hide_stalls(pages: dict[str, str]) -> None:
    assert "<b>Closed model</b><p>It hides stalls." in pages["closed"]
    assert "latency is the service time: stalls are hidden" in pages["closed"]
    assert "Open model" not in pages["closed"]
    assert "Closed model" not in pages["a stall"]


def test_what_makes_the_numbers_doubtful_stands_at_the_top(pages: dict[str, str]) -> None:
    text = pages["several rates"]
    top = text[: text.index("Achieved")]
    assert "The generator itself may be what was measured" in top
    assert "<li>a generator used 97% of its core</li>" in top
    assert "<b>Interrupted</b>" in top
    assert 'class="note' not in pages["a stall"]


def test_wrong_results_are_said_in_words() -> None:
    wrong = bench_reports.a_run(lost=3)
    assert '<b class="bad">Results are wrong: lost 3, duplicated 0, mismatched 0.</b>' in page(
        bench_reports.a_report(wrong)
    )
    several = page(bench_reports.a_report(bench_reports.a_run(), wrong, bench_reports.a_run()))
    assert "Calls were lost, duplicated or mixed up in run 2." in several
    assert "not checked" in page(bench_reports.a_report(bench_reports.a_run(checked=False, handled=None)))


def test_several_runs_have_a_table_with_median_and_range_and_the_typical_one_is_shown(pages: dict[str, str]) -> None:
    text = pages["several runs"]
    assert text.count('<th scope="row">Run ') == 5
    median = text[text.index("Median</th>") : text.index("Least</th>")]
    assert re.findall(r"<td>([^<]*)</td>", median)[0] == "1,998"
    assert "Run 1 is the one whose p99 is the median" in text


def test_several_rates_have_a_table_and_plots_by_rate(pages: dict[str, str]) -> None:
    text = pages["several rates"]
    assert "<h3>Latency by rate</h3>" in text
    assert "<h3>Achieved by rate</h3>" in text
    assert '<th scope="row">16,000</th><td>10 s</td><td>11,189</td><td>300</td>' in text


def test_a_report_without_runs_is_a_page_too(pages: dict[str, str]) -> None:
    assert "There is no run in this report." in pages["no runs"]
    assert "No call was made." in pages["no calls"]


def test_what_comes_from_data_is_escaped() -> None:
    bad = "<script>alert(1)</script>\"'&$title"
    run = bench_reports.a_run(errors={bad: 40}, executed={bad: 40}, bottleneck=(bad,), began=bad)
    text = page(Report({"target": bad, bad: bad, "nested": {bad: [bad]}}, {bad: bad, "broker": bad}, (run, run)))
    assert "<script" not in text
    assert "$title" in text
    assert "\"'&" not in text


def test_the_plots_are_well_formed_and_say_in_words_what_they_show(pages: dict[str, str]) -> None:
    for text in pages.values():
        for drawn in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
            plot = ET.fromstring(drawn)
            assert plot.get("aria-hidden") == "true" or (plot.get("role") == "img" and plot.get("aria-label"))
            assert "nan" not in drawn
    assert re.search(
        r'aria-label="Latency over time: p50 1\.\S* ms to 410 ms, .*, max \S+ ms to 1\.02 s\."', pages["a stall"]
    )


# What it draws


def test_a_long_line_is_thinned_out_and_keeps_its_greatest_value() -> None:
    points = [(float(at), float(at % 50)) for at in range(3600)]
    points[1234] = (1234.0, 999.0)
    drawn = thin(points)
    assert len(drawn) <= CHUNKS
    assert max(y for _, y in drawn if y is not None) == 999.0
    assert [x for x, _ in drawn] == sorted(x for x, _ in drawn)
    assert thin(points[:CHUNKS]) == points[:CHUNKS]


def test_a_part_of_a_long_line_without_values_is_a_gap() -> None:
    points: list[tuple[float, float | None]] = [(float(at), None if 1000 <= at < 1100 else 1.0) for at in range(3600)]
    assert sum(y is None for _, y in thin(points)) in {6, 7, 8}


def test_the_greatest_latency_of_an_hour_is_drawn(pages: dict[str, str]) -> None:
    text = pages["an hour"]
    plot = text[text.index("<h3>Latency over time") : text.index("<h3>Calls a second")]
    drawn = next(d for d in re.findall(r'<path class="c" d="([^"]+)"', plot) if d != "M3 6H29")  # that is the legend's
    heights = sorted(float(y) for _, y in re.findall(r"([\d.]+) ([\d.]+)", drawn))
    assert len(heights) <= CHUNKS
    assert heights[0] < heights[1] - 50  # y grows downwards
    assert re.search(r"max \S+ ms to 4\.32 s", plot)


def test_the_distribution_ends_with_the_longest_call_and_is_never_falling() -> None:
    latency = bench_reports.a_run().latency
    drawn = curve(latency)
    values = [y for _, y in drawn if y is not None]
    assert values == sorted(values)
    assert values[-1] == latency.max
    at_99 = min(drawn, key=lambda point: abs(point[0] - 2))
    assert at_99[1] == pytest.approx(latency.percentiles["99"], rel=0.05)
    assert curve(bench_reports.empty()) == []


def test_an_axis_of_percentiles_has_a_mark_for_each_nine() -> None:
    assert [text for _, text in percentile_axis(10_000).marks] == ["0", "50", "90", "99", "99.9", "99.99"]
    assert [text for _, text in percentile_axis(0).marks] == ["0", "50", "90"]


def test_times_that_span_much_have_a_logarithmic_axis() -> None:
    def axis(*values: float | None) -> Any:
        return time_axis([Line("one", "a", [(float(at), value) for at, value in enumerate(values)])])

    assert axis(0.9, 1100.0).log
    assert [text for _, text in axis(0.9, 1100.0).marks] == ["1 ms", "10 ms", "100 ms", "1 s"]
    assert not axis(1.0, 9.0, None).log
    assert [text for _, text in axis(1.0, 9.0).marks] == ["0", "2 ms", "4 ms", "6 ms", "8 ms", "10 ms"]
    assert next(text for _, text in axis(0.0).marks) == "0"
    assert axis().high > axis().low
    assert 0.0 <= axis(0.0, 1.0, 1000.0).place(0.0) <= 1.0


def test_an_axis_of_seconds_is_in_minutes_where_it_is_long() -> None:
    def axis(count: int) -> Any:
        return second_axis([Second(at, 1, 1, 1, 0, 1.0, 1.0, 1.0, None, 0.0) for at in range(count)])

    assert [text for _, text in axis(1).marks] == ["0 s", "1 s"]
    assert [text for _, text in axis(60).marks][-1] == "60 s"
    assert [text for _, text in axis(3600).marks][-1] == "60 min"


# In a browser


@pytest.mark.parametrize("name", REPORTS)
def test_the_page_asks_for_nothing_complains_of_nothing_and_fits_any_screen(
    browser: Browser, pages: dict[str, str], tmp_path: Path, name: str
) -> None:
    seen = Seen(browser, pages[name], tmp_path, viewport={"width": 1200, "height": 800})
    try:
        for width in (1200, 768, 360, 320):
            seen.page.set_viewport_size({"width": width, "height": 800})
            for media, scheme in (("screen", "light"), ("screen", "dark"), ("print", "dark")):
                seen.page.emulate_media(media=media, color_scheme=scheme)  # type: ignore[arg-type]
                sizes = seen.page.evaluate(
                    "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
                )
                assert media == "print" or sizes[0] <= sizes[1], (width, media)
                boxes = seen.page.evaluate(
                    "[...document.querySelectorAll('svg')].map(it => it.getBoundingClientRect())"
                    ".map(it => [it.width, it.height])"
                )
                assert all(wide > 0 and tall > 0 for wide, tall in boxes), (width, media)
        assert seen.requests == [seen.uri]
        assert seen.complaints == []
    finally:
        seen.page.close()


@pytest.mark.parametrize(("media", "scheme"), [("screen", "light"), ("screen", "dark"), ("print", "dark")])
@pytest.mark.parametrize("name", ["a stall", "several runs"])
def test_all_text_and_all_lines_stand_out_from_what_is_under_them(
    browser: Browser, pages: dict[str, str], tmp_path: Path, name: str, media: Any, scheme: Any
) -> None:
    seen = Seen(browser, pages[name], tmp_path)
    try:
        seen.page.emulate_media(media=media, color_scheme=scheme)
        texts, lines = seen.page.evaluate(CONTRASTS)
        assert len(texts) > 100
        assert [(text, ratio) for text, ratio in texts if ratio < 4.5] == []
        assert lines
        assert [(line, ratio) for line, ratio in lines if ratio < 3.0] == []
    finally:
        seen.page.close()


@pytest.mark.parametrize("width", [1200, 360])
@pytest.mark.parametrize("name", ["a stall", "several rates", "an hour"])
def test_the_labels_of_plots_are_whole_apart_and_large_enough(
    browser: Browser, pages: dict[str, str], tmp_path: Path, name: str, width: int
) -> None:
    seen = Seen(browser, pages[name], tmp_path, viewport={"width": width, "height": 800})
    try:
        assert seen.page.evaluate(LABELS) == []
    finally:
        seen.page.close()


def test_nothing_is_cut_on_paper(browser: Browser, pages: dict[str, str], tmp_path: Path) -> None:
    # A4 in portrait, without its margins, has 688 CSS pixels.
    for name in ("a stall", "several rates", "several runs"):
        seen = Seen(browser, pages[name], tmp_path, viewport={"width": 688, "height": 1000})
        try:
            seen.page.emulate_media(media="print")
            cut = seen.page.evaluate(
                "[...document.querySelectorAll('svg.plot, table, .cards')]"
                ".filter(it => it.getBoundingClientRect().right > it.closest('main').getBoundingClientRect().right + 1)"
                ".map(it => it.outerHTML.slice(0, 80))"
            )
            assert cut == []
            assert seen.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
            assert seen.page.pdf(format="A4").startswith(b"%PDF")
        finally:
            seen.page.close()


def heard(server: socket.socket) -> list[bytes]:
    """What clients send to the server, until no client has connected for half a second."""
    found = []
    with contextlib.suppress(TimeoutError):
        while True:
            connection, _ = server.accept()
            with connection:
                connection.settimeout(0.5)
                # Chromium connects for a frame before it checks whether it may load it, and then sends nothing.
                with contextlib.suppress(TimeoutError):
                    if said := connection.recv(1000):
                        found.append(said)
    return found


def test_even_a_page_with_something_smuggled_in_reaches_nobody_and_runs_nothing(
    browser: Browser, pages: dict[str, str], tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        there = f"http://127.0.0.1:{server.getsockname()[1]}"
        smuggled = (
            f'<img src="{there}/a.png"><script src="{there}/b.js"></script><link rel="stylesheet" href="{there}/c.css">'
            f'<script>document.title = "it ran"; fetch("{there}/d")</script><iframe src="{there}/e"></iframe>'
        )
        seen = Seen(browser, pages["one second"].replace("</main>", smuggled + "</main>"), tmp_path)
        try:
            assert heard(server) == []
            assert "it ran" not in seen.page.title()
            assert len(seen.complaints) >= 5
        finally:
            seen.page.close()


def test_the_page_is_read_with_headings_tables_and_figures(
    browser: Browser, pages: dict[str, str], tmp_path: Path
) -> None:
    seen = Seen(browser, pages["several rates"], tmp_path)
    try:
        assert seen.page.evaluate("document.documentElement.lang") == "en"
        levels = seen.page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(it => Number(it.tagName[1]))")
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after - before <= 1 for before, after in pairwise(levels))
        assert seen.page.evaluate("[...document.querySelectorAll('th')].every(it => it.scope)")
        assert seen.page.evaluate(
            "[...document.querySelectorAll('figure')].every(it => it.querySelector('figcaption'))"
        )
        assert seen.page.locator("svg.plot").count() == seen.page.get_by_role("img", name=re.compile(": ")).count()
    finally:
        seen.page.close()


def test_the_run_that_is_shown_is_that_with_the_median_p99() -> None:
    runs = [bench_reports.a_run(1, None, middle) for middle in (3.0, 1.0, 2.0)]
    text = page(bench_reports.a_report(*[replace(run, achieved=float(at)) for at, run in enumerate(runs)]))
    assert "Run 3 is the one whose p99 is the median" in text

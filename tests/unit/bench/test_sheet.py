"""A page of plots: what stands on it, and that nothing of it is markup."""

from __future__ import annotations

import re

from rpcq.bench.plots import Line, figure, linear_axis, span_axis
from rpcq.bench.sheet import Card, Section, sheet


def a_plot(*values: float | None) -> str:
    lines = [Line("depth", "d", [(float(at), value) for at, value in enumerate(values)])]
    y = linear_axis([value for value in values if value is not None], str, str, 0.0)
    return figure("Depth", "What waits.", span_axis(0.0, 10.0), y, lines, empty="no data")


def test_a_sheet_has_its_facts_cards_plots_and_values_and_needs_no_other_file() -> None:
    section = Section("Queues", "By name.", [Card("Waiting", "7", "now")], [a_plot(1.0, 2.0)], [("prefetch", "4")])
    text = sheet("A run", ["one", "two"], [section], verdict="All is well.")
    for said in ("<h1>A run</h1>", "one · two", "<h2>Queues</h2>", "By name.", "Waiting", "What waits.", "prefetch"):
        assert said in text
    assert '<span class="good">All is well.</span>' in text
    assert re.findall(r'(?:src|href)="(?!data:)', text) == []
    assert ".d { stroke" in text


def test_a_sheet_leaves_out_parts_with_nothing_in_them_and_says_where_a_plot_has_no_data() -> None:
    text = sheet("A run", [], [Section("Nothing", "At all."), Section("", "", plots=[a_plot(None, None)])])
    assert "Nothing" not in text
    assert "no data" in text
    assert "verdict" not in text.partition("</style>")[2]


def test_names_and_texts_on_a_sheet_are_no_markup() -> None:
    section = Section("<i>", "<b>", [Card("<u>", "<s>")], values=[("<p>", "<q>")])
    body = sheet("<script>", ["<a>"], [section], verdict="<em>", is_good=False).partition("<main>")[2]
    for tag in ("<i>", "<b>", "<u>", "<s>", "<p>", "<q>", "<script>", "<a>", "<em>"):
        assert tag not in body
    assert 'class="bad"' in body

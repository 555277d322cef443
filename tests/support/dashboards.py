"""Grafana's dashboard without Grafana: its queries, asked of a real Prometheus, and its panels as plots.

Grafana itself cannot be had from PyPI or Debian. This draws what each panel's queries give, with its title, unit and
legend, and says nothing of how Grafana lays them out:

    PYTHONPATH=.:tests python tests/support/dashboards.py http://127.0.0.1:9090 --minutes 3 dashboard.png
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from markupsafe import Markup

from rpcq.bench.outputs import number_text, time_text
from rpcq.bench.plots import Line, figure, linear_axis, span_axis
from rpcq.bench.sheet import Card, Section, sheet
from support.harness import to_stderr
from support.programs import CHROMIUM, launched

ROOT: Final = Path(__file__).parents[2]
DASHBOARD: Final = ROOT / "docker/observe/grafana/dashboards/rpcq.json"
RATE_INTERVAL: Final = "20s"
"""What `$__rate_interval` is in Grafana with a scrape interval of 5 s."""

STYLES: Final = ("a", "b", "c", "d", "e", "wide", "thin")
MOST_LINES: Final = len(STYLES)
"""Lines of a plot; a panel with more shows those that are highest."""


@dataclass(frozen=True)
class Query:
    """A query of a panel."""

    row: str
    panel: str
    expression: str
    legend: str
    unit: str


def read() -> dict[str, Any]:
    """The dashboard."""
    found: dict[str, Any] = json.loads(DASHBOARD.read_text("utf-8"))
    return found


def by_row(dashboard: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The panels of each row, as Grafana groups them: those that come after it."""
    row, panels = "", list[dict[str, Any]]()
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            if panels:
                yield row, panels
            row, panels = panel["title"], []
        else:
            panels.append(panel)
    yield row, panels


def queries(dashboard: dict[str, Any]) -> list[Query]:
    """All queries of all panels."""
    return [
        Query(row, panel["title"], it["expr"], it["legendFormat"], panel["fieldConfig"]["defaults"]["unit"])
        for row, panels in by_row(dashboard)
        for panel in panels
        for it in panel["targets"]
    ]


def expanded(expression: str, rate_interval: str = RATE_INTERVAL, service: str = ".*") -> str:
    """A query with Grafana's variables replaced, as Grafana does before it asks."""
    text = expression.replace("$__rate_interval", rate_interval).replace("$service", service)
    assert "$" not in text, f"a variable that is not known here: {text}"
    return text


class Prometheus:
    """The HTTP interface of a Prometheus.

    Args:
        base: its address.

    """

    def __init__(self, base: str) -> None:
        self._base = base

    def ask(self, path: str, **parameters: object) -> Any:
        """Ask `/api/v1/PATH`: the data of the response."""
        data = urllib.parse.urlencode({name: str(value) for name, value in parameters.items()})
        with urllib.request.urlopen(f"{self._base}/api/v1/{path}?{data}", timeout=30) as response:
            document = json.load(response)
        assert document["status"] == "success", document
        return document["data"]

    def now(self, expression: str) -> list[dict[str, Any]]:
        """The series of an instant query."""
        found: list[dict[str, Any]] = self.ask("query", query=expression)["result"]
        return found

    def over(self, expression: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
        """The series of a range query."""
        found: list[dict[str, Any]] = self.ask("query_range", query=expression, start=start, end=end, step=step)[
            "result"
        ]
        return found


def legend(text: str, labels: dict[str, str]) -> str:
    """The name of a series, as Grafana makes it."""
    return re.sub(r"\{\{ *(\w+) *\}\}", lambda it: labels.get(it[1], ""), text)


def shown(value: float, unit: str) -> str:
    """A value with the unit of its panel."""
    match unit:
        case "s":
            return time_text(1000 * value)
        case "percentunit":
            return f"{100 * value:.2g} %"
        case "bytes":
            return f"{value / 1e6:,.0f} MB"
        case "reqps" | "ops":
            return f"{value:.3g}/s"
        case _:
            return number_text(round(value, 2))


def draw(dashboard: dict[str, Any], prometheus: Prometheus, start: float, end: float) -> str:
    """All panels as a page of HTML."""
    sections = []
    for row, panels in by_row(dashboard):
        stats = [it for it in panels if it["type"] == "stat"]
        graphs = [it for it in panels if it["type"] == "timeseries"]
        sections.append(
            Section(
                row,
                cards=[_card(it, prometheus, end) for it in stats],
                plots=[_plot(it, prometheus, start, end) for it in graphs],
            )
        )
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(end))
    return sheet(f"{dashboard['title']}: the panels, without Grafana", [when, f"{(end - start) / 60:g} min"], sections)


def _card(panel: dict[str, Any], prometheus: Prometheus, at: float) -> Card:
    (target,) = panel["targets"]
    found = prometheus.ask("query", query=expanded(target["expr"]), time=at)["result"]
    unit = panel["fieldConfig"]["defaults"]["unit"]
    return Card(panel["title"], shown(float(found[0]["value"][1]), unit) if found else "no data")


def _plot(panel: dict[str, Any], prometheus: Prometheus, start: float, end: float) -> Markup:
    unit, step = panel["fieldConfig"]["defaults"]["unit"], max(1.0, (end - start) / 200)
    places = [start + at * step for at in range(int((end - start) / step) + 1)]
    found: list[tuple[str, list[tuple[float, float | None]]]] = []
    for target in panel["targets"]:
        for series in prometheus.over(expanded(target["expr"]), start, end, step):
            values = {round(float(at), 1): float(value) for at, value in series["values"]}
            at_places = [(at - start, _finite(values.get(round(at, 1)))) for at in places]
            found.append((legend(target["legendFormat"], series["metric"]), at_places))
    found.sort(key=lambda it: max((y for _, y in it[1] if y is not None), default=0.0), reverse=True)
    about = panel["description"]
    if len(found) > MOST_LINES:
        about += f" Shown: {MOST_LINES} of {len(found)}."
    lines = [Line(name, style, points) for style, (name, points) in zip(STYLES, found, strict=False)]
    values = [y for line in lines for _, y in line.points if y is not None]
    y = linear_axis(values, lambda it: shown(it, unit), lambda it: shown(it, unit), 0.0)
    return figure(panel["title"], about, span_axis(0.0, end - start), y, lines[::-1], empty="no data")


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the dashboard, as HTML or as a picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prometheus", help="its address")
    parser.add_argument("path", type=Path, help="what to write: *.html or *.png")
    parser.add_argument("--minutes", type=float, default=3.0, help="how long back (default: 3)")
    parser.add_argument("--rows", nargs="*", help="rows to show; default: all")
    parser.add_argument("--width", type=int, default=1180, help="of the picture, in pixels (default: 1180)")
    asked = parser.parse_args(arguments)
    dashboard, end = read(), time.time()
    if asked.rows:
        kept = [(row, panels) for row, panels in by_row(dashboard) if row in asked.rows]
        dashboard["panels"] = [it for row, panels in kept for it in ({"type": "row", "title": row}, *panels)]
    text = draw(dashboard, Prometheus(asked.prometheus), end - 60 * asked.minutes, end)
    if asked.path.suffix == ".html":
        asked.path.write_text(text, "utf-8")
        return
    with tempfile.NamedTemporaryFile("w", suffix=".html", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        with launched(CHROMIUM.find(to_stderr)) as browser:
            page = browser.new_page(viewport={"width": asked.width, "height": 800}, color_scheme="light")
            page.goto(f"file://{file.name}")
            page.screenshot(path=asked.path, full_page=True)


if __name__ == "__main__":
    main(sys.argv[1:])

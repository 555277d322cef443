"""What the two models of load see of a stall: a worker that stands still for two seconds of ten.

    RPCQ_URL=amqp://guest:guest@localhost/ python -m benchmarks.stall --folder docs/assets

The open model makes 500 calls a second of the built-in echo, which takes 10 ms each; the closed one has 5 callers,
who make nearly as many where nothing stalls. Prints what each found, and draws both.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # it ships no types

from rpcq.bench.plots import Line, count_axis, curve, figure, percentile_axis, second_axis, time_axis
from rpcq.bench.result import Run, read_report

MODELS = {"open": ("--rate", "500"), "closed": ("--concurrency", "5")}
NAMES = {"open": "open model: 500 calls a second", "closed": "closed model: 5 callers"}
STYLES = (("closed", "b"), ("open", "a"))
STALL = 2.0
STYLE = """
text{fill:#57606a;font:13px system-ui,sans-serif}.y{text-anchor:end}.x{text-anchor:middle}
.grid{stroke:#e8ebef;fill:none}.axis{stroke:#d8dde3;fill:none}.a{stroke:#0b5cad;stroke-width:2.25;fill:none}
.b{stroke:#b54708;stroke-width:2;stroke-dasharray:7 4.5;fill:none}circle.a{fill:#0b5cad}.tip{fill:transparent}
"""


def measure(model: str, folder: Path) -> Run:
    """One run, with the worker stopped from its third second on."""
    path = folder / f"{model}.json"
    arguments = [*MODELS[model], "--duration", "10s", "--simulate", "10ms", "--json", str(path)]
    with subprocess.Popen(
        [sys.executable, "-m", "rpcq", "bench", *arguments], stderr=subprocess.PIPE, text=True
    ) as bench:
        assert bench.stderr is not None
        for line in bench.stderr:
            sys.stderr.write(f"{model}: {line}")
            if line.startswith("3/10 s"):
                children = psutil.Process(bench.pid).children(recursive=True)
                (worker,) = [it for it in children if "rpcq.bench.echo" in it.cmdline()]
                os.kill(worker.pid, signal.SIGSTOP)
                time.sleep(STALL)
                os.kill(worker.pid, signal.SIGCONT)
    assert bench.returncode == 0, bench.returncode
    (run,) = read_report(path.read_bytes(), path.name).runs
    return run


def by_percentile(runs: dict[str, Run]) -> str:
    """How long calls took, by percentile."""
    lines = [Line(NAMES[model], style, curve(runs[model].latency)) for model, style in STYLES]
    axis = percentile_axis(max(it.latency.count for it in runs.values()))
    return alone(figure("Latency by percentile", "", axis, time_axis(lines), lines), lines)


def over_time(runs: dict[str, Run]) -> str:
    """How many calls ended in each second."""
    lines = [
        Line(
            NAMES[model],
            style,
            [(second.at + 0.5, float(second.ok)) for second in runs[model].series if second.at < 10],
        )
        for model, style in STYLES
    ]
    axis = second_axis([second for second in runs["open"].series if second.at < 10])
    return alone(figure("Calls that ended in each second", "", axis, count_axis(lines), lines), lines)


def alone(page: str, lines: list[Line]) -> str:
    """A plot as an SVG that needs no page."""
    inside = re.search(r'<svg class="plot" viewBox="0 0 (\d+) (\d+)" role="img" (aria-label="[^"]*")>(.*)</svg>', page)
    assert inside is not None
    wide, high, label, content = inside.groups()
    high = int(high) + 36
    key = "".join(
        f'<path class="{line.style}" d="M{at} -14h30"/><text x="{at + 38}" y="-10">{line.name}</text>'
        for line, at in zip(reversed(lines), (84, 350), strict=True)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 -36 {wide} {high}" role="img" {label}>'
        f'<style>{STYLE}</style><rect y="-36" width="{wide}" height="{high}" fill="#fff"/>{key}{content}</svg>\n'
    )


def main() -> None:
    """Measure both, print, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where two plots go, as SVG")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = {model: measure(model, Path(folder)) for model in MODELS}
    for model, run in runs.items():
        found = {"sent": run.sent, "ok": run.ok, **run.latency.percentiles, "max": run.latency.max}
        print(model, json.dumps({name: round(value, 1) for name, value in found.items()}))
    if asked.folder is not None:
        for name, draw in (("stall-by-percentile", by_percentile), ("stall-over-time", over_time)):
            (asked.folder / f"{name}.svg").write_text(draw(runs), encoding="utf-8")


if __name__ == "__main__":
    main()

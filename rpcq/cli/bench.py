"""`rpcq bench`: load tests, and what changed between two of them."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console

from rpcq import logs
from rpcq.cli.calling import read_parameters
from rpcq.cli.options import FAILED, WORKER, Level, LogLevel, Namespace, Url
from rpcq.environment import broker_url
from rpcq.errors import ConfigurationError
from rpcq.runtime.process import run
from rpcq.url import mask
from rpcq.wire import bodies

EXTRA: Final = "rpcq bench needs the package hdrhistogram: pip install 'rpcq[bench]'"

_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)?\Z")
_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, None: 1.0}
_SIZE: Final = re.compile(r"(\d+)(B|kB|KB|KiB|MB|MiB)?\Z")
_SIZES: Final = {"B": 1, "kB": 1000, "KB": 1000, "KiB": 1024, "MB": 1000**2, "MiB": 1024**2, None: 1}

output = Console(highlight=False)
progress = Console(stderr=True, highlight=False)


class Arrivals(StrEnum):
    """When the calls of the open model are due."""

    CONSTANT = "constant"
    POISSON = "poisson"


class QueueType(StrEnum):
    """The request queue of the built-in echo."""

    CLASSIC = "classic"
    QUORUM = "quorum"


def duration(text: str) -> float:
    """Seconds of "500ms", "30s", "2m", "1h" or "30"."""
    found = _DURATION.match(text)
    if not found:
        raise typer.BadParameter(f"{text!r} is no time; write 500ms, 30s, 2m or 1h")
    return float(found[1]) * _UNITS[found[2]]


def size(text: str) -> int:
    """Bytes of "100", "10kB" or "1MiB"."""
    found = _SIZE.match(text)
    if not found:
        raise typer.BadParameter(f"{text!r} is no size; write 100, 10kB or 1MiB")
    return int(found[1]) * _SIZES[found[2]]


Times = Annotated[float, typer.Option(parser=duration, metavar="TIME")]


def bench(
    target: Annotated[
        str | None,
        typer.Argument(
            help="What to call: service.method. Without it, a built-in echo service is brought up, and checked. "
            "Or: compare A.json B.json."
        ),
    ] = None,
    parameters: Annotated[
        list[str] | None, typer.Argument(help="key=value for each parameter by name, or values by position.")
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(min=0.001, help="The open model: calls a second, sent when they are due.", show_default="1000"),
    ] = None,
    length: Annotated[
        float | None,
        typer.Option("--duration", parser=duration, metavar="TIME", help="How long, or each step.", show_default="10s"),
    ] = None,
    arrivals: Annotated[
        Arrivals, typer.Option(help="Calls are due at even distances, or at random as of independent callers.")
    ] = Arrivals.CONSTANT,
    ramp: Annotated[
        float, typer.Option(parser=duration, metavar="TIME", help="Begin with no calls, and grow to the rate in it.")
    ] = "0",  # type: ignore[assignment]  # read by `duration`
    step: Annotated[
        str | None, typer.Option(help="Several rates in turn: FROM:TO:BY, each for the duration.", metavar="A:B:C")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="The closed model: callers, each of which waits for its answer.")
    ] = None,
    calls: Annotated[
        int | None, typer.Option("-n", "--calls", min=1, help="How many calls the closed model makes.")
    ] = None,
    warm_up: Annotated[
        float, typer.Option("--warmup", parser=duration, metavar="TIME", help="Load before it counts.")
    ] = "1s",  # type: ignore[assignment]
    timeout: Annotated[float, typer.Option(parser=duration, metavar="TIME", help="That each call has.")] = "30s",  # type: ignore[assignment]
    idempotent: Annotated[bool, typer.Option("--idempotent", help="Calls may be sent again.")] = False,
    payload: Annotated[
        int, typer.Option(parser=size, metavar="SIZE", help="Text that each call of the built-in echo carries.")
    ] = "0",  # type: ignore[assignment]
    params_file: Annotated[
        Path | None, typer.Option(help="JSON lines: the parameters of each call in turn, as objects.")
    ] = None,
    in_flight: Annotated[
        int, typer.Option(min=1, help="Calls that may be under way at once; more are dropped, and counted.")
    ] = 100_000,
    processes: Annotated[int, typer.Option(min=1, max=100, help="Generators of load.")] = 1,
    workers: Annotated[int, typer.Option(min=1, max=100, help="Processes of the built-in echo.")] = 1,
    prefetch: Annotated[int, typer.Option(min=1, help="Of each of them.")] = WORKER.prefetch,
    simulate: Annotated[
        float, typer.Option(parser=duration, metavar="TIME", help="How long the built-in echo takes.")
    ] = "0",  # type: ignore[assignment]
    queue_type: Annotated[QueueType, typer.Option(help="Of the built-in echo.")] = QueueType.CLASSIC,
    seed: Annotated[int, typer.Option(help="Of random arrivals.")] = 0,
    repeat: Annotated[int, typer.Option(min=1, max=100, help="Runs, to tell differences from noise.")] = 1,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the report as JSON; - for the output.")
    ] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write a line for each second.")] = None,
    hgrm_file: Annotated[Path | None, typer.Option("--hgrm", help="Write the latencies by percentile.")] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="Write a page with plots.")] = None,
    fail_if: Annotated[
        list[str] | None, typer.Option(help="End with exit code 1 if it is so: 'p99>50ms', 'errors>0'; several times.")
    ] = None,
    url: Url = None,
    namespace: Namespace = None,
    log_level: LogLevel = Level.ERROR,
) -> None:
    """Load-test a service, or a broker with a built-in echo.

    The open model (--rate, --step, --ramp) sends calls when they are due, and counts latency from then: a stall shows.
    The closed model (--concurrency) waits for answers, and so hides stalls: it tells throughput.
    """
    logs.configure(log_level.upper())
    try:
        from rpcq.bench.conducting import LoadTest  # noqa: PLC0415 - an extra
        from rpcq.bench.outputs import Condition  # noqa: PLC0415
        from rpcq.bench.plan import Phase  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ConfigurationError(EXTRA) from error
    if target == "compare":
        _compare(parameters or [])
        return
    if target is not None and "." not in target:
        raise ConfigurationError(f"the target is {target!r}; it is service.method, or nothing for the built-in echo")
    if concurrency is None and calls is not None:
        raise ConfigurationError("-n is of the closed model: say --concurrency too")
    if concurrency is not None and (rate is not None or step is not None or ramp):
        raise ConfigurationError("--concurrency is the closed model, and --rate, --step and --ramp the open one")
    conditions = [Condition.parse(text) for text in fail_if or ()]
    for path in (json_file, csv_file, hgrm_file, html_file):
        _check_writable(path)
    args, params = read_parameters(parameters or [])
    seconds = 10.0 if length is None else length
    phases = () if concurrency is not None else tuple(Phase(*it) for it in _phases(rate or 1000.0, step, ramp, seconds))
    test = LoadTest(
        url=broker_url(url),
        namespace=namespace or "rpcq",
        target=target,
        args=tuple(args),
        params=params,
        lines=() if params_file is None else _lines(params_file),
        payload=payload,
        timeout=timeout,
        idempotent=idempotent,
        warm_up=warm_up,
        phases=phases,
        arrivals=arrivals.value,
        seed=seed,
        concurrency=concurrency or 0,
        calls=calls,
        seconds=None if calls is not None and length is None else seconds,
        in_flight=in_flight,
        processes=processes,
        workers=workers,
        prefetch=prefetch,
        simulate=simulate,
        queue_type=queue_type.value,
    )
    _check(test)
    report = run(_measure(test, repeat))
    _write(report, json_file, csv_file, hgrm_file, html_file)
    failed = [f"{it}: it is {it.text(it.value(one))}" for it in conditions for one in report.runs if it.holds(one)]
    if any(one.checked and not one.correct for one in report.runs):
        failed.append("calls were lost, doubled or mixed up")
    for why in dict.fromkeys(failed):
        progress.print(f"[red]failed:[/] {why}")
    if failed:
        raise typer.Exit(FAILED)
    if report.interrupted:
        raise typer.Exit(130)


async def _measure(test: Any, repeat: int) -> Any:
    from rpcq.bench.conducting import Conductor, host  # noqa: PLC0415
    from rpcq.bench.result import Report  # noqa: PLC0415

    runs: list[Any] = []
    told = _Progress(test)
    loop = asyncio.get_running_loop()
    interrupted = False
    where = await host(test.url)
    for number in range(repeat):
        told.begin(number + 1, repeat)
        conductor = Conductor(test, told.second)

        def stop(conductor: Conductor = conductor) -> None:
            nonlocal interrupted
            interrupted = True
            conductor.stop()

        for number_of_signal in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number_of_signal, stop)
        try:
            with told:
                runs.append(await conductor.run())
        finally:
            for number_of_signal in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number_of_signal)
        if interrupted:
            break
    return Report(settings=_settings(test, repeat), host=where, runs=tuple(runs), interrupted=interrupted)


class _Progress:
    """How it goes: a line that changes on a terminal, a line a second elsewhere."""

    def __init__(self, test: Any) -> None:
        self._test = test
        self._live = progress.status("") if progress.is_terminal else None
        self._title = ""
        self._sent = self._ok = self._failed = 0

    def begin(self, number: int, of: int) -> None:
        self._title = f"run {number} of {of}: " if of > 1 else ""
        self._sent = self._ok = self._failed = 0
        if self._live is not None:
            self._live.update(f"{self._title}starting")

    def __enter__(self) -> None:
        if self._live is not None:
            self._live.start()

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def second(self, second: int, tally: Any, depth: int | None) -> None:
        from hdrh.histogram import HdrHistogram  # noqa: PLC0415

        self._sent += tally.sent
        self._ok += tally.ok
        self._failed += tally.failed
        spread = HdrHistogram.decode(tally.latency.encode()) if tally.latency else None
        p50, p99 = (spread.get_value_at_percentile(it) / 1000 if spread else 0.0 for it in (50, 99))
        planned = sum(it.seconds for it in self._test.phases) or self._test.seconds
        of = f"/{planned:g}" if planned else ""
        waiting = "" if depth is None else f", {depth:,} waiting"
        offered = f"{tally.offered:,} due, " if self._test.phases else ""
        self._say(
            f"{second + 1}{of} s: {offered}{tally.ok + tally.failed:,} ended, {tally.failed:,} failed, "
            f"p50 {p50:.2f} ms, p99 {p99:.2f} ms{waiting}; in all {self._ok:,} ok, {self._failed:,} failed"
        )

    def _say(self, text: str) -> None:
        if self._live is not None:
            self._live.update(self._title + text)
        else:
            progress.print(self._title + text, soft_wrap=True)


def _write(
    report: Any, json_file: Path | None, csv_file: Path | None, hgrm_file: Path | None, html: Path | None
) -> None:
    from rpcq.bench import outputs  # noqa: PLC0415

    last = report.runs[-1]
    if json_file is not None and str(json_file) == "-":
        sys.stdout.write(report.to_json().decode() + "\n")
    else:
        for one in report.runs:
            output.print(outputs.summary(one, report))
    if json_file is not None and str(json_file) != "-":
        json_file.write_bytes(report.to_json())
    if csv_file is not None:
        with csv_file.open("w", encoding="utf-8", newline="") as file:
            outputs.write_csv(last, file)
    if hgrm_file is not None:
        with hgrm_file.open("w", encoding="utf-8") as file:
            outputs.write_hgrm(last, file)
    if html is not None:
        from rpcq.bench.page import page  # noqa: PLC0415

        html.write_text(page(report), encoding="utf-8")


def _compare(files: Sequence[str]) -> None:
    from rpcq.bench.compare import compare, table  # noqa: PLC0415
    from rpcq.bench.result import read_report  # noqa: PLC0415

    if len(files) != 2:
        raise ConfigurationError("rpcq bench compare takes two reports: A.json B.json")
    reports = []
    for name in files:
        try:
            reports.append(read_report(Path(name).read_bytes(), name))
        except OSError as error:
            raise ConfigurationError(f"{name} cannot be read: {error.strerror}") from error
    output.print(table(compare(*reports), *files))


def _phases(rate: float, step: str | None, ramp: float, seconds: float) -> list[tuple[float, float, float]]:
    if step is not None:
        found = re.fullmatch(r"(\d+(?:\.\d+)?):(\d+(?:\.\d+)?):(\d+(?:\.\d+)?)", step)
        first, last, by = (float(it) for it in found.groups()) if found else (0.0, 0.0, 0.0)
        if not (0 < first <= last and by > 0):
            raise ConfigurationError(f"--step is {step!r}; it is FROM:TO:BY in calls a second, as in 1000:20000:1000")
        rates = [first + by * number for number in range(int((last - first) / by + 1e-9) + 1)]
    else:
        rates = [rate]
    begin = [(0.0, rates[0], ramp)] if ramp else []
    return begin + [(it, it, seconds) for it in rates]


def _lines(path: Path) -> tuple[dict[str, Any], ...]:
    found = []
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"--params-file {path} cannot be read: {error.strerror}") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = bodies.loads(line)
        except ValueError as error:
            raise ConfigurationError(f"line {number} of {path} is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise ConfigurationError(f"line {number} of {path} is no object of parameters by name")
        found.append(value)
    if not found:
        raise ConfigurationError(f"{path} has no line")
    return tuple(found)


def _check(test: Any) -> None:
    """What does not go together."""
    if test.target is None and (test.args or test.params or test.lines):
        raise ConfigurationError("parameters are for a target; the built-in echo has its own (--payload)")
    if test.lines and (test.args or test.params):
        raise ConfigurationError("parameters come from the command line or from --params-file, not from both")
    if test.target is not None and (test.payload or test.simulate or test.workers > 1):
        raise ConfigurationError("--payload, --simulate and --workers are of the built-in echo; the target has its own")
    if test.in_memory and (test.processes > 1 or test.workers > 1 or test.target is not None):
        raise ConfigurationError("memory:// is inside this process: one generator, one worker, and the built-in echo")


def _check_writable(path: Path | None) -> None:
    """Before minutes of measuring, and not after them."""
    if path is not None and str(path) != "-":
        try:
            path.open("a").close()
        except OSError as error:
            raise ConfigurationError(f"{path} cannot be written: {error.strerror}") from error


def _settings(test: Any, repeat: int) -> dict[str, Any]:
    found = asdict(test)
    found["url"] = mask(test.url)
    found["model"] = "open" if test.phases else "closed"
    found["lines"] = len(test.lines)
    found["repeat"] = repeat
    return found

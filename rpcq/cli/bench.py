"""`rpcq bench`: load tests, and comparisons of two of them."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
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
from rpcq.runtime.distribution import missing
from rpcq.runtime.process import run
from rpcq.url import mask
from rpcq.wire import bodies

EXTRA: Final = missing("rpcq bench", "hdrhistogram", "bench")
PAGE_EXTRA: Final = missing("--html", "jinja2", "bench")

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
    """Seconds, from a text such as "500ms", "30s", "2m", "1h" or "30"."""
    found = _DURATION.match(text)
    if not found:
        raise typer.BadParameter(f"must be a time such as 500ms, 30s, 2m or 1h; got {text!r}")
    return float(found[1]) * _UNITS[found[2]]


def size(text: str) -> int:
    """Bytes, from a text such as "100", "10kB" or "1MiB"."""
    found = _SIZE.match(text)
    if not found:
        raise typer.BadParameter(f"must be a size such as 100, 10kB or 1MiB; got {text!r}")
    return int(found[1]) * _SIZES[found[2]]


def bench(  # long: each parameter is an option of the command, and typer reads them from here
    target: Annotated[
        str | None,
        typer.Argument(
            help="The method to call: service.method; with --job, the job to send. Without it, rpcq starts a built-in "
            "echo service and checks its results. Or: compare A.json B.json."
        ),
    ] = None,
    parameters: Annotated[
        list[str] | None, typer.Argument(help="Parameters: key=value by name, or values by position.")
    ] = None,
    is_job: Annotated[
        bool, typer.Option("--job", help="Send jobs, and measure until they are confirmed and done. Open model only.")
    ] = False,
    rate: Annotated[
        float | None,
        typer.Option(min=0.001, help="Open model: calls a second, each sent when it is due.", show_default="1000"),
    ] = None,
    length: Annotated[
        float | None,
        typer.Option(
            "--duration",
            parser=duration,
            metavar="TIME",
            help="Length of the test, or of each step.",
            show_default="10s",
        ),
    ] = None,
    arrivals: Annotated[
        Arrivals, typer.Option(help="Open model: calls at even distances, or at random as from independent callers.")
    ] = Arrivals.CONSTANT,
    ramp: Annotated[
        float, typer.Option(parser=duration, metavar="TIME", help="Open model: time in which the rate rises from 0.")
    ] = "0",  # type: ignore[assignment]  # read by `duration`
    step: Annotated[
        str | None,
        typer.Option(help="Open model: several rates in turn, FROM:TO:BY, each for the duration.", metavar="A:B:C"),
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Closed model: callers, each of which waits for its reply.")
    ] = None,
    calls: Annotated[
        int | None, typer.Option("-n", "--calls", min=1, help="Closed model: number of calls to make.")
    ] = None,
    warm_up: Annotated[
        float, typer.Option("--warmup", parser=duration, metavar="TIME", help="Time of load before measuring begins.")
    ] = "1s",  # type: ignore[assignment]
    timeout: Annotated[
        float,
        typer.Option(parser=duration, metavar="TIME", help="Timeout of each call, or of each job until it is done."),
    ] = "30s",  # type: ignore[assignment]
    idempotent: Annotated[
        bool, typer.Option("--idempotent", help="Mark the calls as idempotent: they may be sent again.")
    ] = False,
    payload: Annotated[
        int, typer.Option(parser=size, metavar="SIZE", help="Size of the text in each call of the built-in echo.")
    ] = "0",  # type: ignore[assignment]
    params_file: Annotated[
        Path | None, typer.Option(help="File of JSON lines: an object with the parameters of each call in turn.")
    ] = None,
    in_flight: Annotated[
        int, typer.Option(min=1, help="Most calls under way at once; further ones are dropped and counted.")
    ] = 100_000,
    processes: Annotated[int, typer.Option(min=1, max=100, help="Number of load generators.")] = 1,
    workers: Annotated[int, typer.Option(min=1, max=100, help="Number of worker processes of the built-in echo.")] = 1,
    prefetch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Prefetch limit of each worker of the built-in echo.",
            show_default=f"{WORKER.prefetch}; with --job {WORKER.job_prefetch}",
        ),
    ] = None,
    simulate: Annotated[
        float, typer.Option(parser=duration, metavar="TIME", help="How long the handler of the built-in echo takes.")
    ] = "0",  # type: ignore[assignment]
    queue_type: Annotated[
        QueueType | None,
        typer.Option(help="Type of the request queue of the built-in echo.", show_default="classic; of jobs quorum"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of random arrivals.")] = 0,
    repeat: Annotated[
        int, typer.Option(min=1, max=100, help="Number of runs; several show how much results vary by chance.")
    ] = 1,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the report as JSON; - for standard output.")
    ] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write CSV, with a line for each second.")] = None,
    hgrm_file: Annotated[
        Path | None, typer.Option("--hgrm", help="Write latency by percentile, as HdrHistogram's text.")
    ] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="Write a page of HTML with plots.")] = None,
    fail_if: Annotated[
        list[str] | None, typer.Option(help="Exit with code 1 if this holds: 'p99>50ms', 'errors>0'. May be repeated.")
    ] = None,
    url: Url = None,
    namespace: Namespace = None,
    log_level: LogLevel = Level.ERROR,
) -> None:
    """Load-test a service, or a broker with a built-in echo.

    The open model (--rate, --step, --ramp) sends calls when they are due and counts latency from then: it shows stalls.
    The closed model (--concurrency) waits for replies, and so hides stalls: it measures throughput.
    With --job, it sends jobs instead of making calls, and watches them until they are done.
    """
    logs.configure(log_level.upper())
    _check_extra(html_file)
    if target == "compare":
        _compare(parameters or [])
        return
    from rpcq.bench.conducting import LoadTest  # noqa: PLC0415 - an extra
    from rpcq.bench.plan import Phase, Plan  # noqa: PLC0415

    if target is not None and "." not in target:
        raise ConfigurationError(f"the target must be service.method, or omitted for the built-in echo; got {target!r}")
    if concurrency is None and calls is not None:
        raise ConfigurationError("-n is an option of the closed model: it needs --concurrency")
    if concurrency is not None and (rate is not None or step is not None or ramp):
        raise ConfigurationError("--concurrency is the closed model; --rate, --step and --ramp are the open model")
    if is_job:
        _check_job(concurrency, queue_type, idempotent=idempotent)
    conditions = _conditions(fail_if or ())
    files = _Files(json_file, csv_file, hgrm_file, html_file)
    files.check_writable()
    args, params = read_parameters(parameters or [])
    seconds = 10.0 if length is None else length
    phases = [] if concurrency is not None else _phases(rate or 1000.0, step, ramp, seconds)
    plan = Plan(
        target=target or "",
        url=broker_url(url),
        namespace=namespace or "rpcq",
        args=tuple(args),
        params=params,
        lines=() if params_file is None else _lines(params_file),
        payload=payload,
        timeout=timeout,
        idempotent=idempotent,
        warm_up=warm_up,
        phases=tuple(Phase(*it) for it in phases),
        arrivals=arrivals.value,
        seed=seed,
        concurrency=concurrency or 0,
        calls=calls,
        seconds=None if calls is not None and length is None else seconds,
        in_flight=in_flight,
        processes=processes,
        checks=target is None,
        is_job=is_job,
    )
    queue = queue_type or (QueueType.QUORUM if is_job else QueueType.CLASSIC)
    most = prefetch or (WORKER.job_prefetch if is_job else WORKER.prefetch)
    test = LoadTest(plan=plan, workers=workers, prefetch=most, simulate=simulate, queue_type=queue.value)
    _check_test(test)
    report = run(_measure(test, repeat))
    files.write(report)
    _exit_unless_good(report, conditions)


def _check_extra(html_file: Path | None) -> None:
    """Check that the packages of the extra are installed: before the test, because it may take minutes."""
    try:
        import rpcq.bench.conducting  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as error:
        raise ConfigurationError(EXTRA) from error
    if html_file is not None:
        try:
            import rpcq.bench.page  # noqa: F401, PLC0415
        except ModuleNotFoundError as error:
            raise ConfigurationError(PAGE_EXTRA) from error


def _conditions(texts: Sequence[str]) -> list[Any]:
    from rpcq.bench.outputs import Condition  # noqa: PLC0415

    return [Condition.parse(text) for text in texts]


def _exit_unless_good(report: Any, conditions: Sequence[Any]) -> None:
    """Exit with 1 if a condition holds or results are wrong, with 130 after an interruption."""
    failed = [
        f"{it}: the value is {it.text(it.value(one))}" for it in conditions for one in report.runs if it.holds(one)
    ]
    if any(one.checked and not one.correct for one in report.runs):
        failed.append(f"{report.runs[0].kind} were lost, duplicated or mixed up")
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
    shown = _Progress(test.plan)
    interrupted = False
    where = await host(test.plan.url)
    for number in range(repeat):
        shown.begin(number + 1, repeat)
        conductor = Conductor(test, shown.second)
        with shown, _stopped_by_signals(conductor):
            runs.append(await conductor.run())
        interrupted = conductor.interrupted
        if interrupted:
            break
    return Report(settings=_settings(test, repeat), host=where, runs=tuple(runs), interrupted=interrupted)


@contextmanager
def _stopped_by_signals(conductor: Any) -> Iterator[None]:
    """Meanwhile, SIGINT and SIGTERM end the run early."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, conductor.stop)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


class _Progress:
    """Shows the progress of a run: on a terminal, one line that changes; elsewhere, a line for each second."""

    def __init__(self, plan: Any) -> None:
        self._plan = plan
        self._live = progress.status("") if progress.is_terminal and not progress.is_dumb_terminal else None
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
        planned = sum(it.seconds for it in self._plan.phases) or self._plan.seconds
        of = f"/{planned:g}" if planned else ""
        waiting = "" if depth is None else f", {depth:,} waiting"
        offered = f"{tally.offered:,} due, " if self._plan.phases else ""
        self._say(
            f"{second + 1}{of} s: {offered}{tally.ok + tally.failed:,} ended, {tally.failed:,} failed, "
            f"p50 {p50:.2f} ms, p99 {p99:.2f} ms{waiting}; total {self._ok:,} ok, {self._failed:,} failed"
        )

    def _say(self, text: str) -> None:
        if self._live is not None:
            self._live.update(self._title + text)
        else:
            progress.print(self._title + text, soft_wrap=True)


@dataclass(frozen=True, slots=True)
class _Files:
    """Where the report goes; None for files that are not written, `-` for JSON on standard output."""

    json: Path | None
    csv: Path | None
    hgrm: Path | None
    html: Path | None

    def check_writable(self) -> None:
        """Check it before the test, because the test may take minutes."""
        for path in (self.json, self.csv, self.hgrm, self.html):
            if path is not None and str(path) != "-":
                try:
                    path.open("a").close()
                except OSError as error:
                    raise ConfigurationError(f"{path} cannot be written: {error.strerror}") from error

    def write(self, report: Any) -> None:
        """Print the report, and write the files."""
        from rpcq.bench import outputs  # noqa: PLC0415

        last = report.runs[-1]
        if self.json is not None and str(self.json) == "-":
            sys.stdout.write(report.to_json().decode() + "\n")
        else:
            for one in report.runs:
                output.print(outputs.summary(one, report))
        if self.json is not None and str(self.json) != "-":
            self.json.write_bytes(report.to_json())
        if self.csv is not None:
            with self.csv.open("w", encoding="utf-8", newline="") as file:
                outputs.write_csv(last, file)
        if self.hgrm is not None:
            with self.hgrm.open("w", encoding="utf-8") as file:
                outputs.write_hgrm(last, file)
        if self.html is not None:
            from rpcq.bench.page import page  # noqa: PLC0415

            self.html.write_text(page(report), encoding="utf-8")


def _compare(files: Sequence[str]) -> None:
    from rpcq.bench.compare import compare, table  # noqa: PLC0415
    from rpcq.bench.result import read_report  # noqa: PLC0415

    if len(files) != 2:
        raise ConfigurationError("rpcq bench compare needs two reports: A.json B.json")
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
            raise ConfigurationError(
                f"--step must be FROM:TO:BY in calls a second, such as 1000:20000:1000; got {step!r}"
            )
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
            raise ConfigurationError(
                f"line {number} of {path} must be an object of parameters by name; got {type(value).__name__}"
            )
        found.append(value)
    if not found:
        raise ConfigurationError(f"--params-file must have a line for at least one call; got none in {path}")
    return tuple(found)


def _check_job(concurrency: int | None, queue_type: QueueType | None, *, idempotent: bool) -> None:
    """Check the options that jobs do not have."""
    if concurrency is not None:
        raise ConfigurationError("--job is for the open model: give --rate or --step instead of --concurrency")
    if queue_type is QueueType.CLASSIC:
        raise ConfigurationError("jobs wait in quorum queues only: leave out --queue-type")
    if idempotent:
        raise ConfigurationError("--idempotent is for calls: each job has a key of its own; leave it out with --job")


def _check_test(test: Any) -> None:
    """Check that the options can be combined."""
    plan, is_echo = test.plan, test.plan.checks
    if is_echo and (plan.args or plan.params or plan.lines):
        raise ConfigurationError("parameters need a target; the built-in echo has parameters of its own (--payload)")
    if plan.lines and (plan.args or plan.params):
        raise ConfigurationError("parameters must come from the command line or from --params-file; got both")
    if not is_echo and (plan.payload or test.simulate or test.workers > 1):
        raise ConfigurationError("--payload, --simulate and --workers are for the built-in echo only; got a target")
    if test.in_memory and (plan.processes > 1 or test.workers > 1 or not is_echo):
        raise ConfigurationError("memory:// is inside this process: one generator, one worker, and the built-in echo")


def _settings(test: Any, repeat: int) -> dict[str, Any]:
    """The settings of the report, in the order in which the page shows them."""
    plan = test.plan
    found = {"url": mask(plan.url), "namespace": plan.namespace, "target": None if plan.checks else plan.target}
    hidden = {"number", "checks"}
    found |= {name: value for name, value in asdict(plan).items() if name not in {*found, *hidden}}
    found |= {name: value for name, value in asdict(test).items() if name != "plan"}
    return found | {"lines": len(plan.lines), "model": "open" if plan.phases else "closed", "repeat": repeat}

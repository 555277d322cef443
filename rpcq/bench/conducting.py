"""Conducts a load test: brings up target and generators, watches the queue, and puts together what they found."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import secrets
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, Final, Literal

from hdrh.histogram import HdrHistogram

from rpcq.bench.echo import METHOD, Seen, echo_service, read_seen
from rpcq.bench.generator import Generator, Measured, Tally, read_measured
from rpcq.bench.plan import Phase, Plan
from rpcq.bench.result import Distribution, Run, Second, Step, merged
from rpcq.client import Client
from rpcq.errors import BrokerError, RpcqError
from rpcq.options import ClientOptions
from rpcq.transport.memory.transport import MemoryBroker
from rpcq.transport.rabbitmq.admin import Admin, open_admin
from rpcq.url import parse
from rpcq.wire.topology import Topology
from rpcq.worker import Worker

READY: Final = 30.0
"""Seconds that processes have to start and connect."""

BUSY: Final = 0.9
"""Of a core, from when on a generator is short of it."""

LAG: Final = 20.0
"""Milliseconds that the loop of a generator may be late, in all but one of a hundred looks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadTest:
    """What is to be measured.

    Attributes:
        url: the broker's.
        namespace: of the service, or where the built-in echo is served.
        target: `service.method`; None for the built-in echo.
        args: parameters by position.
        params: parameters by name.
        lines: parameters by name of each call in turn, instead.
        payload: bytes of text that each call of the built-in echo carries.
        timeout: seconds that each call has.
        idempotent: whether the calls say so.
        warm_up: seconds of load before it counts.
        phases: the rates of the open model; empty for the closed one.
        arrivals: "constant" or "poisson".
        seed: of the latter.
        concurrency: callers of the closed model.
        calls: how many the closed model makes; None for as many as there is time for.
        seconds: how long the closed model lasts; None for until `calls` are made.
        in_flight: calls that may be under way at once.
        processes: generators.
        workers: processes of the built-in echo.
        prefetch: of each of them.
        simulate: seconds that its handler takes.
        queue_type: of its request queue.

    """

    url: str
    namespace: str = "rpcq"
    target: str | None = None
    args: tuple[Any, ...] = ()
    params: Mapping[str, Any] = field(default_factory=dict)
    lines: tuple[dict[str, Any], ...] = ()
    payload: int = 0
    timeout: float = 30.0
    idempotent: bool = False
    warm_up: float = 1.0
    phases: tuple[Phase, ...] = ()
    arrivals: Literal["constant", "poisson"] = "constant"
    seed: int = 0
    concurrency: int = 0
    calls: int | None = None
    seconds: float | None = None
    in_flight: int = 100_000
    processes: int = 1
    workers: int = 1
    prefetch: int = 100
    simulate: float = 0.0
    queue_type: Literal["classic", "quorum"] = "classic"

    @property
    def in_memory(self) -> bool:
        """Everything is in this process."""
        return self.url.startswith("memory:")

    def plans(self, target: str) -> list[Plan]:
        """What each generator does."""
        common = Plan(
            processes=self.processes,
            url=self.url,
            namespace=self.namespace,
            target=target,
            checks=self.target is None,
            args=self.args,
            params=dict(self.params),
            lines=self.lines,
            payload=self.payload,
            timeout=self.timeout,
            idempotent=self.idempotent,
            warm_up=self.warm_up,
            phases=self.phases,
            arrivals=self.arrivals,
            seed=self.seed,
            concurrency=self.concurrency,
            calls=self.calls,
            seconds=self.seconds,
            in_flight=max(1, self.in_flight // self.processes),
        )
        return [replace(common, number=number) for number in range(self.processes)]


class Conductor:
    """One run of a test.

    Args:
        test: what is measured.
        on_second: called with what happened in each second: all generators together, and the depth of the queue.

    """

    def __init__(self, test: LoadTest, on_second: Callable[[int, Tally, int | None], None]) -> None:
        self._test = test
        self._on_second = on_second
        self._service = (test.target or f"bench-{secrets.token_hex(4)}.{METHOD}").rpartition(".")[0]
        self._depths: dict[int, int] = {}
        self._told: dict[int, list[Tally]] = {}
        self._began = 0.0  # measuring, on time.time()
        self._generators: list[_Generating] = []
        self.interrupted = False

    def stop(self) -> None:
        """End the run before its time, with a report of what was done."""
        self.interrupted = True
        for generator in self._generators:
            generator.stop()

    async def run(self) -> Run:
        """Bring everything up, measure, and take it down.

        Raises:
            RpcqError: the broker or the target cannot be used.

        """
        test = self._test
        target = test.target or f"{self._service}.{METHOD}"
        async with AsyncExitStack() as stack:
            # While something of the memory transport is open, its broker lives.
            serving = await stack.enter_async_context(self._serving()) if test.target is None else None
            if test.target is not None:
                await self._wait_for_service()
            self._generators = [await stack.enter_async_context(_generating(plan)) for plan in test.plans(target)]
            if self.interrupted:
                self.stop()
            self._began = time.time() + test.warm_up
            watching = asyncio.create_task(self._watch_depth())
            try:
                found = await asyncio.gather(*(it.measure(self._second) for it in self._generators))
            finally:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)
            seen = await serving() if serving is not None else None
        return _put_together(test, found, seen, self._depths)

    # The target.

    @asynccontextmanager
    async def _serving(self) -> AsyncIterator[Callable[[], Any]]:
        """The built-in echo; gives a function that ends it, and tells what it has seen."""
        test = self._test
        async with AsyncExitStack() as stack:
            if test.in_memory:
                service, seen = echo_service(self._service, test.queue_type, test.simulate)
                worker = Worker(service, url=test.url, namespace=test.namespace, prefetch=test.prefetch)
                await stack.enter_async_context(worker)

                async def ended() -> Seen:
                    return seen

                yield ended
                return
            settings = {
                "url": test.url,
                "namespace": test.namespace,
                "service": self._service,
                "queue_type": test.queue_type,
                "simulate": test.simulate,
                "prefetch": test.prefetch,
            }
            stack.push_async_callback(self._remove_queue)
            started = [await stack.enter_async_context(_started("rpcq.bench.echo")) for _ in range(test.workers)]
            for process in started:
                process.tell(json.dumps(settings).encode())
            for process in started:
                await process.read("ready")

            async def all_ended() -> Seen:
                for process in started:
                    process.close()
                return Seen().merge([read_seen(await process.read()) for process in started])

            yield all_ended

    async def _remove_queue(self) -> None:
        topology = Topology(self._test.namespace)
        queue = topology.request_queue(self._service, self._test.queue_type, None).name
        async with self._admin() as admin:
            await admin.delete(queues=[queue])

    async def _wait_for_service(self) -> None:
        options = ClientOptions(namespace=self._test.namespace)
        async with Client(self._test.url, namespace=options.namespace, name="rpcq-bench") as client:
            await client.wait_for_service(self._service, timeout=5.0)

    # Meanwhile.

    @asynccontextmanager
    async def _admin(self) -> AsyncIterator[Admin]:
        url, failure = parse(self._test.url), None
        for host, port in url.hosts:
            try:
                async with open_admin(url, ClientOptions(namespace=self._test.namespace), host, port) as admin:
                    yield admin
                    return
            except BrokerError as error:
                failure = error
        assert failure is not None  # noqa: S101 - a URL has a host
        raise failure

    async def _watch_depth(self) -> None:
        """Once a second, how many requests wait."""
        test = self._test
        topology = Topology(test.namespace)
        kinds: tuple[Literal["classic", "quorum"], ...] = ("classic", "quorum")
        queues = [topology.request_queue(self._service, kind, None).name for kind in kinds]
        if test.in_memory:
            while (broker := MemoryBroker.named(parse(test.url).hosts[0][0])) is not None:
                depths = [broker.depth(queue) for queue in queues if queue in broker.queues]
                if depths:
                    self._note_depth(sum(depths))
                await asyncio.sleep(1)
            return
        with suppress(RpcqError):  # the depth is an extra: without it, the report has none
            async with self._admin() as admin:
                while True:
                    states = [await admin.queue(queue) for queue in queues]
                    if any(states):
                        self._note_depth(sum(it.messages for it in states if it is not None))
                    await asyncio.sleep(1)

    def _note_depth(self, depth: int) -> None:
        second = int(time.time() - self._began)
        if second >= 0:
            self._depths[second] = depth

    def _second(self, second: int, tally: Tally) -> None:
        told = self._told.setdefault(second, [])
        told.append(tally)
        if len(told) == len(self._generators):
            self._on_second(second, _sum(told), self._depths.get(second))


# Generators, here or in processes of their own.


class _Generating:
    """A generator that is ready."""

    def stop(self) -> None:
        raise NotImplementedError

    async def measure(self, on_second: Callable[[int, Tally], None]) -> Measured:
        raise NotImplementedError


class _Here(_Generating):
    def __init__(self, plan: Plan, client: Client) -> None:
        self._plan = plan
        self._client = client
        self._generator: Generator | None = None
        self._stopped = False

    def stop(self) -> None:
        self._stopped = True
        if self._generator is not None:
            self._generator.stop()

    async def measure(self, on_second: Callable[[int, Tally], None]) -> Measured:
        self._generator = Generator(self._plan, self._client, on_second)
        if self._stopped:
            self._generator.stop()
        return await self._generator.run()


class _There(_Generating):
    def __init__(self, process: _Process) -> None:
        self._process = process

    def stop(self) -> None:
        self._process.tell(b"stop")

    async def measure(self, on_second: Callable[[int, Tally], None]) -> Measured:
        self._process.tell(b"go")
        while True:
            line = await self._process.read(seconds=None)
            kind, _, rest = line.partition(" ")
            if kind == "measured":
                return read_measured(rest.encode())
            second, tally = json.loads(rest)
            on_second(second, Tally(**tally))


@asynccontextmanager
async def _generating(plan: Plan) -> AsyncIterator[_Generating]:
    if plan.url.startswith("memory:"):
        async with Client(plan.url, namespace=plan.namespace, max_in_flight=plan.in_flight + 1) as client:
            yield _Here(plan, client)
        return
    async with _started("rpcq.bench.generating") as process:
        process.tell(plan.to_json())
        await process.read("ready")
        yield _There(process)


class _Process:
    """A Python module that runs, and is spoken to line by line."""

    def __init__(self, process: asyncio.subprocess.Process, module: str) -> None:
        self._process = process
        self._module = module

    def tell(self, line: bytes) -> None:
        assert self._process.stdin is not None  # noqa: S101 - a pipe
        if not self._process.stdin.is_closing():
            self._process.stdin.write(line + b"\n")

    def close(self) -> None:
        """The end of its input."""
        assert self._process.stdin is not None  # noqa: S101
        self._process.stdin.close()

    async def read(self, expected: str = "", seconds: float | None = READY) -> str:
        """The next line, which begins so.

        Raises:
            RpcqError: it ended instead, having said on standard error why.

        """
        assert self._process.stdout is not None  # noqa: S101
        try:
            async with asyncio.timeout(seconds):
                line = (await self._process.stdout.readline()).decode()
        except TimeoutError as error:
            raise RpcqError(f"{self._module} did not answer within {seconds:g} s") from error
        if not line:
            raise RpcqError(f"{self._module} ended before its time, with exit code {await self._process.wait()}")
        if line.startswith("error "):
            raise RpcqError(line.removeprefix("error ").strip())
        if not line.startswith(expected):
            raise RpcqError(f"{self._module} said {line!r}")
        return line.rstrip("\n")


@asynccontextmanager
async def _started(module: str) -> AsyncIterator[_Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        module,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=64 * 1024 * 1024,  # what was found comes as one line
        start_new_session=True,  # Ctrl-C is this process's to deal with
    )
    found = _Process(process, module)
    try:
        yield found
    finally:
        found.close()
        try:
            async with asyncio.timeout(READY):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


# Putting together.


def _sum(tallies: Sequence[Tally]) -> Tally:
    latencies = [HdrHistogram.decode(it.latency.encode()) for it in tallies if it.latency]
    return Tally(
        offered=sum(it.offered for it in tallies),
        sent=sum(it.sent for it in tallies),
        ok=sum(it.ok for it in tallies),
        failed=sum(it.failed for it in tallies),
        lag=max((it.lag for it in tallies), default=0.0),
        latency=merged(latencies).encode().decode() if latencies else "",
    )


def _put_together(test: LoadTest, found: Sequence[Measured], seen: Seen | None, depths: Mapping[int, int]) -> Run:
    histograms = {
        name: merged(HdrHistogram.decode(it.histograms[name].encode()) for it in found if name in it.histograms)
        for name in {name for it in found for name in it.histograms}
    }

    def spread(name: str) -> Distribution | None:
        return Distribution.of(histograms[name]) if name in histograms else None

    nothing = Distribution.of(merged([]))
    seconds = max(it.seconds for it in found)
    planned = sum(it.seconds for it in test.phases)
    ended, sent = sum(it.ended for it in found), sum(it.sent for it in found)
    offered = sum(tally.offered for it in found for tally in it.series.values())
    errors: Counter[str] = Counter()
    executed: Counter[str] = Counter()
    for it in found:
        errors.update(it.errors)
        executed.update(it.executed)
    lag = histograms.get("lag")
    measured_for = min(seconds, planned) if planned else seconds
    run = Run(
        model="open" if test.phases else "closed",
        began=datetime.fromtimestamp(min(it.began for it in found), UTC).isoformat(timespec="milliseconds"),
        seconds=round(seconds, 6),
        offered=offered / measured_for if test.phases and measured_for else None,
        achieved=ended / seconds if seconds else 0.0,
        sent=sent,
        ok=sum(it.ok for it in found),
        errors=dict(errors),
        executed=dict(executed),
        warm_up=sum(it.warm_up for it in found),
        checked=seen is not None,
        lost=sent - ended,
        duplicated=sum(it.stray for it in found) + (seen.doubled if seen is not None else 0),
        mismatched=sum(it.mismatched for it in found),
        handled=None if seen is None else seen.runs,
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
        series=_series(test, found, depths),
        steps=_steps(test, found, histograms),
    )
    return replace(run, bottleneck=tuple(_bottleneck(run)))


def _series(test: LoadTest, found: Sequence[Measured], depths: Mapping[int, int]) -> tuple[Second, ...]:
    rows = []
    for second in range(1 + max((at for it in found for at in it.series), default=-1)):
        tally = _sum([it.series[second] for it in found if second in it.series])
        spread = Distribution.of(HdrHistogram.decode(tally.latency.encode())) if tally.latency else None
        rows.append(
            Second(
                at=second,
                offered=tally.offered if test.phases else None,
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


def _steps(test: LoadTest, found: Sequence[Measured], histograms: Mapping[str, HdrHistogram]) -> tuple[Step, ...]:
    if len(test.phases) < 2:
        return ()
    steps, begins = [], 0.0
    for number, phase in enumerate(test.phases):
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
    """Why the generator itself may be what was measured."""
    why = []
    if run.cpu > BUSY:
        why.append(f"a generator used {run.cpu:.0%} of a core; give it more with --processes")
    if run.lag_p99 > LAG:
        why.append(f"a generator's event loop was {run.lag_p99:.0f} ms late in one look of a hundred")
    if run.dropped:
        why.append(f"{run.dropped} calls were not sent, since too many were under way")
    if run.late > 0.01 * max(run.sent, 1):
        why.append(f"{run.late} of {run.sent} calls were sent more than 10 ms after they were due")
    return why


async def host(url: str) -> dict[str, Any]:
    """Where a test runs."""
    broker = "in this process"
    if not url.startswith("memory:"):
        parsed, broker = parse(url), "unknown"
        with suppress(RpcqError):
            async with open_admin(parsed, ClientOptions(), *parsed.hosts[0]) as admin:
                broker = f"{admin.product} {admin.version}"
    return {
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "rpcq": version("rpcq"),
        "broker": broker,
    }

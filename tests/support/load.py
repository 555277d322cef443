"""Load on real worker processes, and the oracle that every fault is held to.

The oracle: each call ends in exactly one outcome, within its deadline plus one second; a result means that the handler
ran, and is that of its own call; `executed` is never more certain than the facts; a call that is not idempotent ran at
most once; at the end the tables, the tasks and the buffers are empty.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from rpcq import CallError, Client
from rpcq.calls.outcomes import MAX_ATTEMPTS
from support.command import Process, delete_queues

T = TypeVar("T")

TESTS = Path(__file__).resolve().parents[1]
SLACK = 1.0
"""Seconds after its deadline by which a call has to have ended."""

READY = 20.0
"""Seconds that anything which is waited for may take: workers to start, calls to come through again."""


async def until(condition: Callable[[], object], seconds: float = READY, what: str = "") -> None:
    """Wait until it is so; nothing tells."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what or f"it was not so within {seconds:g} s"
        await asyncio.sleep(0.01)


def _of_a_proxy(task: asyncio.Task[Any]) -> bool:
    """Whether it carries bytes between a client and the broker: it ends a moment after the connection."""
    code = getattr(task.get_coro(), "cr_code", None)
    return code is not None and code.co_filename == str(TESTS / "support" / "proxy.py")


async def first(answers: AsyncGenerator[T, None], count: int) -> list[T]:
    """The first `count` answers of workers; ask with `wait=READY`, since a busy worker needs its time."""
    async with aclosing(answers):
        return [await anext(answers) for _ in range(count)]


class Overdue:
    """Whether something goes on for `SLACK` seconds longer than it may.

    The second timer is set when the first one fires: so the time in which this process stands still at the deadline is
    nobody's delay.

    Args:
        seconds: that it may take from now on.

    Attributes:
        is_so: the answer.
    """

    def __init__(self, seconds: float) -> None:
        self.is_so = False
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(seconds, self._at_deadline)

    def _at_deadline(self) -> None:
        self._timer = self._loop.call_later(SLACK, self._after_slack)

    def _after_slack(self) -> None:
        self.is_so = True

    def stop(self) -> None:
        self._timer.cancel()


class WorkerProcess(Process):
    """`rpcq worker support.targets:target` as a process of its own."""

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def says(self, text: str) -> bool:
        """Whether a line of its log has this in it."""
        return any(text in line for line in list(self.lines))

    async def started(self) -> Self:
        what = "the worker did not start"
        await until(lambda: self.says("worker started") or not self.is_alive, 3 * READY, what)
        assert self.is_alive, "\n".join(self.lines)
        return self

    async def exit_code(self, seconds: float = READY) -> int:
        """Wait for its end."""
        await until(lambda: not self.is_alive, seconds, "the worker did not end")
        return await asyncio.to_thread(self.ended)

    def freeze(self) -> None:
        self.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.signal(signal.SIGCONT)


def lines_of(runs: Path) -> Counter[str]:
    """The lines of a file of runs."""
    return Counter(runs.read_text("ascii").split("\n")) if runs.exists() else Counter()


class Ledger:
    """What callers were told, written to a file as they are told it: a long run would not fit into memory.

    Attributes:
        counts: calls by what they ended with: "result", or the name of the error and its `executed`.
        violations: what broke the oracle, as far as a caller can see it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: Counter[str] = Counter()
        self.violations: list[str] = []
        self.begun = 0
        self._file = path.open("a", encoding="ascii")

    @property
    def ended(self) -> int:
        return sum(self.counts.values())

    def count(self, kind: str | type[CallError]) -> int:
        """Calls that ended so: "result", an error class, or "Error/executed"."""
        name = kind if isinstance(kind, str) else kind.__name__
        return sum(n for told, n in self.counts.items() if told == name or told.split("/")[0] == name)

    @property
    def failed(self) -> int:
        return self.ended - self.counts["result"] - self.counts["cancelled"]

    def wrote(self, nonce: str, *, idempotent: bool, told: str, began: float, more: str = "") -> None:
        """A call has ended; `began` on the wall clock, and `more` is for ledgers that hold calls to more."""
        self.counts[told] += 1
        kind = "idempotent" if idempotent else "once"
        self._file.write(f"{nonce} {kind} {told} {began:.3f} {time.time():.3f} {more}\n")

    def lines(self) -> Iterator[list[str]]:
        """All calls that have ended: nonce, kind, what was told, when it began and ended, and more."""
        self._file.flush()
        with self.path.open(encoding="ascii") as file:
            for line in file:
                yield line.split()

    def verdict(self, ran: Counter[str]) -> list[str]:
        """What breaks the oracle, each with its nonce first; `ran` has the lines of the file of runs."""
        violations = list(self.violations)
        if self.ended != self.begun:
            violations.append(f"{self.begun - self.ended} calls have not ended")
        for nonce, kind, told, *_ in self.lines():
            times = ran[nonce]
            executed = "yes" if told == "result" else told.partition("/")[2]
            most = MAX_ATTEMPTS if kind == "idempotent" else 1
            if times > most:
                violations.append(f"{nonce} ({kind}) ran {times} times; it ended as {told}")
            if (executed == "no" and times) or (executed == "yes" and not times):
                violations.append(f"{nonce} ended as {told}, and ran {times} times")
        return violations

    def check(self, runs: Path) -> None:
        """Hold what callers were told against what ran.

        Raises:
            AssertionError: with the violations.
        """
        violations = self.verdict(lines_of(runs))
        assert not violations, f"{len(violations)} violations: {'; '.join(violations[:10])}"

    def close(self) -> None:
        self._file.close()


class Load:
    """Callers that call again and again until they are told to stop.

    Args:
        client: who calls.
        ledger: where outcomes go.
        callers: how many at once.
        method: of the service; it takes `nonce`, and what is in `params`.
        service: whose.
        idempotent: whether the caller says so.
        timeout: seconds that each call has.
        think: seconds between two calls of one caller; the callers' first calls are spread over as long.
        params: further parameters of each call.
        options: further options of each call.

    Attributes:
        prefix: what the nonces of its calls begin with.
    """

    _number = 0

    def __init__(
        self,
        client: Client,
        ledger: Ledger,
        *,
        callers: int = 50,
        method: str = "once",
        service: str = "target",
        idempotent: bool = False,
        timeout: float = 10.0,
        think: float = 0.005,
        params: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        Load._number += 1
        self.client = client
        self.ledger = ledger
        self.prefix = f"{os.getpid()}-{Load._number}-"
        self._count = 0
        self._callers = callers
        self._target = f"{service}.{method}"
        self._idempotent = idempotent
        self._timeout = timeout
        self._think = think
        self._params = params or {}
        self._maker = client.with_options(timeout=timeout, idempotent=idempotent, **options)
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False

    async def __aenter__(self) -> Self:
        begins = (self._think * number / self._callers for number in range(self._callers))
        self._tasks = [asyncio.create_task(self._call_on(after)) for after in begins]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
        if kind is not None:
            for task in self._tasks:
                task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=kind is not None)

    def stop(self) -> None:
        """Make no further calls; those under way end as they may."""
        self._stopping = True

    async def through(self, count: int = 200, seconds: float = READY) -> None:
        """Wait until this many further calls have had results."""
        counts = self.ledger.counts
        wanted = counts["result"] + count
        await until(lambda: counts["result"] >= wanted, seconds, f"no {count} calls came through: {counts}")

    async def _call_on(self, after: float) -> None:
        await asyncio.sleep(after)
        while not self._stopping:
            await self.call()
            await asyncio.sleep(self._think)

    async def call(self, **params: Any) -> Any:
        """One call, entered into the ledger: its result, or the error that it ended with."""
        self._count += 1
        nonce = f"{self.prefix}{self._count}"
        calling = self._maker.call(self._target, nonce=nonce, **self._params, **params)
        return await self.entered(nonce, calling, lambda told: told == nonce)

    async def entered(
        self,
        nonce: str,
        calling: Awaitable[Any],
        is_right: Callable[[Any], bool],
        more: Callable[[Any], str] = lambda _: "",
        seconds: float | None = None,
    ) -> Any:
        """A call, entered into the ledger: its result, or the error that it ended with.

        Args:
            nonce: names the call.
            calling: the call.
            is_right: whether a result is that of this call.
            more: what the ledger is to know besides, from the result or the error.
            seconds: that it has, if not those of all calls.

        """
        ledger = self.ledger
        ledger.begun += 1
        at, overdue = time.time(), Overdue(self._timeout if seconds is None else seconds)
        told: Any = None
        kind = "result"
        try:
            told = await calling
            if not is_right(told):
                ledger.violations.append(f"{nonce} got the answer {told!r}")
        except CallError as error:
            told, kind = error, f"{type(error).__name__}/{error.executed}"
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not task or not task.cancelling():
                ledger.violations.append(f"{nonce} was told that it was cancelled, and nobody did")
            kind = "cancelled"
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, it is none of the outcomes
            told, kind = error, "foreign"
            ledger.violations.append(f"{nonce} got {error!r}")
        finally:
            overdue.stop()
            if overdue.is_so:
                ledger.violations.append(f"{nonce} ended as {kind} more than {SLACK:g} s after its deadline")
            ledger.wrote(nonce, idempotent=self._idempotent, told=kind, began=at, more=more(told))
        return told


@dataclass
class Scene:
    """A broker, worker processes, and a client in this process; ends with the oracle.

    Attributes:
        url: the broker's.
        namespace: this test's own.
        queue_type: of the request queue.
        folder: where the processes run; each nonce that ran is a line of its file `runs`.
        services: those that have queues.
    """

    url: str
    namespace: str
    queue_type: Literal["classic", "quorum"]
    folder: Path
    workers: list[WorkerProcess] = field(default_factory=list)
    ledgers: list[Ledger] = field(default_factory=list)
    is_checked: bool = False
    services: tuple[str, ...] = ("target",)

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    @property
    def queue(self) -> str:
        return self.queue_of("target")

    def queue_of(self, service: str) -> str:
        return f"{self.namespace}.{'once' if self.queue_type == 'quorum' else 'req'}.{service}"

    def ran(self, nonce: str = "") -> list[str]:
        """The lines of the file of runs that begin so."""
        text = self.runs.read_text("ascii") if self.runs.exists() else ""
        return [line for line in text.splitlines() if line.startswith(nonce)]

    def start(
        self, *arguments: str, url: str | None = None, service: str = "support.targets:target", **environment: str
    ) -> WorkerProcess:
        """Start a worker, and do not wait for it."""
        kept = {name: it for name, it in os.environ.items() if not name.startswith(("RPCQ_", "COV_"))}
        environment = {
            **kept,
            "RPCQ_URL": url or self.url,
            "RPCQ_NAMESPACE": self.namespace,
            "RPCQ_HEARTBEAT": "5",
            "RPCQ_TEST_RUNS": str(self.runs),
            "RPCQ_TEST_QUEUE_TYPE": self.queue_type,
            "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
            **environment,
        }
        command = [sys.executable, "-m", "rpcq", "worker", service, *arguments]
        process = WorkerProcess(command, self.folder, environment)
        self.workers.append(process)
        return process

    async def worker(self, *arguments: str, url: str | None = None, **environment: str) -> WorkerProcess:
        """A worker that serves."""
        return await self.start(*arguments, url=url, **environment).started()

    async def workers_of(self, count: int, *arguments: str, **environment: str) -> list[WorkerProcess]:
        """Several, started side by side."""
        started = [self.start(*arguments, **environment) for _ in range(count)]
        for one in started:
            await one.started()
        return started

    @asynccontextmanager
    async def client(self, url: str | None = None, **options: Any) -> AsyncIterator[Client]:
        """A client whose tables and tasks are empty at the end."""
        before = asyncio.all_tasks()
        async with Client(url or self.url, namespace=self.namespace, **{"heartbeat": 5, **options}) as client:
            yield client
            assert (client.in_flight, len(client._sender.waiting), len(client._control._questions)) == (0, 0, 0)
            assert not any(client._invoker._timeouts._buckets.values()), "timeouts of calls that have ended are left"
        left = {task for task in asyncio.all_tasks() - before if not task.done()} - {asyncio.current_task()}
        left = {task for task in left if not _of_a_proxy(task)}
        assert not left, f"tasks are left: {left}"

    def ledger(self) -> Ledger:
        made = Ledger(self.folder / f"told-{len(self.ledgers)}")
        self.ledgers.append(made)
        return made

    def load(self, client: Client, **options: Any) -> Load:
        """A load with a ledger of its own."""
        return Load(client, self.ledger(), **options)

    async def drain(self) -> None:
        """Let the workers that live end what they have in hand, and end."""
        living = [it for it in self.workers if it.is_alive]
        for worker in living:
            worker.thaw()
            worker.signal(signal.SIGTERM)
        for worker in living:
            assert await worker.exit_code() == 0, "\n".join(worker.lines[-20:])

    async def check(self) -> None:
        """Let the workers drain, and hold what callers were told against what ran."""
        self.is_checked = True
        await self.drain()
        assert self.ledgers, "nothing was called"
        problems: list[str] = []
        for ledger in self.ledgers:
            assert ledger.ended, "nothing was called"
            try:
                ledger.check(self.runs)
            except AssertionError as error:
                problems.append(f"{error}; in all: {dict(ledger.counts)}")
        assert not problems, "\n".join(problems)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for worker in self.workers:
            if worker.is_alive:
                worker.thaw()
            worker.kill()
        for ledger in self.ledgers:
            ledger.close()
        with contextlib.suppress(ConnectionError):  # a broker that the test has ended
            await asyncio.to_thread(delete_queues, self.url, self.namespace, self.services)
        assert kind is not None or self.is_checked, "the test has not held the calls to the oracle"

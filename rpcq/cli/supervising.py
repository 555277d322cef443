"""`rpcq worker --processes` and `--reload`: worker processes are started again when they die or when files change.

With a range of processes, their number follows the number of jobs that wait.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from rpcq import logs
from rpcq.cli.options import FAILED, USAGE
from rpcq.cli.scaling import Change, Scaling
from rpcq.errors import ConfigurationError
from rpcq.runtime.backoff import Backoff
from rpcq.runtime.distribution import missing

FIRST_PAUSE: Final = 0.5
LONGEST_PAUSE: Final = 30.0
"""Seconds before a process that died early is started again; doubled each time."""

EARLY: Final = 10.0
"""Seconds. A process that lived longer is started again without a pause."""

SUPERVISED: Final = "RPCQ_SUPERVISED"
"""The variable with the number, from 1, of a process that a supervisor started. It stops when its stdin closes."""

log = logs.get_logger("rpcq.supervisor")


Watch = Callable[[Callable[[int | None], None]], Awaitable[None]]
"""Watches the depth of the job queues until it is cancelled: calls its argument with each depth, None if not known."""


async def supervise(
    command: Sequence[str],
    environment: Mapping[str, str],
    processes: int,
    *,
    reload: Path | None,
    scaling: Scaling | None = None,
    watch: Watch | None = None,
) -> bool:
    """Keep processes running until SIGTERM or Ctrl-C, then let them end; each further signal is passed on to them.

    Args:
        command: the command line of each process.
        environment: the environment of each process.
        processes: the number of processes; with `scaling`, the largest number.
        reload: the processes start again when Python files in this folder change; None for no such folder.
        scaling: decides how many of the processes run; None for all of them.
        watch: tells `scaling` how many jobs wait.

    Returns:
        Whether all processes that ran at the end ended without an error.

    Raises:
        ConfigurationError: `reload` is given, and the package watchfiles is not installed.

    """
    running = processes if scaling is None else scaling.processes
    supervisor = _Supervisor(command, environment, running, reloads=reload is not None)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, supervisor.stop)
    beside = []
    if reload is not None:
        beside.append(loop.create_task(_reload_on_changes(reload, _changes(), supervisor)))
    if scaling is not None and watch is not None:
        beside.append(loop.create_task(_scale(watch, scaling, supervisor)))
    for task in beside:
        task.add_done_callback(lambda _: supervisor.stop_first())  # it goes on until it is cancelled, or has a bug
    try:
        kept = [supervisor.keep(number) for number in range(1, processes + 1)]
        clean = all(await asyncio.gather(*kept))
    finally:
        for task in beside:
            task.cancel()
        ended = await asyncio.gather(*beside, return_exceptions=True)
    for error in ended:
        if isinstance(error, Exception):
            raise error
    return clean


class _Supervisor:
    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], processes: int, *, reloads: bool
    ) -> None:
        self._command = command
        self._environment = environment
        self._processes = processes
        self._reloads = reloads
        self._running: dict[int, asyncio.subprocess.Process] = {}
        self._surplus: set[asyncio.subprocess.Process] = set()
        self._stopping = asyncio.Event()
        self._changed = asyncio.Event()
        self._scaled = asyncio.Event()

    def stop(self) -> None:
        """End all processes, and start no others. When called again, pass the signal on: it cuts off what runs."""
        ending = () if self._stopping.is_set() else self._surplus
        self._stopping.set()
        self._terminate(ending)

    def stop_first(self) -> None:
        """The same, unless they end already."""
        if not self._stopping.is_set():
            self.stop()

    def changed(self) -> None:
        """Start all processes again."""
        self._changed.set()
        self._terminate()
        self._changed = asyncio.Event()

    def scale(self, change: Change) -> None:
        """Change how many processes there are: those with the numbers from 1 on. Others end as at `stop`."""
        if self._stopping.is_set():  # all of them end already
            return
        event = "more worker processes" if change.after > change.before else "one worker process less"
        log.info(event, processes=change.after, before=change.before, waiting=change.waiting, reason=change.reason)
        self._processes = change.after
        for number, process in self._running.items():
            if number > change.after:
                self._end_surplus(process)
        self._scaled.set()
        self._scaled = asyncio.Event()

    def _end_surplus(self, process: asyncio.subprocess.Process) -> None:
        if process not in self._surplus:  # a second signal would cut off its jobs
            self._surplus.add(process)
            if process.returncode is None:
                process.terminate()

    def _terminate(self, ending: Collection[asyncio.subprocess.Process] = ()) -> None:
        for process in self._running.values():
            if process.returncode is None and process not in ending:
                process.terminate()

    async def keep(self, number: int) -> bool:
        """Keep one process running, while there are to be so many, until `stop`.

        Returns:
            Whether its last run ended without an error; True if it did not run at the end.

        """
        backoff = Backoff(FIRST_PAUSE, LONGEST_PAUSE)
        while True:
            while number > self._processes:
                await self._sleep(None, self._scaled)
                if self._stopping.is_set():
                    return True
            began, changed = time.monotonic(), self._changed
            code, was_surplus = await self._run(number)
            clean = code in (0, -signal.SIGTERM)  # -SIGTERM: it was stopped before it began to serve
            if self._stopping.is_set():
                return clean
            if was_surplus:
                write = log.info if clean else log.warning  # a job was cut off: it took longer than `grace`
                write("worker process stopped", number=number, exit_code=code)
                continue
            if changed.is_set():  # `changed` ended it
                continue
            if code == USAGE and not self._reloads:
                self.stop()  # it has printed what is wrong, and another one would fail in the same way
                return False
            if code in (FAILED, USAGE) and self._reloads:  # the same: a broken module, a lifespan that fails
                log.error("worker process failed; waiting until a Python file changes", number=number, exit_code=code)
                await self._sleep(None, changed)
                if self._stopping.is_set():
                    return False
                continue
            lived = time.monotonic() - began
            if lived > EARLY:
                backoff.reset()
            pause = 0.0 if lived > EARLY else backoff.pause()
            log.error("worker process died", number=number, exit_code=code, lived=round(lived, 1), again_in=pause)
            await self._sleep(pause, changed)
            if self._stopping.is_set():
                return False

    async def _run(self, number: int) -> tuple[int, bool]:
        """Run the process of this number: its exit code, and whether `scale` ended it."""
        # In a session of its own: Ctrl-C in a terminal reaches only the supervisor, which then stops the processes.
        process = await asyncio.create_subprocess_exec(
            *self._command,
            env={**self._environment, SUPERVISED: str(number)},
            stdin=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        self._running[number] = process
        log.info("worker process started", number=number, pid=process.pid)
        if self._stopping.is_set():
            process.terminate()
        elif number > self._processes:
            self._end_surplus(process)
        try:
            code = await process.wait()
            return code, process in self._surplus
        finally:
            del self._running[number]
            self._surplus.discard(process)

    async def _sleep(self, seconds: float | None, changed: asyncio.Event) -> None:
        """Wait until the time is over (None: without that), something changes, or `stop` is called."""
        waits = [asyncio.create_task(it.wait()) for it in (self._stopping, changed)]
        await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()


async def _reload_on_changes(
    folder: Path, changes_in: Callable[..., AsyncIterator[Any]], supervisor: _Supervisor
) -> None:
    log.info("watching for changes", folder=str(folder))
    async for changes in changes_in(folder):
        files = sorted(str(Path(name).relative_to(folder)) for _, name in changes)
        log.info("files changed; starting again", files=files[:5])
        supervisor.changed()


async def _scale(watch: Watch, scaling: Scaling, supervisor: _Supervisor) -> None:
    def found(waiting: int | None) -> None:
        change = scaling.look(waiting)
        if change is not None:
            supervisor.scale(change)

    await watch(found)


def _changes() -> Callable[..., AsyncIterator[Any]]:
    try:
        from watchfiles import PythonFilter, awatch  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ConfigurationError(missing("--reload", "watchfiles", "reload")) from error
    logs.silence("watchfiles.main")  # `_reload_on_changes` reports the same
    return partial(awatch, watch_filter=PythonFilter())

"""A worker of the soak of jobs: `python -m soak.jobs_worker FOLDER`; the broker and the namespace by RPCQ_....

Each effect is one line in a file of this process in FOLDER: a letter and the number of the job, `LINE` bytes. Lines are
appended by one system call each, so a kill of the process loses none that was written.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from pathlib import Path

from rpcq import Context, Retry, Service, Worker

SERVICE = "work"
DONE, FAILED, POISON, HUNG = "d", "f", "p", "h"
"""What a line says: done; or an attempt began that fails, kills its process, or hangs."""
LINE = 10
"""Bytes of a line."""
HANG_ATTEMPTS = 3
SOON = Retry(max_attempts=HANG_ATTEMPTS, initial_backoff=0.25, max_backoff=0.25)


def path_of(folder: Path, kind: str, pid: int) -> Path:
    return folder / f"{kind}-{pid}"


def worker_of(folder: Path) -> Service:
    """The service, whose effects are files of this folder."""
    file = os.open(path_of(folder, "effects", os.getpid()), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    service = Service(SERVICE)

    def note(what: str, number: int) -> None:
        os.write(file, f"{what}{number:0{LINE - 2}}\n".encode())

    @service.job
    async def quick(number: int) -> None:
        note(DONE, number)

    @service.job
    async def slow(number: int) -> None:
        await asyncio.sleep(0.05)
        note(DONE, number)
        await asyncio.sleep(0.01)

    @service.job
    def thread(number: int) -> None:
        time.sleep(0.002)
        note(DONE, number)

    @service.job(retry=SOON)
    async def again(context: Context, number: int) -> None:
        if context.attempt == 1:
            note(FAILED, number)
            raise ValueError("the first time")
        note(DONE, number)

    @service.job
    async def poison(number: int) -> None:
        note(POISON, number)
        os.kill(os.getpid(), signal.SIGKILL)

    @service.job(timeout=0.5, retry=SOON)
    async def hang(number: int) -> None:
        note(HUNG, number)
        await asyncio.Event().wait()

    return service


async def main(folder: Path) -> None:
    worker = Worker(worker_of(folder))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, worker.request_stop)
    running = asyncio.create_task(worker.run())
    while not worker.connected and not running.done():  # noqa: ASYNC110 - no event tells
        await asyncio.sleep(0.01)
    path_of(folder, "serves", os.getpid()).touch()
    if not await running:
        sys.exit("it did not stop in time")


if __name__ == "__main__":
    logging.getLogger("rpcq").setLevel(logging.ERROR)
    asyncio.run(main(Path(sys.argv[1])))

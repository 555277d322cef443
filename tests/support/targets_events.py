"""Ten services that listen to one event, in one worker: `targets_events.py FOLDER WORD`; the broker by RPCQ_URL.

Each event that a service has run is a line `service number` in FOLDER/effects-PID; FOLDER/serves-PID says that the
worker serves.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from rpcq import Event, Service, Worker

FOLDER, WORD = Path(sys.argv[1]), sys.argv[2]
SUBSCRIPTIONS = 10
effects = os.open(FOLDER / f"effects-{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)


class Happened(Event, name=f"{WORD}.happened"):
    number: int


def listening(name: str) -> Service:
    service = Service(name)

    @service.on(Happened, timeout=60)
    async def work(event: Happened) -> None:
        await asyncio.sleep(0.01)
        os.write(effects, f"{name} {event.number}\n".encode())  # in one piece, also if this process is killed

    return service


async def main() -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    services = [listening(f"s{number}") for number in range(SUBSCRIPTIONS)]
    async with Worker(*services, namespace=os.environ["RPCQ_NAMESPACE"], connect_timeout=60, job_prefetch=20, grace=5):
        (FOLDER / f"serves-{os.getpid()}").touch()
        await stop.wait()


asyncio.run(main())

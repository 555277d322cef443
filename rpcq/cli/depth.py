"""Looks at the queues of jobs every few seconds: how many jobs wait for a worker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from rpcq import logs
from rpcq.errors import BrokerError, ConfigurationError
from rpcq.events import queues
from rpcq.options import ConnectionOptions
from rpcq.service import Service
from rpcq.transport.opening import open_admin
from rpcq.transport.rabbitmq.admin import Admin
from rpcq.url import BrokerURL
from rpcq.wire.events import EventTopology

LONGEST: Final = 10.0
"""Seconds that the broker has to answer one look."""

log = logs.get_logger("rpcq.supervisor")


def job_queues(services: Iterable[Service], namespace: str) -> list[str]:
    """The queues in which jobs and events of the services wait for a worker.

    Raises:
        ConfigurationError: no service has jobs or subscriptions.

    """
    topology = EventTopology(namespace)
    found = [queue.name for service in services for queue in queues.waiting(topology, service)]
    if not found:
        msg = (
            "--scale-on-depth needs a service with jobs or subscriptions: calls do not wait for long, they fail; give "
            "one number to --processes"
        )
        raise ConfigurationError(msg)
    return found


async def watch_depth(
    broker: BrokerURL,
    options: ConnectionOptions,
    queues: Sequence[str],
    every: float,
    found: Callable[[int | None], None],
) -> None:
    """Look at the queues again and again, until it is cancelled. It declares them passively, which needs no plugin.

    Args:
        broker: the broker.
        options: how to connect.
        queues: the queues. One that does not exist has no jobs.
        every: seconds between two looks.
        found: called after each look with the number of jobs that wait in all queues, without those that workers hold;
            with None if the broker could not be asked. That is logged once, until it can be asked again.

    """
    host, failing = 0, False
    while True:
        try:
            async with open_admin(broker, options, *broker.hosts[host % len(broker.hosts)]) as admin:
                while True:
                    waiting = await _depth(admin, queues)
                    if failing:
                        log.info("the depth of the job queues can be read again", messages=waiting)
                    failing = False
                    found(waiting)
                    await asyncio.sleep(every)
        except (BrokerError, ConfigurationError, TimeoutError) as error:  # ConfigurationError: a file for TLS is gone
            if not failing:
                log.warning("the depth of the job queues cannot be read; the processes stay", cause=str(error))
            failing = True
            host += 1  # the next node
            found(None)
            await asyncio.sleep(every)


async def _depth(admin: Admin, queues: Sequence[str]) -> int:
    """How many jobs wait in all queues.

    Raises:
        BrokerError: the broker could not be asked.
        TimeoutError: it did not answer in time.

    """
    try:
        async with asyncio.timeout(LONGEST):
            states = [await admin.queue(name) for name in queues]
    except TimeoutError as error:
        raise TimeoutError(f"the broker did not answer within {LONGEST:g} s") from error
    return sum(state.messages for state in states if state is not None)

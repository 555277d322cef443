"""Test a service, or code that calls a service, without a broker. With a URL, the same test runs on RabbitMQ.

    async with running(calculator) as client:
        assert await client.call("calculator.add", x=1, y=2) == 3

Nothing is patched: a real worker serves, a real client calls, and their messages are the same as over RabbitMQ.
`FakeService` replaces a service that the code under test calls. `world` moves the time, for jobs that are retried for
hours.
"""

from rpcq.testing.events import PublishedEvent
from rpcq.testing.fakes import FakeService, HeardEvent, Received
from rpcq.testing.jobs import DeadJob, WaitingJob
from rpcq.testing.places import Place, Running, Settings, Worlds, memory_url, running, running_sync, world
from rpcq.testing.worlds import WorkerKilled, World

__all__ = [
    "DeadJob",
    "FakeService",
    "HeardEvent",
    "Place",
    "PublishedEvent",
    "Received",
    "Running",
    "Settings",
    "WaitingJob",
    "WorkerKilled",
    "World",
    "Worlds",
    "memory_url",
    "running",
    "running_sync",
    "world",
]

"""rpcq as it comes, with `send_many` where several are sent: confirms, `mandatory`, validation on both sides."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from benchmarks.job_participants import TEXT, Ended, Options, Send
from rpcq import Client, Service, Worker
from rpcq.wire.job_queues import JobTopology

PACKAGES = ("rpcq-rabbitmq", "aio-pika", "aiormq")
PROMISES = "confirms, mandatory; acknowledges when done; parameters validated by sender and worker"
SERVICE = "jobs"


def made(ended: Ended) -> Service:
    """The service; its job is `nothing`."""
    service = Service(SERVICE)

    @service.job
    async def nothing(text: str) -> None:  # noqa: ARG001 - the parameter is part of the job
        ended()

    return service


@asynccontextmanager
async def worker(options: Options, ended: Ended) -> AsyncIterator[None]:
    """Run jobs while inside."""
    async with Worker(made(ended), url=options.url, job_prefetch=options.prefetch, namespace=options.namespace):
        yield


@asynccontextmanager
async def client(options: Options) -> AsyncIterator[tuple[Client, Service]]:
    """A client, where a worker has declared the queues."""
    service = made(lambda: None)
    async with Worker(service, url=options.url, namespace=options.namespace):
        pass
    async with Client(options.url, namespace=options.namespace) as connected:
        yield connected, service


@asynccontextmanager
async def sender(options: Options) -> AsyncIterator[Send]:
    """Be connected while inside."""
    async with client(options) as (connected, service):
        job = service.jobs["nothing"].handler

        async def send(count: int) -> None:
            if count == 1:
                await connected.send(job, text=TEXT)
            else:
                await connected.send_many(job, [{"text": TEXT}] * count)

        yield send


def names(options: Options) -> tuple[list[str], list[str]]:
    """The queues and the exchanges."""
    topology = JobTopology(options.namespace)
    queues = [topology.queue(SERVICE), topology.suspects(SERVICE), topology.dead_queue(SERVICE)]
    exchanges = [each.name for each in topology.exchanges()]
    return [each.name for each in (*queues, *topology.shared_queues())], [
        *exchanges,
        *(f"{options.namespace}.{name}" for name in ("requests", "control", "notices")),
    ]

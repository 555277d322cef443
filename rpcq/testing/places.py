"""Where services are served for a test: a broker, and a namespace of the test's own."""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
)
from dataclasses import asdict
from functools import partial
from typing import Any, Protocol, TypedDict, Unpack, cast

from rpcq import sync
from rpcq.client import Client
from rpcq.errors import BrokerError, ConfigurationError
from rpcq.events import queues
from rpcq.options import ClientKwargs, ConnectionOptions
from rpcq.runtime import blocking
from rpcq.service import Service
from rpcq.testing.fakes import FAKES_GRACE, FakeService, served
from rpcq.testing.worlds import MortalWorker, World
from rpcq.transport.memory.broker import shared
from rpcq.transport.opening import open_admin
from rpcq.url import mask, parse
from rpcq.wire.events import EventTopology
from rpcq.wire.topology import Topology
from rpcq.worker import Worker


class Settings(TypedDict, total=False):
    """The keyword arguments of `running` besides the URL: options of its client and of its workers.

    Attributes:
        name: name of the client and of the workers.
        timeout: seconds that a call has, unless `with_options` sets another timeout.
        prefetch: number of calls of each service that may run at the same time.
        job_prefetch: number of jobs of each service that may run at the same time.
        max_body: largest size of a message, bytes.
        grace: seconds that running handlers have to end when the test ends; 1 by default.

    """

    name: str
    timeout: float
    prefetch: int
    job_prefetch: int
    max_body: int
    grace: float


class Running(Protocol):
    """The type of the pytest fixture `rpcq_running`: `running`, in a namespace of the test."""

    def __call__(self, *services: Service, **settings: Unpack[Settings]) -> AbstractAsyncContextManager[Client]:
        """Serve the services, and yield a connected client; see `running`."""
        ...


class Worlds(Protocol):
    """The type of the pytest fixture `rpcq_world`: `world`, in a namespace of the test."""

    def __call__(self, *services: Service, **settings: Unpack[Settings]) -> AbstractAsyncContextManager[World]:
        """Serve the services in a world whose time the test moves; see `world`."""
        ...


def running(
    *services: Service, url: str | None = None, **settings: Unpack[Settings]
) -> AbstractAsyncContextManager[Client]:
    """Serve real and fake services, and yield a connected client, until the `async with` is left.

    Services and client use a namespace of their own. On RabbitMQ, its queues and exchanges are deleted at the end. Not
    deleted are queues that a service names itself (`queue=`), which are in no namespace, and everything else that the
    code under test declares.

    Code that opens its own client or worker reaches the same services with the same URL and
    `namespace=client.options.namespace`, or through `RPCQ_URL` and `RPCQ_NAMESPACE`, which the pytest fixture
    `rpcq_running` sets.

    Args:
        services: services to serve; none, to test what callers get when there is no worker.
        url: URL of the broker; `RPCQ_TEST_URL` if None; if that is not set either, a new broker in this process.
        settings: as in `Settings`; those that are not given are as in production.

    Raises:
        BrokerError: the broker cannot be used, or the queues could not be deleted. If the test has already failed, the
            second is added to its error as a note.
        ConfigurationError: a service, the URL or a setting cannot be used; or two services have the same name.

    """
    return Place(url).running(*services, **settings)


def running_sync(
    *services: Service, url: str | None = None, **settings: Unpack[Settings]
) -> AbstractContextManager[sync.Client]:
    """Serve as `running` does, and yield an `rpcq.sync.Client`, for code that blocks.

    The services run in the thread that blocking clients share.
    """
    return Place(url).running_sync(*services, **settings)


def world(
    *services: Service, url: str | None = None, **settings: Unpack[Settings]
) -> AbstractAsyncContextManager[World]:
    """Serve real and fake services in a world whose time the test moves, until the `async with` is left.

        async with world(emails) as w:
            await w.client.send(welcome, to="ada@example.org")
            await w.advance(hours=2)

    It is `running` on an in-process broker whose clock stands still. The clock of RabbitMQ cannot be moved, so
    `RPCQ_TEST_URL` is not used. See `World`.

    Args:
        services: services to serve.
        url: URL of an in-process broker that nobody has opened; None for a new one.
        settings: as in `Settings`; those that are not given are as in production.

    Raises:
        ConfigurationError: the URL is one of a real broker; a service or a setting cannot be used; or two services have
            the same name.
        UsageError: a client or worker uses this in-process broker already.

    """
    return Place(url or memory_url()).world(*services, **settings)


def memory_url() -> str:
    """The URL of an in-process broker that is not used elsewhere."""
    return f"memory://{secrets.token_hex(8)}"


class Place:
    """A broker, and a namespace on it that is not used elsewhere.

    Args:
        url: as for `running`.

    """

    def __init__(self, url: str | None = None) -> None:
        self.url = url or os.environ.get("RPCQ_TEST_URL") or memory_url()
        self.namespace = f"test-{secrets.token_hex(8)}"
        self._topology = Topology(self.namespace)
        self._event_topology = EventTopology(self.namespace)
        self._queues: set[str] = set()
        # The client publishes events, whoever listens.
        self._exchanges = {
            exchange.name for exchange in (*self._topology.exchanges(), *self._event_topology.exchanges())
        }
        self._used = False
        self._users = 0

    @asynccontextmanager
    async def running(self, *services: Service, **settings: Unpack[Settings]) -> AsyncIterator[Client]:
        """See `running`. If several overlap, the queues are deleted when the last one is left."""
        client, worker = self._parts(services, **settings)
        async with self._cleared(services), client, AsyncExitStack() as workers:
            self._used = True
            if real := _real(services):
                await workers.enter_async_context(worker(*real))
            await self._serve_fakes(services, worker, workers)
            yield client

    @asynccontextmanager
    async def world(self, *services: Service, **settings: Unpack[Settings]) -> AsyncIterator[World]:
        """See `world`."""
        broker = parse(self.url)
        if broker.scheme != "memory":
            msg = "the URL of a world must be memory://, because the clock of a real broker cannot be moved"
            raise ConfigurationError(f"{msg}; got {mask(self.url)}")
        client, worker = self._parts(services, **settings)
        memory = shared(broker.hosts[0][0])
        clock = memory.stop_clock()
        async with client, AsyncExitStack() as workers:
            found = World(client, memory, clock, self._event_topology, services, worker)
            workers.push_async_callback(found.close)
            if _real(services):
                await found.start_worker()
            await self._serve_fakes(services, worker, workers)
            yield found

    def _parts(
        self,
        services: Sequence[Service],
        *,
        name: str | None = None,
        timeout: float | None = None,
        prefetch: int | None = None,
        job_prefetch: int | None = None,
        max_body: int | None = None,
        grace: float = 1.0,
    ) -> tuple[Client, Callable[..., MortalWorker]]:
        """Check the services; make the client, and what makes workers."""
        for service in services:
            if not isinstance(service, Service):
                raise ConfigurationError(f"services must be instances of Service; got {service!r}")
        names = [service.name for service in services]
        if twice := sorted({it for it in names if names.count(it) > 1}):
            raise ConfigurationError(f"services must have different names; got several called {', '.join(twice)}")
        both = _given(namespace=self.namespace, name=name, max_body=max_body)
        further = _given(prefetch=prefetch, job_prefetch=job_prefetch)
        worker = partial(MortalWorker, url=self.url, grace=grace, **both, **further)
        return Client(self.url, **both, **_given(timeout=timeout)), worker

    async def _serve_fakes(
        self, services: Sequence[Service], worker: Callable[..., Worker], workers: AsyncExitStack
    ) -> None:
        """Serve each fake with a worker of its own, which `vanishes` may cut off."""
        for fake in services:
            if isinstance(fake, FakeService):
                await workers.enter_async_context(served(fake, partial(worker, grace=FAKES_GRACE)))

    @contextmanager
    def running_sync(self, *services: Service, **settings: Unpack[Settings]) -> Iterator[sync.Client]:
        """See `rpcq.testing.running_sync`."""
        loop, around = blocking.shared_loop(), self.running(*services, **settings)
        inner = blocking.run(loop, around.__aenter__)
        try:
            with sync.Client(self.url, **cast("ClientKwargs", asdict(inner.options))) as client:
                yield client
        except BaseException as error:
            blocking.run(loop, around.__aexit__, type(error), error, error.__traceback__)
            raise
        blocking.run(loop, around.__aexit__, None, None, None)

    @asynccontextmanager
    async def _cleared(self, services: Sequence[Service]) -> AsyncIterator[None]:
        """Delete the queues and exchanges of the namespace at the end."""
        self._users += 1
        self._queues |= {self._topology.request_queue(it.name, it.queue_type).name for it in services}
        topology = self._event_topology
        lasting = [
            *queues.shared(topology, services),
            *(it for each in services for it in queues.waiting(topology, each)),
        ]
        self._queues |= {queue.name for queue in lasting}
        self._exchanges |= {exchange.name for exchange in queues.exchanges(topology, services)}
        try:
            yield
        except BaseException as error:
            try:
                await self._leave()
            except BrokerError as why:
                error.add_note(f"rpcq.testing could not delete the queues of namespace {self.namespace!r}: {why}")
            raise
        await self._leave()

    async def _leave(self) -> None:
        self._users -= 1
        if self._used and not self._users and not self.url.startswith("memory:"):
            await _delete(self.url, sorted(self._exchanges), sorted(self._queues))


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _real(services: Sequence[Service]) -> list[Service]:
    return [service for service in services if not isinstance(service, FakeService)]


async def _delete(url: str, exchanges: Sequence[str], queues: Sequence[str]) -> None:
    """Delete exchanges, and queues with their messages, from RabbitMQ; skip those that do not exist.

    Raises:
        BrokerError: they could not be deleted.

    """
    broker, options = parse(url), ConnectionOptions(name="rpcq.testing")
    async with open_admin(broker, options, *broker.hosts[0]) as admin:
        await admin.delete(queues, exchanges)

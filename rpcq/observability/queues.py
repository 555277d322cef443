"""Asks RabbitMQ every few seconds how deep request queues are, and how many consumers they have.

It asks the management API, which also counts unacknowledged requests. If that does not respond, it declares the queues
passively, which needs no plugin and no further permission.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Final, Literal, Unpack

from rpcq import logs
from rpcq.environment import broker_url, options_from
from rpcq.errors import BrokerError, ConfigurationError
from rpcq.observability.management import UNANSWERED, Management, management_of
from rpcq.options import ConnectionKwargs, ConnectionOptions
from rpcq.service import Service
from rpcq.transport.opening import open_admin
from rpcq.transport.rabbitmq.admin import Admin
from rpcq.url import parse
from rpcq.wire.topology import Topology

MANAGEMENT_AGAIN: Final = 20
"""Looks by passive declaration, over one connection, before the management API is tried again."""

_COLUMNS: Final = ("messages_ready", "messages_unacknowledged", "consumers")

log = logs.get_logger("rpcq.queues")


@dataclass(frozen=True, slots=True)
class QueueDepth:
    """The state of a request queue at one look.

    Attributes:
        service: name of the service.
        queue: name of the queue.
        messages: number of requests that wait.
        unacknowledged: number of requests that workers hold; None after a passive declaration, which does not count
            them.
        consumers: number of consumers.
        source: how the broker was asked: "management" (API) or "declare" (passively).

    """

    service: str
    queue: str
    messages: int
    unacknowledged: int | None
    consumers: int
    source: Literal["management", "declare"]


Found = Callable[[QueueDepth], None]
Crossed = Callable[[QueueDepth, bool], None]


class QueueWatch:
    """Looks at the request queues of services: `look` once, `run` until it is cancelled.

    Args:
        services: `Service` objects; or names, for which it looks for the classic and the quorum queue.
        url: URL of the broker, as for `Client`; `RPCQ_URL` if None.
        every: seconds between two looks.
        management: URL of the management API; its user, if any, is used instead of the broker's. None: the broker's
            first host and the default port of the API, but only if the broker has its default port too. An empty
            string: do not ask it.
        threshold: number of requests that may wait; None for no limit.
        on_threshold: called with a queue and True when more requests wait; with False when they no longer do.
        on_depth: called with each queue at each look; `Metrics.on_depth` fits.
        options: `name`, `namespace`, `heartbeat`, `connect_timeout`.

    Raises:
        ConfigurationError: an argument cannot be used, or the broker is `memory://`.

    """

    def __init__(
        self,
        services: Iterable[Service | str],
        url: str | None = None,
        *,
        every: float = 15.0,
        management: str | None = None,
        threshold: int | None = None,
        on_threshold: Crossed | None = None,
        on_depth: Found | None = None,
        **options: Unpack[ConnectionKwargs],
    ) -> None:
        self._options = options_from(ConnectionOptions, options)
        self._broker = parse(broker_url(url))
        if self._broker.scheme == "memory":
            raise ConfigurationError("the broker of a QueueWatch must be RabbitMQ; got the in-process broker")
        if not every > 0:
            raise ConfigurationError(f"every must be a number of seconds above 0; got {every!r}")
        topology = Topology(self._options.namespace)
        self._queues = [pair for service in services for pair in _queues(topology, service)]
        if not self._queues:
            raise ConfigurationError("services must be one or more; got none")
        self._every = every
        self._management = management_of(self._broker, management)
        self._threshold = threshold
        self._on_threshold = on_threshold
        self._on_depth = on_depth
        self._above: set[str] = set()
        self._host = 0

    async def look(self) -> list[QueueDepth]:
        """Look at each queue that exists, once.

        Raises:
            BrokerError: the broker could not be asked.
            ConfigurationError: a file that the URL names for TLS cannot be used.

        """
        found = await self._from_management()
        if found is None:
            async with self._admin() as admin:
                found = await self._from(admin)
        return found

    async def run(self) -> None:
        """Look again and again, until it is cancelled. If the broker is down, log that and try again."""
        while True:
            try:
                found = await self._from_management()
                if found is not None:
                    await self._report(found)
                    continue
                async with self._admin() as admin:  # one connection for many looks
                    for _ in range(MANAGEMENT_AGAIN):
                        await self._report(await self._from(admin))
            except (BrokerError, ConfigurationError) as error:  # ConfigurationError: a file for TLS is gone
                log.warning("queues cannot be looked at", cause=str(error))
                self._host += 1  # the next node
                await asyncio.sleep(self._every)

    async def _from_management(self) -> list[QueueDepth] | None:
        """Ask the management API; None if there is none, or its response is not what it should be."""
        if self._management is None:
            return None
        try:
            return await asyncio.to_thread(_look, self._management, self._queues)
        except UNANSWERED as error:
            log.info("the management API cannot be used; queues are declared passively", cause=str(error))
            return None

    def _admin(self) -> AbstractAsyncContextManager[Admin]:
        host, port = self._broker.hosts[self._host % len(self._broker.hosts)]
        return open_admin(self._broker, self._options, host, port)

    async def _from(self, admin: Admin) -> list[QueueDepth]:
        found = [(service, await admin.queue(queue)) for service, queue in self._queues]
        return [
            QueueDepth(service, it.name, it.messages, None, it.consumers, "declare")
            for service, it in found
            if it is not None
        ]

    async def _report(self, found: list[QueueDepth]) -> None:
        """Call the hooks with what was found, and wait until the next look is due."""
        for depth in found:
            if self._on_depth is not None:
                _call(self._on_depth, depth)
            above = self._threshold is not None and depth.messages > self._threshold
            if above != (depth.queue in self._above):
                self._crossed(depth, above=above)
        # If no queue exists yet, a worker may be about to declare it: look again soon.
        await asyncio.sleep(self._every if found else min(self._every, 1.0))

    def _crossed(self, depth: QueueDepth, *, above: bool) -> None:
        (self._above.add if above else self._above.discard)(depth.queue)
        text = "queue is over its threshold" if above else "queue is no longer over its threshold"
        write = log.warning if above else log.info
        write(text, service=depth.service, queue=depth.queue, messages=depth.messages, threshold=self._threshold)
        if self._on_threshold is not None:
            _call(self._on_threshold, depth, above)


def _call(hook: Callable[..., None], *args: Any) -> None:
    """Call a user's function; an exception that it raises is logged and does not end the watch."""
    try:
        hook(*args)
    except Exception:
        log.exception("a hook of the queue watch failed", hook=repr(hook))


def _queues(topology: Topology, service: Service | str) -> list[tuple[str, str]]:
    if isinstance(service, Service):
        return [(service.name, topology.request_queue(service.name, service.queue_type, service.queue).name)]
    return [(service, topology.request_queue(service, kind).name) for kind in ("classic", "quorum")]


def _look(management: Management, queues: Sequence[tuple[str, str]]) -> list[QueueDepth]:
    """Look at each queue that exists; blocks.

    Raises:
        One of `UNANSWERED`: the response of the management API is not what it should be.
        ConfigurationError: a file that the broker's URL names for TLS cannot be used.

    """
    found = [(service, queue, it) for service, queue in queues if (it := management.queue(queue, _COLUMNS)) is not None]
    if not found:  # it may belong to another broker: a passive declaration will show
        raise ValueError("it has none of the queues")
    if any("messages_ready" not in it for _, _, it in found):
        raise ValueError("it has no numbers yet: they come a few seconds after a queue is declared")
    return [
        QueueDepth(
            service,
            queue,
            int(it["messages_ready"]),
            int(it["messages_unacknowledged"]),
            int(it["consumers"]),
            "management",
        )
        for service, queue, it in found
    ]

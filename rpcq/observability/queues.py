"""How deep request queues are, and who consumes them: asked of RabbitMQ every few seconds.

The management API is asked where it answers, since it also tells what is unacknowledged; a passive declaration where it
does not, which needs no plugin and no further right.
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
"""Looks without the management API, over one connection, before it is tried again."""

_COLUMNS: Final = ("messages_ready", "messages_unacknowledged", "consumers")

log = logs.get_logger("rpcq.queues")


@dataclass(frozen=True, slots=True)
class QueueDepth:
    """A request queue as it was found.

    Attributes:
        service: whose it is.
        queue: its name.
        messages: requests that wait.
        unacknowledged: requests that workers hold; None where the broker was asked by a passive declaration.
        consumers: how many there are.
        source: who told: "management" or "declare".

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
    """Looks at the request queues of services; `look` does it once, `run` until it is cancelled.

    Args:
        services: `Service` objects, or names, whose classic and quorum queues are looked for.
        url: the broker, as for `Client`; `RPCQ_URL` if None.
        every: seconds between two looks.
        management: URL of the management API, with another user than the broker's if it has one. None for the broker's
            first host at RabbitMQ's own port, if the broker is at its own port too; an empty string for not asking it.
        threshold: requests that may wait; None for no limit.
        on_threshold: called when a queue is deeper than that, with True, and when it no longer is, with False.
        on_depth: called with each queue at each look, as `Metrics.on_depth` takes it.
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
            raise ConfigurationError("queues are looked at on RabbitMQ; the in-process broker is not asked")
        if not every > 0:
            raise ConfigurationError(f"every is {every!r}; it is a number of seconds above 0")
        topology = Topology(self._options.namespace)
        self._queues = [pair for service in services for pair in _queues(topology, service)]
        if not self._queues:
            raise ConfigurationError("no services to look at; name at least one")
        self._every = every
        self._management = management_of(self._broker, management)
        self._threshold = threshold
        self._on_threshold = on_threshold
        self._on_depth = on_depth
        self._above: set[str] = set()
        self._host = 0

    async def look(self) -> list[QueueDepth]:
        """Each queue that is there, as it is now.

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
        """Look again and again, until it is cancelled. A broker that is away is logged, and tried again."""
        while True:
            try:
                found = await self._from_management()
                if found is not None:
                    await self._tell(found)
                    continue
                async with self._admin() as admin:  # one connection for many looks
                    for _ in range(MANAGEMENT_AGAIN):
                        await self._tell(await self._from(admin))
            except (BrokerError, ConfigurationError) as error:  # the latter where a file for TLS is gone
                log.warning("queues cannot be looked at", cause=str(error))
                self._host += 1  # the next node
                await asyncio.sleep(self._every)

    async def _from_management(self) -> list[QueueDepth] | None:
        """What the management API tells; None where there is none, or it does not answer as it should."""
        if self._management is None:
            return None
        try:
            return await asyncio.to_thread(_look, self._management, self._queues)
        except UNANSWERED as error:
            log.info("the management API does not answer; queues are declared passively", cause=str(error))
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

    async def _tell(self, found: list[QueueDepth]) -> None:
        """Call whom it concerns, and wait until the next look is due."""
        for depth in found:
            if self._on_depth is not None:
                _call(self._on_depth, depth)
            above = self._threshold is not None and depth.messages > self._threshold
            if above != (depth.queue in self._above):
                self._crossed(depth, above=above)
        # Where there is none yet, a worker may be about to declare it.
        await asyncio.sleep(self._every if found else min(self._every, 1.0))

    def _crossed(self, depth: QueueDepth, *, above: bool) -> None:
        (self._above.add if above else self._above.discard)(depth.queue)
        event = "queue is over its threshold" if above else "queue is no longer over its threshold"
        say = log.warning if above else log.info
        say(event, service=depth.service, queue=depth.queue, messages=depth.messages, threshold=self._threshold)
        if self._on_threshold is not None:
            _call(self._on_threshold, depth, above)


def _call(hook: Callable[..., None], *args: Any) -> None:
    """Call what a user gave: what it raises does not end the watch."""
    try:
        hook(*args)
    except Exception:
        log.exception("a hook of the watch failed", hook=repr(hook))


def _queues(topology: Topology, service: Service | str) -> list[tuple[str, str]]:
    if isinstance(service, Service):
        return [(service.name, topology.request_queue(service.name, service.queue_type, service.queue).name)]
    return [(service, topology.request_queue(service, kind).name) for kind in ("classic", "quorum")]


def _look(management: Management, queues: Sequence[tuple[str, str]]) -> list[QueueDepth]:
    """Each queue that is there; blocks.

    Raises:
        One of `UNANSWERED`: the management API does not answer as it should.
        ConfigurationError: a file that the broker's URL names for TLS cannot be used.

    """
    answers = [
        (service, queue, it) for service, queue in queues if (it := management.queue(queue, _COLUMNS)) is not None
    ]
    if not answers:
        raise ValueError("it knows none of the queues")  # it may be another broker's; a declaration tells
    if any("messages_ready" not in it for _, _, it in answers):
        raise ValueError("it has no figures yet: statistics come a few seconds after a queue")
    return [
        QueueDepth(
            service,
            queue,
            int(it["messages_ready"]),
            int(it["messages_unacknowledged"]),
            int(it["consumers"]),
            "management",
        )
        for service, queue, it in answers
    ]

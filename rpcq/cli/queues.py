"""`rpcq queues`: the queues of a namespace, what waits in them, and who consumes them.

The management API knows all columns. Without it, queues are declared passively, which shows how many messages are ready
and how many consumers there are. AMQP cannot list queues: then the services are those whose workers answer.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Final

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from rpcq import logs
from rpcq.cli.dlq import Desk
from rpcq.cli.options import Json, Level, LogLevel, ManagementUrl, Namespace, Url, Wait, default_name, errors, given
from rpcq.cli.text import plain, print_json
from rpcq.client import Client
from rpcq.environment import broker_url, options_from
from rpcq.errors import AccessRefused, ConfigurationError, NotFound
from rpcq.jobs.letters import Wanted
from rpcq.observability.management import UNANSWERED, Management, management_of
from rpcq.observability.queues import QueueDepth, QueueWatch
from rpcq.options import NAME, ClientOptions, check_name, check_seconds
from rpcq.runtime.process import run
from rpcq.url import parse
from rpcq.wire.job_queues import JobTopology
from rpcq.wire.topology import Topology

LETTERS: Final = frozenset({"dead", "lost"})
"""Kinds of queues whose first message may be looked at: they bury nothing that was delivered too often."""

UNKNOWN: Final = "-"

WIDE: Final = 500
"""Characters of a line that does not go to a terminal."""

COLUMNS: Final = ("queue", "kind", "ready", "unacked", "moving", "consumers", "in/s", "acked/s", "oldest")


@dataclass(frozen=True, slots=True)
class Row:
    """One queue at one look.

    Attributes:
        depth: its state.
        oldest: seconds since its first letter died; None if that is not known.

    """

    depth: QueueDepth
    oldest: float | None

    def cells(self) -> list[str]:
        """What the table shows, in the order of `COLUMNS`."""
        it = self.depth
        known = (it.messages, it.unacknowledged, it.moving, it.consumers)
        rates = (it.published, it.acknowledged)
        return [
            it.queue,
            it.kind,
            *(UNKNOWN if number is None else str(number) for number in known),
            *(UNKNOWN if rate is None else f"{rate:.1f}" for rate in rates),
            UNKNOWN if self.oldest is None else _age(self.oldest),
        ]


def queues(
    service: Annotated[str | None, typer.Argument(help="Only the queues of this service.")] = None,
    watch: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Look again and again, with a pause of so many seconds.")
    ] = None,
    as_json: Json = False,
    management: ManagementUrl = None,
    wait: Wait = 1.0,
    url: Url = None,
    namespace: Namespace = None,
    log_level: LogLevel = Level.ERROR,
) -> None:
    """Show the queues of a namespace: what waits, who consumes, how fast; dead letters, delayed and lost jobs.

    The age of the oldest is known for dead letters and lost messages: the first one is looked at, and put back. For
    other queues, RabbitMQ does not tell it. Ctrl-C ends --watch.
    """
    logs.configure(log_level.upper())
    check_seconds("--wait", wait)
    if watch is not None:
        check_seconds("--watch", watch)
    if service is not None:
        check_name("the name of a service", service)
    options = options_from(ClientOptions, given(namespace=namespace, name=default_name("queues")))
    looking = _Looking(broker_url(url), options, management, service, wait)

    async def look() -> None:
        while True:
            rows = await looking.look()
            if as_json:
                print_json({"time": datetime.now(UTC).isoformat(), "queues": [_carried(row) for row in rows]})
            else:
                _print(rows, options.namespace, service, clear=watch is not None)
            if watch is None:
                return
            await asyncio.sleep(watch)

    run(look())


class _Looking:
    """Looks at the queues that a command is about."""

    def __init__(
        self, url: str, options: ClientOptions, management: str | None, service: str | None, wait: float
    ) -> None:
        broker = parse(url)
        if broker.scheme == "memory":
            raise ConfigurationError("the broker must be RabbitMQ; got the in-process broker: no other process sees it")
        self._url = url
        self._desk = Desk(url, options)
        self._options = options
        self._management_url = management
        self._management = management_of(broker, management)
        self._service = service
        self._wait = wait
        self._noted: set[str] = set()

    async def look(self) -> list[Row]:
        """Look once.

        Raises:
            BrokerError: the broker could not be asked.

        """
        calls = Topology(self._options.namespace)
        found = [self._service] if self._service is not None else await self._services()
        # Others are not rpcq's.
        services = [it for it in found if NAME.match(it.partition(":")[0]) and not calls.delivers_once(it)]
        if not services:
            return []
        options = self._options
        watch = QueueWatch(
            services,
            self._url,
            management=self._management_url,
            name=options.name,
            namespace=options.namespace,
            heartbeat=options.heartbeat,
            connect_timeout=options.connect_timeout,
        )
        depths = await watch.look()
        ages = await self._ages([it for it in depths if it.kind in LETTERS and it.messages and not it.consumers])
        return [Row(it, ages.get(it.queue)) for it in depths]

    async def _services(self) -> list[str]:
        """The services that have a queue; without the management API, those whose workers answer.

        Of these, the subscriptions too, each as `service:subscription`.
        """
        if self._management is not None:
            try:
                return await asyncio.to_thread(_named, self._management, self._options.namespace)
            except UNANSWERED as error:
                self._note(f"the management API did not answer: {error}")
        else:
            self._note("the management API is not asked; give its URL with --management")
        self._note(
            "only services whose workers answer are shown: AMQP cannot list queues; name a service for its queues"
        )
        async with Client(self._url, namespace=self._options.namespace, name=self._options.name) as client:
            found = [it async for worker in client.workers(wait=self._wait) for it in worker.services]
        subscriptions = {f"{it.name}:{each.name}" for it in found for each in it.subscriptions if each.queue}
        return sorted({it.name for it in found} | subscriptions)

    async def _ages(self, depths: Sequence[QueueDepth]) -> dict[str, float]:
        """How long ago the first letter of each queue died, by the queue's name.

        A queue with consumers is left out: they hold its first letters, for example for `rpcq dlq`.
        """
        ages: dict[str, float] = {}
        for depth in depths:
            try:
                async with self._desk.letters(depth.queue) as letters, aclosing(letters.look(Wanted(), 1)) as found:
                    async for letter in found:
                        if letter.died_at is not None:
                            ages[depth.queue] = max(0.0, time.time() - letter.died_at.timestamp())
            except (AccessRefused, NotFound) as error:
                self._note(f"the age of the letters in {depth.queue!r} is not known: {error}")
        return ages

    def _note(self, text: str) -> None:
        """Say something on standard error, once."""
        if text not in self._noted:
            self._noted.add(text)
            errors.print(plain(text, "yellow"), soft_wrap=True)


def _named(management: Management, namespace: str) -> list[str]:
    """The services that have a queue of requests, jobs or dead letters; blocks.

    Raises:
        One of `UNANSWERED`: the response of the management API is not what it should be.

    """
    calls, jobs = Topology(namespace), JobTopology(namespace)
    examples = [calls.request_queue("s", "classic"), calls.request_queue("s", "quorum"), jobs.queue("s")]
    prefixes = [queue.name.removesuffix("s") for queue in (*examples, jobs.dead_queue("s"))]
    found = {name.removeprefix(prefix) for prefix in prefixes for name in management.queues(prefix)}
    return sorted(found)


# Printing.


def _carried(row: Row) -> dict[str, Any]:
    it = row.depth
    return asdict(it) | {"subscription": it.subscription, "lane": it.lane, "oldest": row.oldest}


def _print(rows: Sequence[Row], namespace: str, service: str | None, *, clear: bool) -> None:
    # A line that does not go to a terminal is as long as it needs to be.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDE)
    if clear and console.is_terminal:
        console.clear()
    if not rows:
        whose = "" if service is None else f" of service {service!r}"
        console.print(plain(f"no queues{whose} in namespace {namespace!r}", "yellow"))
        return
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, name in enumerate(COLUMNS):
        is_text = number < COLUMNS.index("ready")
        table.add_column(name, justify="left" if is_text else "right", no_wrap=name != "queue", overflow="fold")
    for row in rows:
        table.add_row(*(plain(cell) for cell in row.cells()))
    if any(row.depth.source == "declare" for row in rows):
        table.caption = "without the management API, not known: unacked, moving, in/s, acked/s"
    console.print(table)


def _age(seconds: float) -> str:
    """A time as people say it: of two units, the second one is whole."""
    whole = int(seconds)
    for size, unit, smaller, lower in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit} {whole % size // smaller}{lower}"
    return f"{whole}s"

"""`rpcq events`: who listens to what, events as they come, and events by hand."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from pydantic import ConfigDict
from rich.console import Console
from rich.table import Table

from rpcq import logs
from rpcq.cli.calling import read_parameters
from rpcq.cli.looking import ask_workers
from rpcq.cli.options import CLIENT, Json, Level, LogLevel, Namespace, Url, Wait, default_name, given
from rpcq.cli.text import plain, print_json
from rpcq.client import Client
from rpcq.control import WorkerInfo
from rpcq.environment import broker_url, options_from
from rpcq.errors import BrokerError, ConfigurationError
from rpcq.event_types import MAX_VERSION, Event, check_event_name, check_pattern
from rpcq.options import ClientOptions, check_seconds
from rpcq.runtime.process import run
from rpcq.terminal import printable_json
from rpcq.transport.base import Delivery, Listener, Subscription
from rpcq.transport.opening import open_transport
from rpcq.url import parse
from rpcq.wire import bodies
from rpcq.wire.bodies import text
from rpcq.wire.events import EventTopology, Publication
from rpcq.wire.jobs import read_job
from rpcq.wire.properties import MalformedProperties

console = Console(highlight=False)

events = typer.Typer(
    name="events", no_args_is_help=True, help="List who listens to which events, watch events, and publish one."
)


@events.command("list")
def list_subscriptions(
    service: Annotated[str | None, typer.Argument(help="Only the subscriptions of this service.")] = None,
    url: Url = None,
    wait: Wait = 1.0,
    namespace: Namespace = None,
    as_json: Json = False,
    log_level: LogLevel = Level.WARNING,
) -> None:
    """List what running workers subscribe to. What earlier deploys have left is shown by `rpcq topology show`."""
    logs.configure(log_level.upper())
    check_seconds("--wait", wait)
    workers, _ = ask_workers("events", service, url, namespace, wait)
    found = _subscriptions(service, workers)
    if as_json:
        print_json({"subscriptions": found})
    elif not workers:
        console.print(f"no worker answered within {wait:g} s", style="yellow")
    elif not found:
        console.print("the workers have no subscriptions", style="yellow")
    else:
        table = Table("pattern", "subscription", "events", "workers", "queue")
        for it in found:
            queue = it["queue"] or "of each process"
            cells = it["pattern"], it["subscription"], ", ".join(it["events"]) or "any", it["workers"], queue
            table.add_row(*(plain(cell) for cell in cells))
        console.print(table)


def _subscriptions(service: str | None, workers: list[WorkerInfo]) -> list[dict[str, Any]]:
    """Each pattern of each subscription once, with the number of workers: two generations may differ."""
    count: dict[tuple[str, str, tuple[str, ...], str], int] = defaultdict(int)
    for worker in workers:
        for info in worker.services:
            for each in info.subscriptions if service in (None, info.name) else ():
                for pattern in each.patterns:
                    count[pattern, f"{info.name}.{each.name}", each.events, each.queue] += 1
    return [
        {"pattern": pattern, "subscription": label, "events": list(kinds), "workers": number, "queue": queue}
        for (pattern, label, kinds, queue), number in sorted(count.items())
    ]


@events.command()
def tail(
    patterns: Annotated[
        list[str] | None, typer.Argument(help="Names of events, or patterns, such as 'order.*'.", show_default="#")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="End after so many events.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each event, one a line.")] = False,
    url: Url = None,
    namespace: Namespace = None,
    log_level: LogLevel = Level.WARNING,
) -> None:
    """Print events as they are published, until Ctrl-C; subscriptions get them all the same.

    They come through a queue that lasts as long as the command. While it runs, each event that its patterns take
    counts as heard.
    """
    logs.configure(log_level.upper())
    wanted = [check_pattern(pattern) for pattern in patterns or ["#"]]
    options = options_from(ClientOptions, given(namespace=namespace, name=default_name("events")))
    found = broker_url(url)
    if parse(found).scheme == "memory":
        raise ConfigurationError("the broker must be RabbitMQ; got the in-process broker: no other process sees it")
    run(_tail(found, options, wanted, limit, as_json=as_json))


async def _tail(url: str, options: ClientOptions, patterns: list[str], limit: int | None, *, as_json: bool) -> None:
    topology, done = EventTopology(options.namespace), asyncio.Event()
    seen = 0

    def show(delivery: Delivery) -> None:
        nonlocal seen
        if limit is None or seen < limit:
            seen += 1
            _print(delivery, as_json=as_json)
        delivery.ack()
        if seen == limit:
            done.set()

    def lost(cause: BrokerError) -> None:
        logs.get_logger("rpcq.events").warning("the connection is lost; events may be missing here", cause=str(cause))

    nothing = lambda *_: None  # noqa: E731 - three times the same
    listener = Listener(nothing, lost, nothing, nothing, nothing)
    transport = open_transport(url, options)
    queue = Subscription(topology.instance_queue(patterns), show, prefetch=100)
    await transport.start(topology.exchanges(), [queue], listener)
    try:
        await done.wait()
    finally:
        await transport.close()


def _print(delivery: Delivery, *, as_json: bool) -> None:
    try:
        job = read_job(delivery.properties, delivery.body or b"", redelivered=False)
    except MalformedProperties as error:
        console.print(plain(f"an event that cannot be read: {error}", "yellow"), soft_wrap=True)
        return
    sent = None if job.first_sent_ms is None else datetime.fromtimestamp(job.first_sent_ms / 1000, UTC)
    try:
        data = bodies.loads(job.body)
    except ValueError:
        data = text(job.body)
    fields = {
        "time": None if sent is None else sent.isoformat(timespec="milliseconds"),
        "event": job.name,
        "version": job.version or 1,
        "id": job.id,
        "from": job.app_id or None,
        "data": data,
    }
    if as_json:
        print_json(fields)
        return
    head = f"{'-' if sent is None else f'{sent:%H:%M:%S}'} {job.name}"
    line = printable_json(json.dumps(data, ensure_ascii=False))
    console.print(plain(head, "bold"), plain(f"version {fields['version']}, {job.id} {line}"), soft_wrap=True)


@events.command()
def publish(
    event: Annotated[str, typer.Argument(help="The event's name, such as order.created.")],
    fields: Annotated[
        list[str] | None,
        typer.Argument(
            help="field=value for each field. A value that is not valid JSON is text. A single - reads all fields from "
            "standard input, as a JSON object."
        ),
    ] = None,
    version: Annotated[int, typer.Option(help="The version of the event.")] = 1,
    key: Annotated[str | None, typer.Option(help="An idempotency key.", show_default="a new one")] = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            envvar="RPCQ_TIMEOUT", help="Seconds until the broker has it.", show_default=f"{CLIENT.timeout:g}"
        ),
    ] = None,
    as_json: Json = False,
    url: Url = None,
    namespace: Namespace = None,
    log_level: LogLevel = Level.WARNING,
) -> None:
    """Publish an event by its name. Its fields are not checked here: a subscriber that they do not fit buries it."""
    logs.configure(log_level.upper())
    args, params = read_parameters(fields or [])
    if args:
        raise ConfigurationError(f"fields must be given by name, as in order_id=7; got {args[0]!r}")

    check_event_name("the name of an event", event)
    if not 1 <= version <= MAX_VERSION:
        raise ConfigurationError(f"--version must be a whole number from 1; got {version}")

    class Typed(Event, name=event, version=version):
        """An event whose class is not here."""

        model_config = ConfigDict(extra="allow")

    async def once() -> Publication:
        async with Client(url, **given(timeout=timeout, namespace=namespace, name=default_name("events"))) as client:
            return await client.with_options(idempotency_key=key).publish(Typed(**params))

    published = run(once())
    if as_json:
        print_json(
            {"id": published.id, "event": event, "version": version, "key": published.key, "heard": published.heard}
        )
        return
    heard = {True: "", False: "; nobody listens", None: "; whether anybody listens is not known"}[published.heard]
    console.print(plain(f"published {event} as {published.id}{heard}"), soft_wrap=True)

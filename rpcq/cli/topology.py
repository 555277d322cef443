"""`rpcq topology`: which queues and bindings there are, and which of them no running worker declares.

AMQP cannot list queues and bindings, so the management API is needed. What is deleted is looked at again over AMQP just
before: whether it is empty, and whether somebody consumes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from rpcq import logs
from rpcq.cli.asking import confirmed
from rpcq.cli.looking import ask_workers
from rpcq.cli.options import FAILED, Json, Level, LogLevel, ManagementUrl, Namespace, Url, Wait, errors, given
from rpcq.cli.text import plain, print_json
from rpcq.environment import broker_url, options_from
from rpcq.errors import BrokerUnreachable, ConfigurationError
from rpcq.events.stale import Found, look
from rpcq.observability.management import UNANSWERED, Management, management_of
from rpcq.options import ClientOptions, check_name, check_seconds
from rpcq.runtime.process import run
from rpcq.transport.opening import open_admin
from rpcq.transport.rabbitmq.admin import Admin
from rpcq.url import BrokerURL, parse
from rpcq.wire.events import EventTopology

console = Console(highlight=False)

topology = typer.Typer(
    name="topology",
    no_args_is_help=True,
    help="Show the queues and bindings of jobs and events, and delete those that no running worker declares.",
)

Services = Annotated[
    list[str] | None,
    typer.Argument(help="Only these services, also if no worker of them runs.", show_default="those with a worker"),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only list what is meant.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")]
Force = Annotated[bool, typer.Option("--force", help="Delete queues with messages, too: their messages are lost.")]


@dataclass(frozen=True, slots=True)
class _Seen:
    """A broker, and what was found there."""

    broker: BrokerURL
    options: ClientOptions
    names: EventTopology
    found: Sequence[Found]


def _look(
    services: list[str] | None, url: str | None, namespace: str | None, management: str | None, wait: float
) -> _Seen:
    """Ask the workers and the management API.

    Raises:
        ConfigurationError: there is no management API to ask.
        BrokerUnreachable: it does not answer.

    """
    check_seconds("--wait", wait)
    for service in services or ():
        check_name("the name of a service", service)
    options = options_from(ClientOptions, given(namespace=namespace))
    broker = parse(broker_url(url))
    if broker.scheme == "memory":
        raise ConfigurationError("the broker must be RabbitMQ; got the in-process broker: no other process sees it")
    api = management_of(broker, management)
    if api is None:
        raise ConfigurationError("give the URL of the management API with --management: AMQP cannot list queues")
    names = EventTopology(options.namespace)
    workers, _ = ask_workers("topology", None, url, namespace, wait)
    infos = [info for worker in workers for info in worker.services]
    try:
        queues, bindings = _listed(api, names, options.namespace)
    except UNANSWERED as error:
        raise BrokerUnreachable(f"the management API did not answer: {error}") from error
    return _Seen(broker, options, names, look(names, infos, queues, bindings, services or ()))


def _listed(api: Management, names: EventTopology, namespace: str) -> tuple[list[str], list[tuple[str, str]]]:
    return api.queues(f"{namespace}."), api.bindings(names.events.name)


@topology.command()
def show(
    services: Services = None,
    as_json: Json = False,
    management: ManagementUrl = None,
    wait: Wait = 1.0,
    url: Url = None,
    namespace: Namespace = None,
    log_level: LogLevel = Level.ERROR,
) -> None:
    """List the queues of jobs and events, and what the queues of events are bound to. `stale` is left of a deploy."""
    logs.configure(log_level.upper())
    seen = _look(services, url, namespace, management, wait)
    found = [it for it in seen.found if not services or it.service in services]
    if as_json:
        print_json({"topology": [asdict(it) for it in found]})
    elif not found:
        console.print(plain(f"no queues of jobs and events in namespace {seen.options.namespace!r}", "yellow"))
    else:
        console.print(_table(found))


@topology.command()
def prune(
    services: Services = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    force: Force = False,
    as_json: Json = False,
    management: ManagementUrl = None,
    wait: Wait = 1.0,
    url: Url = None,
    namespace: Namespace = None,
    log_level: LogLevel = Level.ERROR,
) -> None:
    """Delete the queues and bindings that no running worker declares, of services that run, or that are named.

    A queue that holds messages stays, unless --force is given, and one that somebody consumes stays in any case; then
    the exit code is 1. A service whose workers are all stopped is left alone unless it is named. Queues of dead
    letters, and what all services share, always stay.
    """
    logs.configure(log_level.upper())
    seen = _look(services, url, namespace, management, wait)
    stale = [it for it in seen.found if it.is_stale]
    if dry_run or not stale:
        if as_json:
            print_json({"stale": [asdict(it) for it in stale]})
        else:
            console.print(_table(stale) if stale else plain("nothing is stale", "yellow"))
        return
    if not as_json or not yes:
        errors.print(_table(stale))
    if not yes and not confirmed(f"Delete these {len(stale)}?"):
        raise typer.Exit(FAILED)
    stays = run(_prune(seen, stale, force=force))
    if as_json:
        gone = [asdict(it) for it in stale if it not in stays]
        print_json({"deleted": gone, "stays": [asdict(it) | {"why": why} for it, why in stays.items()]})
    else:
        console.print(plain(f"deleted {len(stale) - len(stays)} of {len(stale)}"))
        for it, why in stays.items():
            errors.print(plain(f"{it.queue}:", "red"), plain(why), soft_wrap=True)
    if stays:
        raise typer.Exit(FAILED)


async def _prune(seen: _Seen, stale: Sequence[Found], *, force: bool) -> dict[Found, str]:
    """Delete; returns what stays, and why."""
    stays: dict[Found, str] = {}
    async with open_admin(seen.broker, seen.options, *seen.broker.hosts[0]) as admin:
        for it in stale:
            if it.pattern:
                await admin.unbind(it.queue, seen.names.events.name, it.pattern)
            elif why := await _delete(admin, it.queue, force=force):
                stays[it] = why
    return stays


async def _delete(admin: Admin, queue: str, *, force: bool) -> str:
    """Delete a queue; returns why not, or an empty string."""
    state = await admin.queue(queue)
    if state is None:
        return ""
    if state.consumers:
        return f"{state.consumers} consumers: a worker that did not answer may need it"
    if state.messages and not force:
        return f"it holds {state.messages} messages: let a worker take them, or give --force to lose them"
    await admin.delete([queue])
    return ""


def _table(found: Sequence[Found]) -> Table:
    table = Table("service", "queue", "bound to", "")
    for it in found:
        cells = it.service, it.queue, it.pattern or "-", "stale" if it.is_stale else ""
        table.add_row(*(plain(cell) for cell in cells))
    return table

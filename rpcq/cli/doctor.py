"""`rpcq doctor` and `rpcq setup`: whether a broker can be used as rpcq uses it, and making it so."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Final, get_args

import typer
from rich.console import Console

from rpcq import logs
from rpcq.cli.options import FAILED, Level, LogLevel, Namespace, Url, given
from rpcq.cli.serving import load_services
from rpcq.cli.text import plain
from rpcq.client import Client
from rpcq.environment import broker_url, options_from, settings
from rpcq.errors import (
    AccessRefused,
    AuthenticationFailed,
    BrokerError,
    BrokerUnreachable,
    NotFound,
    ResourceLocked,
    TopologyMismatch,
    VhostNotFound,
)
from rpcq.observability.management import UNANSWERED, Management, management_of
from rpcq.options import ClientOptions
from rpcq.runtime.process import run
from rpcq.service import Service
from rpcq.transport.opening import open_admin
from rpcq.url import BrokerURL, mask, parse
from rpcq.wire.topology import MAX_LENGTH, Queue, QueueType, Topology

if TYPE_CHECKING:
    from rpcq.transport.rabbitmq.admin import Admin

OLDEST: Final = (3, 10)
"""The oldest RabbitMQ that is supported."""

UNCOUNTED_FROM: Final = (4, 3)
"""The first RabbitMQ that takes requests back from consumers on lost nodes without counting a delivery."""

DISCONNECTED: Final = "consumer-disconnected-timeout"
"""The key of a policy, in milliseconds, for how long it waits before it does."""

CLOCKS_APART: Final = 1.0
"""Seconds that two clocks may differ without a word."""

NEARLY_FULL: Final = 50_000
"""Messages in a request queue, half of what it takes, that are worth a word."""

MENDS: Final[dict[type[BrokerError], str]] = {
    BrokerUnreachable: "is the broker running, is this its address, and may this machine reach it?",
    AuthenticationFailed: "check user and password: rabbitmqctl authenticate_user USER PASSWORD",
    VhostNotFound: "make it, and let the user in: rabbitmqctl add_vhost VHOST; rabbitmqctl set_permissions ...",
    AccessRefused: "give the user what rpcq needs: see 'Least privilege' in the documentation on security",
    NotFound: "declare it with 'rpcq setup', or start a worker",
    ResourceLocked: "close the connection that has it: rabbitmqctl list_connections pid name",
    TopologyMismatch: "delete the queue when it is empty, and let a worker or 'rpcq setup' declare it anew",
}

console = Console(highlight=False)

Services = Annotated[
    list[str] | None, typer.Argument(help="Services whose queues are meant: module:service, none or more.")
]


class Grade(Enum):
    """How a check ended."""

    GOOD = "[green]ok  [/]"
    DOUBT = "[yellow]warn[/]"
    BAD = "[red]bad [/]"


@dataclass(frozen=True, slots=True)
class Found:
    """What one check found, and the mend where there is something to mend."""

    grade: Grade
    text: str
    mend: str = ""


Findings = AsyncIterator[Found]


def doctor(
    services: Services = None,
    url: Url = None,
    namespace: Namespace = None,
    management: Annotated[
        str | None,
        typer.Option(
            envvar="RPCQ_MANAGEMENT",
            metavar="URL",
            help="The management API, such as http://localhost:15672; asked at RabbitMQ's own port if not given.",
        ),
    ] = None,
    log_level: LogLevel = Level.ERROR,
) -> None:
    """Check that the broker can be reached and used, queues are as they should be, and clocks agree; say the mend.

    The exit code is 1 if something is wrong.
    """
    logs.configure(log_level.upper())
    options = options_from(ClientOptions, given(namespace=namespace))
    broker = parse(broker_url(url))
    found = load_services(services or [])

    async def examine() -> bool:
        good = True
        async for finding in _examine(broker, broker_url(url), options, found, management):
            good = good and finding.grade is not Grade.BAD
            console.print(finding.grade.value, plain(finding.text), soft_wrap=True)
            if finding.mend:
                console.print("      ", plain(finding.mend, "dim"), soft_wrap=True)
        return good

    if not run(examine()):
        raise typer.Exit(FAILED)


async def _examine(
    broker: BrokerURL, url: str, options: ClientOptions, services: list[Service], management: str | None
) -> Findings:
    yield _settings(url, options)
    if broker.scheme == "memory":
        yield Found(Grade.GOOD, "memory:// is a broker inside each process: there is nothing to reach")
        return
    reached = 0
    for host, port in broker.hosts:
        try:
            async with open_admin(broker, options, host, port) as admin:
                reached += 1
                yield Found(Grade.GOOD, f"{host}:{port} answers{' over TLS' if admin.is_encrypted else ''}")
                yield _version(admin)
                async for finding in _exchanges(admin, Topology(options.namespace), options):
                    yield finding
                for service in services if reached == 1 else ():
                    queue = Topology(options.namespace).request_queue(service.name, service.queue_type, service.queue)
                    yield await _queue(admin, queue)
                    async for finding in _others(admin, Topology(options.namespace), service, queue):
                        yield finding
                    if service.queue_type == "quorum" and _numbers(admin) >= UNCOUNTED_FROM:
                        yield await _policy(management_of(broker, management), queue.name, options)
        except BrokerError as error:
            yield Found(Grade.BAD, f"{host}:{port}: {error}", MENDS.get(type(error), ""))
    if reached:
        async for finding in _as_client(url, options, services):
            yield finding


def _settings(url: str, options: ClientOptions) -> Found:
    here = [it.variable for it in settings() if os.environ.get(it.variable)]
    source = f"; from the environment: {', '.join(here)}" if here else ""
    return Found(Grade.GOOD, f"settings: {mask(url)}, namespace {options.namespace!r}{source}")


def _version(admin: Admin) -> Found:
    told = f"{admin.product} {admin.version}"
    if admin.product != "RabbitMQ":
        return Found(Grade.DOUBT, told, "rpcq is tested with RabbitMQ alone")
    numbers = _numbers(admin)
    if not numbers:
        return Found(Grade.DOUBT, f"{told}: a version that says nothing")
    if numbers < OLDEST:
        return Found(Grade.BAD, f"{told} is too old", "use RabbitMQ 3.10 or later")
    return Found(Grade.GOOD, told)


def _numbers(admin: Admin) -> tuple[int, ...]:
    """The first two numbers of the broker's version; none where it says none."""
    found = re.match(r"(\d+)\.(\d+)", admin.version)
    return tuple(int(it) for it in found.groups()) if found else ()


async def _policy(management: Management | None, queue: str, options: ClientOptions) -> Found:
    """Whether a policy has the broker take requests back from lost nodes sooner than clients believe."""
    least = options.disconnected_timeout
    fix = f"give the URL of the management API with --management; {DISCONNECTED} must be at least {least * 1000:.0f}"
    if management is None:
        return Found(Grade.DOUBT, f"queue {queue}: the policy is not known, because there is no management API", fix)
    try:
        found = await asyncio.to_thread(management.queue, queue, ("effective_policy_definition",))
        policy = (found or {}).get("effective_policy_definition") or {}
        set_to = float(policy.get(DISCONNECTED, least * 1000)) / 1000
    except UNANSWERED as error:
        return Found(Grade.DOUBT, f"queue {queue}: the policy is not known, because its API failed: {error}", fix)
    if set_to >= least:
        return Found(Grade.GOOD, f"queue {queue}: no policy sets {DISCONNECTED} below {least:g} s")
    return Found(
        Grade.BAD,
        f"queue {queue}: a policy sets {DISCONNECTED} to {set_to:g} s, and clients count on {least:g} s: "
        "they may be told 'no' of what has run",
        f"take it out of the policy, or tell all clients: disconnected_timeout={set_to:g}",
    )


async def _exchanges(admin: Admin, topology: Topology, options: ClientOptions) -> Findings:
    """Whether the exchanges are of the types that they should be: topic permissions hold for topic exchanges alone."""
    for exchange in topology.exchanges(options.reply_exchange):
        try:
            if await admin.has_exchange(exchange.name):
                await admin.declare([exchange], [])
        except TopologyMismatch as error:
            fix = "stop the programs that use it, delete it, and declare it again with 'rpcq setup'"
            yield Found(Grade.BAD, str(error), fix)
        except AccessRefused:
            pass  # a user who may not declare it cannot compare it either


async def _queue(admin: Admin, queue: Queue) -> Found:
    """The state of a request queue, and whether its arguments are those that a worker declares."""
    state = await admin.queue(queue.name)
    if state is None:
        return Found(Grade.DOUBT, f"queue {queue.name}: not there", "start a worker, or declare it with 'rpcq setup'")
    told = f"queue {queue.name}: {state.messages} messages, {state.consumers} consumers"
    try:
        await admin.declare([], [replace(queue, bindings=())])
    except TopologyMismatch as error:
        return Found(Grade.BAD, str(error), MENDS[TopologyMismatch])
    except AccessRefused:
        told += "; its arguments cannot be checked by a user who may not declare it"
    if not state.consumers:
        return Found(Grade.BAD, told, "start a worker: until then, calls expire in the queue")
    if state.messages > NEARLY_FULL:
        return Found(Grade.DOUBT, told, f"it takes {MAX_LENGTH:,}; start more workers, or call less")
    return Found(Grade.GOOD, told)


async def _others(admin: Admin, topology: Topology, service: Service, queue: Queue) -> Findings:
    """The queue of the other kind, which the service had or has elsewhere: clients send to the quorum queue alone."""
    for kind in get_args(QueueType):
        other = topology.request_queue(service.name, kind).name
        if other != queue.name and (state := await admin.queue(other)) is not None:
            once = other if topology.delivers_once(other) else queue.name
            told = (
                f"queue {other}: is there as well, with {state.consumers} consumers: rpcq's clients send to {once} "
                "alone, and programs that send under the service's name reach both"
            )
            yield Found(
                Grade.BAD, told, f"stop the workers that consume it, and delete it; {queue.name} is the one meant"
            )


async def _as_client(url: str, options: ClientOptions, services: list[Service]) -> Findings:
    """Use the broker as a client does, and ask the workers."""
    client = Client(url, **{it.name: getattr(options, it.name) for it in fields(options)})
    try:
        await client.connect()
    except BrokerError as error:
        yield Found(Grade.BAD, f"as a client: {error}", MENDS.get(type(error), ""))
        return
    try:
        yield Found(Grade.GOOD, "as a client: may declare and consume a reply queue, and reach the exchanges")
        began = time.time()
        answers = [(stats, time.time()) async for stats in client.stats(wait=1.0)]
        found = [worker async for worker in client.workers(wait=1.0)]
    finally:
        await client.close()
    serving = {service.name for worker in found for service in worker.services}
    yield Found(Grade.GOOD, f"workers: {len(found)}, of {', '.join(sorted(serving)) or 'no service'}")
    for service in services:
        if service.name not in serving:
            yield Found(Grade.BAD, f"no worker of {service.name!r} answers", "start one: rpcq worker module:service")
    for stats, came in answers:
        # It was read somewhere between the question and the answer.
        apart = max(began - stats.time_ms / 1000, stats.time_ms / 1000 - came, 0.0)
        if apart > CLOCKS_APART:
            told = f"the clocks of this machine and of {stats.host} (process {stats.pid}) are {apart:.1f} s apart"
            yield Found(Grade.BAD, told, "synchronise them (NTP): deadlines travel as times of day")
    if answers:
        yield Found(Grade.GOOD, f"clocks: {len(answers)} workers compared, to {CLOCKS_APART:g} s")


def setup(
    services: Annotated[list[str], typer.Argument(help="Services whose queues are declared: module:service.")],
    url: Url = None,
    namespace: Namespace = None,
    reply_exchange: Annotated[
        str | None,
        typer.Option(envvar="RPCQ_REPLY_EXCHANGE", help="Declare this exchange for replies as well."),
    ] = None,
    log_level: LogLevel = Level.WARNING,
) -> None:
    """Declare the exchanges and request queues of services, so that workers need not be allowed to. Changes nothing."""
    logs.configure(log_level.upper())
    options = options_from(ClientOptions, given(namespace=namespace, reply_exchange=reply_exchange))
    broker = parse(broker_url(url))
    found = load_services(services)
    for service in found:
        service.check()
    topology = Topology(options.namespace)
    exchanges = topology.exchanges(options.reply_exchange)
    queues = [topology.request_queue(service.name, service.queue_type, service.queue) for service in found]

    async def declare() -> list[str]:
        host, port = broker.hosts[0]
        async with open_admin(broker, options, host, port) as admin:
            return await admin.declare(exchanges, queues)

    declared = run(declare())
    told = f"exchanges {', '.join(it.name for it in exchanges)}; queues {', '.join(declared)}"
    console.print(plain(told), soft_wrap=True)

"""`rpcq doctor` and `rpcq setup`: check that rpcq can use a broker, and declare what it needs there."""

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
from rpcq.cli.options import FAILED, Level, LogLevel, ManagementUrl, Namespace, Url, given
from rpcq.cli.serving import load_services
from rpcq.cli.text import plain
from rpcq.client import Client
from rpcq.environment import URL, URL_FILE, broker_url, options_from, settings
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
from rpcq.events import queues as every
from rpcq.jobs.ticking import schedules_of
from rpcq.observability.management import UNANSWERED, Management, management_of
from rpcq.options import ClientOptions
from rpcq.runtime.process import run
from rpcq.service import Service
from rpcq.transport.opening import open_admin
from rpcq.url import BrokerURL, mask, parse
from rpcq.wire.events import EventTopology
from rpcq.wire.topology import MAX_LENGTH, Exchange, Queue, QueueType, Topology

if TYPE_CHECKING:
    from rpcq.transport.rabbitmq.admin import Admin, QueueState

OLDEST: Final = (3, 10)
"""The oldest RabbitMQ that is supported."""

UNCOUNTED_FROM: Final = (4, 3)
"""The first RabbitMQ that requeues requests of consumers on lost nodes without counting a delivery."""

DISCONNECTED: Final = "consumer-disconnected-timeout"
"""The key of a policy for how long RabbitMQ waits before that, in milliseconds."""

CLOCKS_APART: Final = 1.0
"""Seconds that two clocks may differ without a finding."""

NEARLY_FULL: Final = 50_000
"""Messages in a request queue that cause a warning: half of its limit."""

FIXES: Final[dict[type[BrokerError], str]] = {
    BrokerUnreachable: "check that the broker runs, that this is its address, and that this machine can reach it",
    AuthenticationFailed: "check user and password: rabbitmqctl authenticate_user USER PASSWORD",
    VhostNotFound: "create it and its permissions: rabbitmqctl add_vhost VHOST; rabbitmqctl set_permissions ...",
    AccessRefused: "give the user the permissions in 'Least privilege', in the documentation on security",
    NotFound: "declare it with 'rpcq setup', or start a worker",
    ResourceLocked: "close the connection that owns it: rabbitmqctl list_connections pid name",
    TopologyMismatch: "delete the queue when it is empty; a worker or 'rpcq setup' then declares it again",
}

console = Console(highlight=False)

Services = Annotated[list[str] | None, typer.Argument(help="Services whose queues to check: module:service.")]


class Grade(Enum):
    """The result of a check."""

    GOOD = "[green]ok  [/]"
    DOUBT = "[yellow]warn[/]"
    BAD = "[red]bad [/]"


@dataclass(frozen=True, slots=True)
class Found:
    """What one check found, and how to fix it."""

    grade: Grade
    text: str
    fix: str = ""


Findings = AsyncIterator[Found]


def doctor(
    services: Services = None,
    url: Url = None,
    namespace: Namespace = None,
    management: ManagementUrl = None,
    log_level: LogLevel = Level.ERROR,
) -> None:
    """Check that the broker can be used, its queues have the right arguments, and clocks agree; suggest fixes.

    The exit code is 1 if something is wrong.
    """
    logs.configure(log_level.upper())
    options = options_from(ClientOptions, given(namespace=namespace))
    address = broker_url(url)
    broker = parse(address)
    found = load_services(services or [])

    async def examine() -> bool:
        good = True
        async for finding in _examine(broker, address, _source_of(url), options, found, management):
            good = good and finding.grade is not Grade.BAD
            console.print(finding.grade.value, plain(finding.text), soft_wrap=True)
            if finding.fix:
                console.print("      ", plain(finding.fix, "dim"), soft_wrap=True)
        return good

    if not run(examine()):
        raise typer.Exit(FAILED)


def queue_of(topology: Topology, service: Service) -> Queue:
    """The request queue of a service, as its worker declares it."""
    return topology.request_queue(service.name, service.queue_type, service.queue, declare=service.declare_queue)


async def _examine(
    broker: BrokerURL, url: str, source: str, options: ClientOptions, services: list[Service], management: str | None
) -> Findings:
    yield _settings(url, source, options)
    if broker.scheme == "memory":
        yield Found(Grade.GOOD, "memory:// is a broker inside each process: there is no connection to check")
        return
    called = [service for service in services if service.is_called]
    reached = 0
    for host, port in broker.hosts:
        try:
            async with open_admin(broker, options, host, port) as admin:
                reached += 1
                yield Found(Grade.GOOD, f"{host}:{port} answers{' over TLS' if admin.is_encrypted else ''}")
                yield _version(admin)
                async for finding in _exchanges(admin, Topology(options.namespace).exchanges(options.reply_exchange)):
                    yield finding
                async for finding in _jobs(admin, EventTopology(options.namespace), services if reached == 1 else []):
                    yield finding
                for service in called if reached == 1 else ():
                    queue = queue_of(Topology(options.namespace), service)
                    yield await _queue(admin, queue)
                    async for finding in _others(admin, Topology(options.namespace), service, queue):
                        yield finding
                    if service.queue_type == "quorum" and _numbers(admin) >= UNCOUNTED_FROM:
                        yield await _policy(management_of(broker, management), queue.name, options)
        except BrokerError as error:
            yield Found(Grade.BAD, f"{host}:{port}: {error}", FIXES.get(type(error), ""))
    if reached:
        async for finding in _as_client(url, options, services):
            yield finding


def _settings(url: str, source: str, options: ClientOptions) -> Found:
    here = [it.variable for it in settings() if os.environ.get(it.variable) and it.variable not in (URL, URL_FILE)]
    others = f"; also from the environment: {', '.join(here)}" if here else ""
    return Found(Grade.GOOD, f"settings: {mask(url)} (from {source}), namespace {options.namespace!r}{others}")


def _source_of(url: str | None) -> str:
    """Where the URL comes from: the option, or the variable that is set."""
    if url:
        return "--url"
    path = os.environ.get(URL_FILE)
    return f"{URL_FILE}, {path}" if path else URL


def _version(admin: Admin) -> Found:
    broker = f"{admin.product} {admin.version}"
    if admin.product != "RabbitMQ":
        return Found(Grade.DOUBT, broker, "rpcq is tested only with RabbitMQ")
    numbers = _numbers(admin)
    if not numbers:
        return Found(Grade.DOUBT, f"{broker}: this version is not known")
    if numbers < OLDEST:
        return Found(Grade.BAD, f"{broker} is too old", "use RabbitMQ 3.10 or later")
    return Found(Grade.GOOD, broker)


def _numbers(admin: Admin) -> tuple[int, ...]:
    """The first two numbers of the broker's version; an empty tuple if it has none."""
    found = re.match(r"(\d+)\.(\d+)", admin.version)
    return tuple(int(it) for it in found.groups()) if found else ()


async def _policy(management: Management | None, queue: str, options: ClientOptions) -> Found:
    """Check that no policy makes the broker requeue requests from lost nodes earlier than clients assume."""
    least = options.disconnected_timeout
    fix = f"give the URL of the management API with --management; {DISCONNECTED} must be at least {least * 1000:.0f}"
    if management is None:
        return Found(Grade.DOUBT, f"queue {queue}: the policy is not known, because there is no management API", fix)
    try:
        found = await asyncio.to_thread(management.queue, queue, ("effective_policy_definition",))
        policy = (found or {}).get("effective_policy_definition") or {}
        set_to = float(policy.get(DISCONNECTED, least * 1000)) / 1000
    except UNANSWERED as error:
        return Found(
            Grade.DOUBT, f"queue {queue}: the policy is not known, because the management API failed: {error}", fix
        )
    if set_to >= least:
        return Found(Grade.GOOD, f"queue {queue}: no policy sets {DISCONNECTED} below {least:g} s")
    return Found(
        Grade.BAD,
        f"queue {queue}: a policy sets {DISCONNECTED} to {set_to:g} s, and clients assume {least:g} s: "
        "an error may have executed='no' although the request has run",
        f"remove it from the policy, or set disconnected_timeout={set_to:g} in all clients",
    )


async def _exchanges(admin: Admin, exchanges: list[Exchange]) -> Findings:
    """Check the types of the exchanges: topic permissions have an effect only on topic exchanges."""
    for exchange in exchanges:
        try:
            if await admin.has_exchange(exchange.name):
                await admin.declare([replace(exchange, bindings=())], [])
        except TopologyMismatch as error:
            fix = "stop the programs that use it, delete it, and declare it again with 'rpcq setup'"
            yield Found(Grade.BAD, str(error), fix)
        except AccessRefused:
            pass  # a user who may not declare an exchange cannot compare it


async def _queue(admin: Admin, queue: Queue) -> Found:
    """Check a request queue."""
    state, found = await _state(admin, queue)
    if state is None or found.grade is not Grade.GOOD:
        return found
    if not state.consumers:
        return Found(Grade.BAD, found.text, "start a worker: until then, calls expire in the queue")
    if state.messages > NEARLY_FULL:
        return Found(
            Grade.DOUBT, found.text, f"its limit is {MAX_LENGTH:,} messages; start more workers, or make fewer calls"
        )
    return found


async def _state(admin: Admin, queue: Queue) -> tuple[QueueState | None, Found]:
    """The state of a queue, and whether it exists with the arguments that a worker declares."""
    try:
        state = await admin.queue(queue.name)
    except AccessRefused:  # RabbitMQ 4.3: the user has no permission on it
        return None, Found(Grade.GOOD, f"queue {queue.name}: not checked, because the user may not ask for it")
    if state is None:
        fix = "start a worker, or declare it with 'rpcq setup'"
        return None, Found(Grade.DOUBT, f"queue {queue.name}: does not exist", fix)
    text = f"queue {queue.name}: {state.messages} messages, {state.consumers} consumers"
    try:
        await admin.declare([], [replace(queue, bindings=())])
    except TopologyMismatch as error:
        return state, Found(Grade.BAD, str(error), FIXES[TopologyMismatch])
    except AccessRefused:
        text += "; its arguments are not checked, because the user may not declare it"
    return state, Found(Grade.GOOD, text)


async def _jobs(admin: Admin, events: EventTopology, services: list[Service]) -> Findings:
    """Check what services with jobs or subscriptions need: exchanges, the ladder of delay queues, and their queues."""
    async for finding in _exchanges(admin, every.exchanges(events, services)):
        yield finding
    services = [service for service in services if service.takes_jobs]
    if not services:
        return
    topology = events.jobs
    delays = topology.ladder.queues()
    found = [(await _state(admin, queue))[1] for queue in delays]
    for finding in found:
        if finding.grade is not Grade.GOOD:
            yield finding
    if all(finding.grade is Grade.GOOD for finding in found):
        yield Found(Grade.GOOD, f"queues {delays[0].name} to {delays[-1].name}: all {len(delays)} exist")
    kept = {topology.lost.name: "lost messages: rpcq dlq list --lost"}
    queues = [queue for queue in topology.shared_queues() if queue.name in kept]
    for service in services:
        dead = every.dead(events, service)
        kept[dead.name] = f"jobs that were not done: rpcq dlq list {service.name}"
        queues += [*every.waiting(events, service), dead]
        queues += [topology.tickets(service.name)] if schedules_of(service) else []
    for queue in queues:
        state, finding = await _state(admin, queue)
        if state is not None and finding.grade is Grade.GOOD:
            if queue.name in kept and state.messages:
                finding = Found(Grade.DOUBT, finding.text, f"look at these {kept[queue.name]}")
            elif queue.name not in kept and not state.consumers:
                finding = Found(Grade.BAD, finding.text, "start a worker: until then, jobs wait")
        yield finding


async def _others(admin: Admin, topology: Topology, service: Service, queue: Queue) -> Findings:
    """Check for a second queue of the service, of the other type: clients send only to the quorum queue."""
    for kind in get_args(QueueType):
        other = topology.request_queue(service.name, kind).name
        if other != queue.name and (state := await admin.queue(other)) is not None:
            once = other if topology.delivers_once(other) else queue.name
            text = (
                f"queue {other}: exists as well, with {state.consumers} consumers: rpcq's clients send only to {once}, "
                "and programs that send under the service's name reach both"
            )
            fix = f"stop the workers that consume it, and delete it; the service's queue is {queue.name}"
            yield Found(Grade.BAD, text, fix)


async def _as_client(url: str, options: ClientOptions, services: list[Service]) -> Findings:
    """Use the broker as a client does, and ask the workers."""
    client = Client(url, **{it.name: getattr(options, it.name) for it in fields(options)})
    try:
        await client.connect()
    except BrokerError as error:
        yield Found(Grade.BAD, f"as a client: {error}", FIXES.get(type(error), ""))
        return
    try:
        yield Found(Grade.GOOD, "as a client: may declare and consume a reply queue, and publish to the exchanges")
        began = time.time()
        answers = [(stats, time.time()) async for stats in client.stats(wait=1.0)]
        found = [worker async for worker in client.workers(wait=1.0)]
    finally:
        await client.close()
    serving = {service.name for worker in found for service in worker.services}
    yield Found(Grade.GOOD, f"workers: {len(found)}, of {', '.join(sorted(serving)) or 'no service'}")
    for service in services:
        if service.name not in serving:
            yield Found(
                Grade.BAD, f"no worker of {service.name!r} answers", "start a worker: rpcq worker module:service"
            )
    for stats, came in answers:
        # The worker read its clock at some time between the question and the answer.
        apart = max(began - stats.time_ms / 1000, stats.time_ms / 1000 - came, 0.0)
        if apart > CLOCKS_APART:
            text = f"the clocks of this machine and of {stats.host} (process {stats.pid}) are {apart:.1f} s apart"
            yield Found(Grade.BAD, text, "synchronise them (NTP): requests contain their deadline as a time of day")
    if answers:
        yield Found(Grade.GOOD, f"clocks: {len(answers)} workers compared, within {CLOCKS_APART:g} s")


def setup(
    services: Annotated[list[str], typer.Argument(help="Services whose queues to declare: module:service.")],
    url: Url = None,
    namespace: Namespace = None,
    reply_exchange: Annotated[
        str | None,
        typer.Option(envvar="RPCQ_REPLY_EXCHANGE", help="Also declare this exchange, for replies."),
    ] = None,
    log_level: LogLevel = Level.WARNING,
) -> None:
    """Declare the exchanges and queues of services, for workers without that permission. Changes nothing else."""
    logs.configure(log_level.upper())
    options = options_from(ClientOptions, given(namespace=namespace, reply_exchange=reply_exchange))
    broker = parse(broker_url(url))
    found = load_services(services)
    for service in found:
        service.check()
    topology = Topology(options.namespace)
    exchanges = topology.exchanges(options.reply_exchange)
    queues = [queue_of(topology, service) for service in found if service.methods]
    events = EventTopology(options.namespace)
    exchanges += every.exchanges(events, found)
    queues += every.shared(events, found)
    queues += [queue for service in found for queue in every.waiting(events, service)]
    queues += [events.jobs.tickets(service.name) for service in found if schedules_of(service)]

    async def declare() -> list[str]:
        host, port = broker.hosts[0]
        async with open_admin(broker, options, host, port) as admin:
            return await admin.declare(exchanges, queues)

    declared = run(declare())
    text = f"exchanges {', '.join(it.name for it in exchanges)}; queues {', '.join(declared)}"
    console.print(plain(text), soft_wrap=True)

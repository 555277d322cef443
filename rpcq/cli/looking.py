"""`rpcq list`, `rpcq describe` and `rpcq ping`: ask the workers what they serve."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import asdict
from typing import Annotated, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from rpcq import logs
from rpcq.cli.options import Json, Level, LogLevel, Namespace, Url, Wait, default_name, given
from rpcq.cli.text import plain, print_json
from rpcq.client import Client
from rpcq.control import JobInfo, MethodInfo, ServiceInfo, SubscriptionInfo, WorkerInfo, WorkerStats
from rpcq.errors import ServiceUnavailable
from rpcq.options import check_seconds
from rpcq.runtime.process import run
from rpcq.wire.job_queues import LANES, ORDERED_LANES

T = TypeVar("T")

console = Console(highlight=False)


def list_services(
    url: Url = None,
    wait: Wait = 1.0,
    namespace: Namespace = None,
    as_json: Json = False,
    log_level: LogLevel = Level.WARNING,
) -> None:
    """List the services whose workers answer, with their workers, methods, jobs and subscriptions."""
    logs.configure(log_level.upper())
    check_seconds("--wait", wait)
    workers, stats = ask_workers("list", None, url, namespace, wait)
    if as_json:
        print_json({"workers": [asdict(it) for it in workers], "stats": [asdict(it) for it in stats]})
    elif not workers:
        console.print(f"no worker answered within {wait:g} s", style="yellow")
    else:
        console.print(_services_table(workers, stats))


def ask_workers(
    command: str, service: str | None, url: str | None, namespace: str | None, wait: float
) -> tuple[list[WorkerInfo], list[WorkerStats]]:
    """What the workers of a service say, or all workers: what they are, and in what state."""

    async def ask() -> tuple[list[WorkerInfo], list[WorkerStats]]:
        async with Client(url, **given(namespace=namespace, name=default_name(command))) as client:
            return await asyncio.gather(
                all_of(client.workers(service, wait=wait)), all_of(client.stats(service, wait=wait))
            )

    return run(ask())


async def all_of(answers: AsyncIterator[T]) -> list[T]:
    """All that workers answer."""
    return [answer async for answer in answers]


def _services_table(workers: list[WorkerInfo], stats: list[WorkerStats]) -> Table:
    in_flight = {(it.host, it.pid, it.name): it.in_flight for it in stats}
    by_name: dict[str, list[tuple[WorkerInfo, ServiceInfo]]] = defaultdict(list)
    for worker in workers:
        for service in worker.services:
            by_name[service.name].append((worker, service))
    columns = ["service", "queue", "workers", "slots", "methods", "jobs"]
    if with_events := any(service.subscriptions for worker in workers for service in worker.services):
        columns.append("subscriptions")
    table = Table(*columns)
    for name, found in sorted(by_name.items()):
        methods = sorted({method.name for _, service in found for method in service.methods})
        jobs = sorted({job.name for _, service in found for job in service.jobs})
        subscriptions = sorted({each.name for _, service in found for each in service.subscriptions})
        queues = sorted({queue for _, service in found for queue in _queues(service)})
        slots = sum(worker.prefetch for worker, service in found if service.queue in _queues(service))
        cells = [name, ", ".join(queues), len(found), slots, ", ".join(methods), ", ".join(jobs)]
        cells += [", ".join(subscriptions)] if with_events else []
        table.add_row(*(plain(cell) for cell in cells))
    total = sum(in_flight.values())
    table.caption = f"{len(workers)} workers, {total} requests in hand"
    return table


def _queues(service: ServiceInfo) -> list[str]:
    """The queues that a worker of the service consumes: no request queue if the service has no methods."""
    requests = [service.queue] if service.methods or not (service.jobs or service.subscriptions) else []
    jobs = [service.job_queue] if service.job_queue else []
    return [*requests, *jobs, *(each.queue for each in service.subscriptions if each.queue)]


def describe(
    service: Annotated[str, typer.Argument(help="The name of the service.")],
    url: Url = None,
    wait: Wait = 1.0,
    namespace: Namespace = None,
    as_json: Json = False,
    log_level: LogLevel = Level.WARNING,
) -> None:
    """Describe a service: its methods, jobs and subscriptions with their types and docstrings, and its workers."""
    logs.configure(log_level.upper())
    check_seconds("--wait", wait)

    async def ask() -> list[WorkerInfo]:
        async with Client(url, **given(namespace=namespace, name=default_name("describe"))) as client:
            return await all_of(client.workers(service, wait=wait))

    workers = run(ask())
    if not workers:
        raise ServiceUnavailable(f"no worker of {service!r} answered within {wait:g} s")
    if as_json:
        print_json({"workers": [asdict(it) for it in workers]})
        return
    versions: dict[ServiceInfo, list[WorkerInfo]] = defaultdict(list)
    for worker in workers:
        for info in worker.services:
            if info.name == service:
                versions[info].append(worker)
    if len(versions) > 1:
        console.print("its workers run different versions of the service", style="yellow")
    for info, those in versions.items():
        _print_service(info, those)


def _print_service(service: ServiceInfo, workers: list[WorkerInfo]) -> None:
    queues = _queues(service)
    kinds = [f"{service.queue_type} queue {service.queue}"] if service.queue in queues else []
    lanes = f", lanes {' and '.join(LANES)}" if service.lanes else ""
    lanes += f", ordered lanes {ORDERED_LANES[0]} to {ORDERED_LANES[-1]}" if service.ordered else ""
    kinds += [f"jobs: queue {service.job_queue}{lanes}"] if service.job_queue else []
    console.print(plain(service.name, "bold") + plain(f"  {'; '.join(kinds)}"), soft_wrap=True)
    functions: list[MethodInfo | JobInfo | SubscriptionInfo]
    functions = [*service.methods, *service.jobs, *service.subscriptions]
    for described in functions:
        console.print()
        console.print(" ", plain(described.name, "bold") + plain(described.signature), soft_wrap=True)
        for line in described.doc.splitlines():
            console.print("     ", plain(line), soft_wrap=True)
        for line in _marks(described):
            console.print("     ", plain(line, "dim"))
    console.print()
    for worker in workers:
        where = f"{worker.name} on {worker.host}, process {worker.pid}"
        prefetch = [f"prefetch {worker.prefetch}"] if service.queue in queues else []
        prefetch += [f"job prefetch {worker.job_prefetch}"] if service.job_queue or service.subscriptions else []
        line = f"worker {where}: rpcq {worker.version}, {', '.join(prefetch)}"
        console.print(" ", plain(line), soft_wrap=True)


def _marks(method: MethodInfo | JobInfo | SubscriptionInfo) -> list[str]:
    if isinstance(method, JobInfo | SubscriptionInfo):
        attempts = "never run again" if method.at_most_once else f"at most {method.max_attempts} attempts"
        how = f"{attempts}; runs at most {method.timeout:g} s each time"
        if isinstance(method, JobInfo):
            return [f"job, {how}"]
        where = "in each process" if method.each_instance else f"queue {method.queue}"
        events = [f"events: {', '.join(method.events)}"] if method.events else []
        return [f"subscription to {', '.join(method.patterns)}: {where}", *events, how]
    marks = []
    if method.idempotent:
        marks.append("idempotent")
    if method.timeout is not None:
        marks.append(f"runs at most {method.timeout:g} s")
    if method.errors:
        marks.append(f"errors: {', '.join(method.errors)}")
    return marks


def ping(
    service: Annotated[str, typer.Argument(help="The name of the service.")],
    worker: Annotated[
        str | None, typer.Option(help="Accept only a worker of this name; for health checks of one process.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for an answer.")] = 3.0,
    url: Url = None,
    namespace: Namespace = None,
    log_level: LogLevel = Level.ERROR,
) -> None:
    """Check that a worker of a service answers. The exit code is 0 if one answers, and 5 if none does."""
    logs.configure(log_level.upper())
    check_seconds("--timeout", timeout)

    async def ask() -> tuple[WorkerStats, float] | None:
        async with Client(url, **given(namespace=namespace, name="rpcq-ping")) as client:
            began = time.perf_counter()
            async with aclosing(client.stats(service, wait=timeout)) as answers:
                async for answer in answers:
                    if worker in (None, answer.name):
                        return answer, (time.perf_counter() - began) * 1000
        return None

    found = run(ask())
    if found is None:
        who = f"worker {worker!r} of {service!r}" if worker else f"worker of {service!r}"
        raise ServiceUnavailable(f"no {who} answered within {timeout:g} s")
    stats, ms = found
    console.print(
        plain(f"{stats.name} on {stats.host}, process {stats.pid}: {ms:.1f} ms, {stats.in_flight} requests in hand")
    )

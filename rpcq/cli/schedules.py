"""`rpcq schedules`: which jobs workers send by themselves, and when."""

from __future__ import annotations

import time
from datetime import UTC, datetime, tzinfo
from typing import Annotated
from zoneinfo import ZoneInfo

import typer
from rich.console import Console
from rich.table import Table

from rpcq import logs
from rpcq.cli.looking import ask_workers
from rpcq.cli.options import Json, Level, LogLevel, Namespace, Url, Wait
from rpcq.cli.text import plain, print_json
from rpcq.control import WorkerInfo, WorkerStats
from rpcq.options import check_seconds
from rpcq.schedules import Cron, read_schedule

console = Console(highlight=False)


def schedules(
    service: Annotated[str | None, typer.Argument(help="Only schedules of this service.")] = None,
    url: Url = None,
    wait: Wait = 1.0,
    namespace: Namespace = None,
    as_json: Json = False,
    log_level: LogLevel = Level.WARNING,
) -> None:
    """List the jobs that workers send by themselves, with their last and their next tick.

    What the workers answer is shown: a schedule whose workers are all gone is not.
    """
    logs.configure(log_level.upper())
    check_seconds("--wait", wait)
    workers, stats = ask_workers("schedules", service, url, namespace, wait)
    found = _found(service, workers, stats)
    if as_json:
        print_json({"schedules": found})
    elif not workers:
        console.print(f"no worker answered within {wait:g} s", style="yellow")
    elif not found:
        console.print("the workers have no jobs with a schedule", style="yellow")
    else:
        console.print(_table(found))


def _found(service: str | None, workers: list[WorkerInfo], stats: list[WorkerStats]) -> list[dict[str, str | None]]:
    """Each schedule once: workers of two generations may have different ones for a job."""
    last = {job: tick for it in stats for job, tick in it.ticks.items()}
    each = {
        (f"{info.name}.{job.name}", job.schedule, job.missed)
        for worker in workers
        for info in worker.services
        for job in info.jobs
        if job.schedule and service in (None, info.name)
    }
    now = round(time.time() * 1000)
    found = []
    for label, text, missed in sorted(each):
        schedule = read_schedule(text)
        zone = ZoneInfo(schedule.tz) if isinstance(schedule, Cron) else UTC
        following = None if schedule is None else schedule.next_after(now)
        found.append(
            {
                "job": label,
                "schedule": text,
                "missed": missed,
                "last": _moment(last.get(label), zone),
                "next": _moment(following, zone),
            }
        )
    return found


def _moment(ms: int | None, zone: tzinfo) -> str | None:
    return None if ms is None else datetime.fromtimestamp(ms / 1000, zone).isoformat(" ", "seconds")


def _table(found: list[dict[str, str | None]]) -> Table:
    table = Table("job", "schedule", "missed", "last tick", "next tick")
    for each in found:
        table.add_row(*(plain("-" if cell is None else cell) for cell in each.values()))
    return table

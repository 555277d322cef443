"""`rpcq dlq`: list, show, replay and purge dead letters, and messages whose queue is gone."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Final, TypeVar

import typer
from rich.console import Console

from rpcq import logs
from rpcq.cli.asking import confirmed
from rpcq.cli.options import FAILED, Json, Level, LogLevel, Namespace, Url, default_name, errors, given
from rpcq.cli.text import plain, print_json
from rpcq.dead_letters import MOST_LISTED, check_rate, check_to
from rpcq.environment import broker_url, options_from
from rpcq.errors import BrokerUnreachable, ConfigurationError, Executed
from rpcq.jobs.letters import DeadLetter, Wanted, parse_since
from rpcq.jobs.replaying import Letters, Replayer, open_letters
from rpcq.observability.management import UNANSWERED, Management
from rpcq.options import ClientOptions, check_name
from rpcq.runtime.process import run
from rpcq.transport.opening import open_admin, open_transport
from rpcq.url import parse
from rpcq.wire.events import EventTopology

T = TypeVar("T")

MOST_ERROR: Final = 200
"""Characters of an error that a list shows."""

console = Console(highlight=False)

dlq = typer.Typer(
    name="dlq",
    no_args_is_help=True,
    help="List, show, replay and purge dead letters, and messages whose queue is gone.",
)

Service = Annotated[str | None, typer.Argument(help="The service whose dead letters are meant.")]
Lost = Annotated[bool, typer.Option("--lost", help="Messages whose queue is gone, of all services.")]
Reasons = Annotated[list[str] | None, typer.Option("--reason", help="Only letters with this reason; may be repeated.")]
Jobs = Annotated[
    list[str] | None,
    typer.Option(
        "--job", help="Only this job or subscription: 'job' or 'service.job'; or only this event. May be repeated."
    ),
]
Since = Annotated[
    str | None,
    typer.Option(help="Only letters that died since: a duration such as 30m, 2h or 7d, or an ISO 8601 time."),
]
Ids = Annotated[
    list[str] | None, typer.Option("--id", help="Only the letter of the job with this ID; may be repeated.")
]
Lines = Annotated[bool, typer.Option("--json", help="Print one JSON object for each letter, one on each line.")]
Limit = Annotated[int | None, typer.Option(min=1, help="At most this many letters.")]
ListLimit = Annotated[
    int | None,
    typer.Option(min=1, help="At most this many letters.", show_default=f"{MOST_LISTED}; with --count, all"),
]
Count = Annotated[bool, typer.Option("--count", help="Print only how many letters of each job and reason there are.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only list the letters that are meant.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")]
ManagementUrl = Annotated[
    str | None,
    typer.Option(
        "--management",
        envvar="RPCQ_MANAGEMENT",
        metavar="URL",
        help="The management API, such as http://localhost:15672: without a service, all queues of dead letters.",
    ),
]


@dataclass(frozen=True, slots=True)
class Desk:
    """A broker and a namespace."""

    url: str
    options: ClientOptions

    @property
    def topology(self) -> EventTopology:
        """The names of the namespace."""
        return EventTopology(self.options.namespace)

    def queue(self, service: str | None, *, lost: bool) -> str:
        """The queue of a service's dead letters, or of what was lost.

        Raises:
            ConfigurationError: neither is given, or both are.

        """
        if lost:
            if service is not None:
                raise ConfigurationError(f"--lost is about messages of all services; got the service {service!r} too")
            return self.topology.jobs.lost.name
        if service is None:
            raise ConfigurationError("name a service, or give --lost")
        return self.topology.jobs.dead_queue(check_name("the name of a service", service)).name

    async def queues(self, service: str | None, management: str | None, *, lost: bool) -> list[str]:
        """The queue that is meant, or all queues of dead letters: only the management API knows them.

        Raises:
            ConfigurationError: nothing says which.
            BrokerUnreachable: the management API does not answer.

        """
        if service is not None or lost:
            return [self.queue(service, lost=lost)]
        broker = parse(self.url)
        if broker.scheme == "memory":
            open_admin(broker, self.options, *broker.hosts[0])  # raises an error that says why not
        if not management:
            msg = "name a service, or give --lost; or --management, because AMQP cannot list queues"
            raise ConfigurationError(msg)
        try:
            return await asyncio.to_thread(Management(broker, management).queues, f"{self.options.namespace}.dead.")
        except UNANSWERED as error:
            raise BrokerUnreachable(f"the management API did not answer: {error}") from error

    def letters(self, queue: str) -> AbstractAsyncContextManager[Letters]:
        """The letters of a queue, over a connection to the first node that can be reached.

        Raises:
            BrokerError: no node can be used; of the last one.

        """
        return open_letters(self.url, self.options, queue)


def _desk(url: str | None, namespace: str | None, log_level: Level) -> Desk:
    logs.configure(log_level.upper())
    options = options_from(ClientOptions, given(namespace=namespace, name=default_name("dlq")))
    found = broker_url(url)
    parse(found)
    return Desk(found, options)


def _wanted(
    reasons: list[str] | None, jobs: list[str] | None, since: str | None, ids: list[str] | None = None
) -> Wanted:
    return Wanted(
        reasons=frozenset(reasons or ()),
        jobs=frozenset(jobs or ()),
        ids=frozenset(ids or ()),
        since=None if since is None else parse_since(since, datetime.now(UTC)),
    )


@dlq.command("list")
def list_letters(
    service: Service = None,
    lost: Lost = False,
    reason: Reasons = None,
    job: Jobs = None,
    since: Since = None,
    ids: Ids = None,
    limit: ListLimit = None,
    count: Count = False,
    as_json: Lines = False,
    management: ManagementUrl = None,
    url: Url = None,
    namespace: Namespace = None,
    log_level: LogLevel = Level.ERROR,
) -> None:
    """List dead letters, the oldest first. They stay where they are."""
    desk = _desk(url, namespace, log_level)
    wanted = _wanted(reason, job, since, ids)
    counts: Counter[tuple[str, str, Executed]] = Counter()

    def show(letter: DeadLetter) -> None:
        if count:
            counts[letter.label, letter.reason, letter.executed] += 1
        else:
            _print(letter, as_json=as_json)

    async def look() -> None:
        left = limit or (sys.maxsize if count else MOST_LISTED)
        queues = await desk.queues(service, management, lost=lost)
        if not queues:
            _note("there are no queues of dead letters: workers with jobs declare them")
        for queue in queues:
            left -= await _list(desk, queue, wanted, left, show)
            if not left:
                break

    run(look())
    for (label, why, executed), number in counts.most_common():
        if as_json:
            print_json({"job": label, "reason": why, "executed": executed, "count": number})
        else:
            console.print(plain(f"{number:7}  {label}  {why}, executed: {executed}"), soft_wrap=True)


async def _list(desk: Desk, queue: str, wanted: Wanted, most: int, show: Callable[[DeadLetter], None]) -> int:
    """Show the wanted letters of a queue, at most so many; returns how many there are."""
    async with desk.letters(queue) as letters:
        bound = await _bound(letters)
        count = 0
        async with aclosing(letters.look(wanted, bound)) as found:
            async for letter in found:
                show(letter)
                count += 1
                if count == most:
                    break
        _note_missed(letters)
        if not count:
            _note(f"no letters in {queue!r}" if wanted.is_all else _none(queue, bound))
        elif letters.seen < bound and not letters.missed:
            _note(f"not looked at in {queue!r}: {_many(bound - letters.seen, 'letter')}; raise --limit")
        return count


@dlq.command()
def show(
    job_id: Annotated[str, typer.Argument(metavar="ID", help="The ID of the job.")],
    service: Service = None,
    lost: Lost = False,
    as_json: Json = False,
    management: ManagementUrl = None,
    url: Url = None,
    namespace: Namespace = None,
    log_level: LogLevel = Level.ERROR,
) -> None:
    """Show all of a dead letter: its headers, its properties and its body. It stays where it is.

    The exit code is 1 if there is none with this ID.
    """
    desk = _desk(url, namespace, log_level)

    async def look() -> int:
        count = 0
        for queue in await desk.queues(service, management, lost=lost):
            wanted = Wanted(ids=frozenset([job_id]))
            count += await _list(desk, queue, wanted, MOST_LISTED, lambda letter: _print_all(letter, as_json=as_json))
        return count

    if not run(look()):
        raise typer.Exit(FAILED)


@dlq.command()
def replay(
    service: Service = None,
    lost: Lost = False,
    to: Annotated[
        str | None,
        typer.Option(help="Send jobs to this service, or events to this SERVICE:SUBSCRIPTION, instead of their own."),
    ] = None,
    reason: Reasons = None,
    job: Jobs = None,
    since: Since = None,
    ids: Ids = None,
    limit: Limit = None,
    rate: Annotated[float | None, typer.Option(help="At most this many letters a second.")] = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: Lines = False,
    url: Url = None,
    namespace: Namespace = None,
    log_level: LogLevel = Level.ERROR,
) -> None:
    """Send the jobs of dead letters again, with their IDs and keys, from the first attempt.

    A letter is deleted once the broker has confirmed its job. One that no queue takes, or that the broker refuses,
    stays where it is, and the exit code is 1.
    """
    desk = _desk(url, namespace, log_level)
    wanted = _wanted(reason, job, since, ids)
    queue = desk.queue(service, lost=lost)
    check_to(to, "--to")
    check_rate(rate, "--rate")
    stay: Counter[str] = Counter()

    def report(letter: DeadLetter, why: str) -> None:
        if why:
            stay[why] += 1
        if as_json:
            print_json(letter.summary() | {"replayed": not why, "why": why or None})

    async def act(letters: Letters, bound: int, most: int) -> int:
        transport = open_transport(desk.url, desk.options)
        replayer = Replayer(letters, transport, to=to, rate=rate, report=report)
        try:
            await replayer.run(wanted, bound, most)
        finally:
            if not as_json:
                console.print(plain(f"replayed {_count(replayer.done, lost=lost)}"))
        return replayer.done + replayer.stay

    where = f"to {to!r}" if to else "to their services" if lost else f"to {service!r}"
    where += f", at most {rate:g} a second" if rate else ""
    _change(desk, queue, wanted, limit, f"replay {{}} {where}", act, lost=lost, dry_run=dry_run, yes=yes, json=as_json)
    for why, count in stay.items():
        errors.print(plain(f"{_count(count, lost=lost)} not replayed:", "red"), plain(why), soft_wrap=True)
    if stay:
        raise typer.Exit(FAILED)


@dlq.command()
def purge(
    service: Service = None,
    lost: Lost = False,
    reason: Reasons = None,
    job: Jobs = None,
    since: Since = None,
    ids: Ids = None,
    limit: Limit = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: Lines = False,
    url: Url = None,
    namespace: Namespace = None,
    log_level: LogLevel = Level.ERROR,
) -> None:
    """Delete dead letters for good: nobody does their jobs."""
    desk = _desk(url, namespace, log_level)
    wanted = _wanted(reason, job, since, ids)
    queue = desk.queue(service, lost=lost)

    async def act(letters: Letters, bound: int, most: int) -> int:
        deleted: list[str] = []

        def report(letter: DeadLetter) -> None:
            deleted.append(letter.job.id)
            if as_json:
                print_json(letter.summary() | {"deleted": True})

        await letters.purge(wanted, bound, most, report)
        if not as_json:
            console.print(plain(f"deleted {_count(len(deleted), lost=lost)}"))
        return len(deleted)

    _change(desk, queue, wanted, limit, "delete {} for good", act, lost=lost, dry_run=dry_run, yes=yes, json=as_json)


def _change(
    desk: Desk,
    queue: str,
    wanted: Wanted,
    limit: int | None,
    question: str,
    act: Callable[[Letters, int, int], Awaitable[int]],
    *,
    lost: bool,
    dry_run: bool,
    yes: bool,
    json: bool,
) -> None:
    """Count the letters that are meant, ask, and act on no more of them than was answered."""

    async def count() -> tuple[int, int]:
        async with desk.letters(queue) as letters:
            bound = await _bound(letters)
            if (wanted.is_all or yes) and not dry_run:
                return bound, min(bound, limit or bound)
        found = await _list(
            desk,
            queue,
            wanted,
            limit or bound or 1,
            (lambda letter: _print(letter, as_json=json)) if dry_run else lambda _: None,
        )
        return bound, found

    async def go() -> None:
        async with desk.letters(queue) as letters:
            acted = await act(letters, bound, most)
            _note_missed(letters)
            if not acted and not wanted.is_all:
                _note(_none(queue, bound))

    bound, most = run(count())
    said = question.format(_count(most, lost=lost))
    if dry_run:
        if not json:
            console.print(plain(f"would {said}"))
    elif not most:
        if wanted.is_all:
            _note(f"no letters in {queue!r}")
    elif yes or confirmed(f"{said[:1].upper()}{said[1:]}?"):
        run(go())
    else:
        raise typer.Exit(FAILED)


async def _bound(letters: Letters) -> int:
    """How many letters there are now."""
    state = await letters.state()
    if state.consumers:
        holders = _many(state.consumers, "consumer")
        _note(f"{letters.queue!r} has {holders}, who may hold letters: these are not seen here")
    return state.messages


def _none(queue: str, bound: int) -> str:
    return f"no such letters among the {bound} in {queue!r}; `rpcq dlq list --count` shows what there is"


def _note_missed(letters: Letters) -> None:
    if letters.missed:
        missed = _many(letters.missed, "letter")
        _note(f"not seen in {letters.queue!r}: {missed}, which somebody else took meanwhile")


def _note(text: str) -> None:
    errors.print(plain(text, "yellow"), soft_wrap=True)


def _count(number: int, *, lost: bool) -> str:
    return _many(number, "lost message" if lost else "dead letter")


def _many(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


# Printing.


def _time(time: datetime | None) -> str:
    return "at an unknown time" if time is None else f"{time.astimezone(UTC):%Y-%m-%d %H:%M:%SZ}"


def _print(letter: DeadLetter, *, as_json: bool) -> None:
    if as_json:
        print_json(letter.summary())
        return
    what = f"{letter.reason}, executed: {letter.executed}, attempt {letter.job.attempt}, {_time(letter.died_at)}"
    event = f" ({letter.job.name})" if letter.subscription else ""
    said = f" {letter.label}{event}  {what}"
    console.print(plain(letter.job.id or "(no ID)", "bold"), plain(said), soft_wrap=True)
    error = letter.error if len(letter.error) <= MOST_ERROR else f"{letter.error[:MOST_ERROR]}..."
    origin = [f"from {letter.source}"] if letter.source else []
    origin += [f"incident {letter.incident}"] if letter.incident else []
    console.print(
        plain(f"    {error or 'no error is noted'} ({', '.join(origin) or 'from an unknown place'})"), soft_wrap=True
    )


def _print_all(letter: DeadLetter, *, as_json: bool) -> None:
    details = letter.details()
    if as_json:
        print_json(details)
        return
    for name, value in details.items():
        if isinstance(value, dict):
            console.print(plain(name, "bold"))
            for inner, each in value.items():
                _print_field(f"  {inner}", each)
        elif value is not None:
            _print_field(name, value)


def _print_field(name: str, value: Any) -> None:
    console.print(plain(name, "bold"), plain(value), soft_wrap=True)

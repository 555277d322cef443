"""Dead letters for programs: looks at them, has their jobs done again, deletes them. `rpcq dlq` is the same by hand."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from math import inf
from typing import Final, TypedDict, Unpack

from rpcq.environment import broker_url, options_from
from rpcq.errors import ConfigurationError
from rpcq.jobs.letters import DeadLetter, Wanted
from rpcq.jobs.replaying import Replayer, open_letters
from rpcq.options import ConnectionKwargs, ConnectionOptions, check_name
from rpcq.service import Service
from rpcq.transport.opening import open_transport
from rpcq.url import parse
from rpcq.wire.events import EventTopology

__all__ = ["DeadLetter", "DeadLetters", "Filters", "FoundLetters", "ReplayedLetters"]

MOST_LISTED: Final = 1000
"""Letters that are found if no other limit is given."""


class Filters(TypedDict, total=False):
    """Which letters are meant. All filters have to take a letter; without one, any letter fits.

    Attributes:
        reasons: a reason, or several of which one has to fit: of docs/wire.md, the broker's own word, or "lost".
        jobs: names of jobs or subscriptions, with or without their service, or names of events.
        ids: IDs of jobs.
        since: when they died at the earliest, or how long ago. A letter without a time does not fit.

    """

    reasons: str | Iterable[str]
    jobs: str | Iterable[str]
    ids: str | Iterable[str]
    since: datetime | timedelta | None


@dataclass(frozen=True, slots=True)
class FoundLetters:
    """What was found in a queue of dead letters.

    Attributes:
        letters: those that were asked for, the oldest first.
        seen: how many were looked at.
        waiting: how many the queue had when the look began. The difference to `seen` was taken by somebody else, or is
            beyond the limit.
        consumers: who else takes letters from the queue, such as another look; what these hold is in no number here.

    """

    letters: list[DeadLetter]
    seen: int
    waiting: int
    consumers: int


@dataclass(frozen=True, slots=True)
class ReplayedLetters:
    """What became of letters that were to be done again.

    Attributes:
        letters: those whose job the broker has confirmed. They are deleted.
        kept: the others, each with the reason. They are still dead letters.

    """

    letters: list[DeadLetter] = field(default_factory=list)
    kept: list[tuple[DeadLetter, str]] = field(default_factory=list)


class DeadLetters:
    """The dead letters of a service, its jobs' and its subscriptions'; or the messages whose queue is gone.

        emails = DeadLetters("emails")
        found = await emails.find(reasons="gave_up")
        await emails.replay(ids=[it.id for it in found.letters])

    Each method opens connections of its own, and closes them. It holds what it looks at until it ends, and then gives
    back what it did not replay or delete. Of several that run at once, none sees what another one holds.

    Args:
        service: the service, or its name; None for messages of all services whose queue is gone.
        url: the broker; `RPCQ_URL` if None. `memory://` keeps its dead letters for `World.dead` alone.
        options: as in `ConnectionOptions`. What is not given is read from the environment.

    Raises:
        ConfigurationError: the URL, the name or an option cannot be used.

    """

    def __init__(
        self, service: Service | str | None, url: str | None = None, **options: Unpack[ConnectionKwargs]
    ) -> None:
        self._options = options_from(ConnectionOptions, options)
        self._url = broker_url(url)
        self._topology = EventTopology(self._options.namespace)
        if parse(self._url).scheme == "memory":
            raise ConfigurationError(
                "DeadLetters needs RabbitMQ; with memory://, a test's World has them: world.dead()"
            )
        jobs = self._topology.jobs
        if service is None:
            self._queue = jobs.lost.name
        else:
            name = service.name if isinstance(service, Service) else service
            self._queue = jobs.dead_queue(check_name("the name of a service", name)).name

    async def find(self, *, limit: int = MOST_LISTED, **filters: Unpack[Filters]) -> FoundLetters:
        """Look at letters. They stay where they are.

        Args:
            limit: how many to find, at most.
            filters: which; see `Filters`.

        Raises:
            ConfigurationError: an argument is not valid.
            NotFound: there is no such queue: a worker with jobs declares it.
            BrokerError: the broker refused, or the connection was lost.

        """
        wanted = _wanted(**filters)
        _check_limit(limit)
        found: list[DeadLetter] = []
        async with open_letters(self._url, self._options, self._queue) as letters:
            state = await letters.state()
            async with aclosing(letters.look(wanted, state.messages)) as looking:
                async for letter in looking:
                    found.append(letter)
                    if len(found) == limit:
                        break
            return FoundLetters(found, letters.seen, state.messages, state.consumers)

    async def replay(
        self, *, limit: int | None = None, to: str | None = None, rate: float | None = None, **filters: Unpack[Filters]
    ) -> ReplayedLetters:
        """Send the jobs of letters again, with their IDs and keys, from the first attempt.

        A letter is deleted once the broker has confirmed its job. One that no queue takes, or that the broker refuses,
        is kept. If this is cancelled or the connection is lost, what the broker had not confirmed yet is kept too, and
        may be done nevertheless.

        Args:
            limit: how many to try, at most; None for all that the queue has when it begins.
            to: the service that gets jobs, or the `service:subscription` that gets events, instead of their own.
            rate: letters a second, at most; None for no limit.
            filters: which; see `Filters`.

        Raises:
            ConfigurationError: an argument is not valid.
            NotFound: there is no such queue: a worker with jobs declares it.
            BrokerError: the broker refused, or the connection was lost.

        """
        wanted = _wanted(**filters)
        _check_limit(limit)
        check_to(to)
        check_rate(rate)
        result = ReplayedLetters()

        def report(letter: DeadLetter, why: str) -> None:
            if why:
                result.kept.append((letter, why))
            else:
                result.letters.append(letter)

        async with open_letters(self._url, self._options, self._queue) as letters:
            bound = (await letters.state()).messages
            transport = open_transport(self._url, self._options)
            replayer = Replayer(letters, transport, to=to, rate=rate, report=report)
            await replayer.run(wanted, bound, bound if limit is None else limit)
        return result

    async def purge(self, *, limit: int | None = None, **filters: Unpack[Filters]) -> list[DeadLetter]:
        """Delete letters for good: nobody does their jobs. Returns them.

        Args:
            limit: how many to delete, at most; None for all that the queue has when it begins.
            filters: which; see `Filters`.

        Raises:
            ConfigurationError: an argument is not valid.
            NotFound: there is no such queue: a worker with jobs declares it.
            BrokerError: the broker refused, or the connection was lost; some may be deleted.

        """
        wanted = _wanted(**filters)
        _check_limit(limit)
        deleted: list[DeadLetter] = []
        async with open_letters(self._url, self._options, self._queue) as letters:
            bound = (await letters.state()).messages
            await letters.purge(wanted, bound, bound if limit is None else limit, deleted.append)
        return deleted


def check_to(to: str | None, what: str = "to") -> None:
    """Check the name of a service, or of a `service:subscription`, that is to get letters.

    Raises:
        ConfigurationError: it is neither.

    """
    if to is None:
        return
    service, colon, subscription = to.partition(":")
    check_name(what, service)
    if colon:
        check_name(what, subscription)


def check_rate(rate: float | None, what: str = "rate") -> None:
    """Check how many letters a second are to be replayed.

    Raises:
        ConfigurationError: it is not a number above 0.

    """
    if rate is not None and not 0 < rate < inf:
        raise ConfigurationError(f"{what} must be a number of letters a second above 0; got {rate:g}")


def _check_limit(limit: int | None) -> None:
    if limit is not None and (type(limit) is not int or limit < 1):
        raise ConfigurationError(f"limit must be a number of letters above 0; got {limit!r}")


def _wanted(
    reasons: str | Iterable[str] = (),
    jobs: str | Iterable[str] = (),
    ids: str | Iterable[str] = (),
    since: datetime | timedelta | None = None,
) -> Wanted:
    if isinstance(since, timedelta):
        since = datetime.fromtimestamp(time.time(), UTC) - since
    elif since is not None and since.tzinfo is None:
        since = since.astimezone()
    return Wanted(reasons=_names(reasons), jobs=_names(jobs), ids=_names(ids), since=since)


def _names(given: str | Iterable[str]) -> frozenset[str]:
    return frozenset([given] if isinstance(given, str) else given)

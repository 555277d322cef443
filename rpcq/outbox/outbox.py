"""The outbox: jobs and events that are sent if, and only if, a transaction of the user's database is committed."""

from __future__ import annotations

import copy
import secrets
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Concatenate, Final, ParamSpec, Self, TypeVar, Unpack, cast, overload

from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session

from rpcq.environment import broker_url, options_from
from rpcq.errors import ConfigurationError, UsageError
from rpcq.event_types import Event
from rpcq.events.encoding import message_of
from rpcq.jobs.observing import SendObservation
from rpcq.jobs.preparing import find_job, prepare, runs_at_most_once
from rpcq.observer import ObservedWrite, Observer, writes_of
from rpcq.options import ClientKwargs, ClientOptions
from rpcq.outbox import rows, writing
from rpcq.outbox.binding import BoundJobs
from rpcq.outbox.databases import AnyEngine, Database
from rpcq.outbox.options import OutboxKwargs, OutboxOptions
from rpcq.outbox.relay import Counts, Relay
from rpcq.outbox.tables import OutboxRow
from rpcq.outbox.writing import AnySession
from rpcq.runtime import clock
from rpcq.service import Context, Method
from rpcq.url import parse
from rpcq.validation.listing import lists_options
from rpcq.wire.events import EventTopology, Publication, encode_event
from rpcq.wire.jobs import Job, JobMessage, encode_job

P = ParamSpec("P")
T = TypeVar("T")

_DEFAULTS: Final = OutboxOptions()


class Outbox:
    """Writes jobs and events into the table `rpcq_outbox`, with your own changes; a relay sends them after the commit.

        outbox = Outbox(engine)

        async with outbox:                          # a relay runs in this process
            async with sessions.begin() as db:
                db.add(order)
                outbox.send(db, welcome, to=order.email, name=order.name)
                outbox.publish(db, OrderCreated(order_id=order.id))

    As an async context manager, it runs a relay in this process, which sends a job within milliseconds after the
    commit, and looks every second for what other processes have committed or left behind. It starts although broker
    or database are down, and waits for them. A program that only writes needs no relay of its own, if another process
    with the same database has one, such as `rpcq outbox relay`.

    Args:
        engine: an `Engine` or an `AsyncEngine` of SQLAlchemy, for PostgreSQL or SQLite; the tables must exist, see
            `rpcq.outbox.metadata`. Sessions may have another engine of the same database.
        url: the broker, as for `Client`; `RPCQ_URL` if None. It is needed for the relay.
        observers: called with what is written, see `Observer.on_write`. With `Tracing()`, the trace of the writer
            continues in the handlers that get the job or the event.
        options: as in `ClientOptions`: of the relay's connections; `namespace`, `name` and `max_body` are also those of
            the jobs. What is not given is read from the environment.

    Raises:
        ConfigurationError: the engine, the URL or an option cannot be used.

    """

    def __init__(
        self,
        engine: AnyEngine,
        url: str | None = None,
        *,
        observers: Iterable[Observer] = (),
        **options: Unpack[ClientKwargs],
    ) -> None:
        self.options = options_from(ClientOptions, options)
        self._observers = writes_of(observers)
        if url:
            parse(url)
        self._url = url
        self._engine = engine
        self._database = Database(engine)
        self._events = EventTopology(self.options.namespace)
        self._topology = self._events.jobs
        self._given = _DEFAULTS
        self._relays: list[Relay] = []

    @lists_options(OutboxOptions, changes=True)
    def with_options(self, **options: Unpack[OutboxKwargs]) -> Outbox:
        """The same outbox, with other options for its jobs; see `OutboxOptions`.

        Raises:
            ConfigurationError: an option is not valid; the message names it.

        """
        changed = copy.copy(self)
        changed._given = replace(self._given, **options)  # noqa: SLF001 - its own class
        return changed

    def bind(self, api: Callable[..., T], service: str | None = None) -> T:
        """The jobs of a Protocol class, for `send`: type checkers know them and their parameters.

            emails = outbox.bind(EmailsApi)
            outbox.send(db, emails.welcome, to=order.email)

        Its methods cannot be called here: bind the class with a client for them.

        Args:
            api: a class whose contract has jobs, `@contract("emails", jobs=["welcome"])`; one of `rpcq.sync` too.
            service: its name; that of the class's `contract` if None.

        Raises:
            ConfigurationError: no service is named, the class has an attribute that no contract can have, or it has no
                jobs.

        """
        return cast("T", BoundJobs(api, service))

    # Writing.

    # The first parameters of a handler that its sender leaves out: the context, the session, or both.

    @overload
    def send(
        self,
        db: AnySession,
        job: Callable[Concatenate[Context, AsyncSession, P], Any] | Callable[Concatenate[Context, Session, P], Any],
        /,
        *args: P.args,
        **params: P.kwargs,
    ) -> Job: ...

    @overload
    def send(
        self,
        db: AnySession,
        job: Callable[Concatenate[AsyncSession, Context, P], Any] | Callable[Concatenate[Session, Context, P], Any],
        /,
        *args: P.args,
        **params: P.kwargs,
    ) -> Job: ...

    @overload
    def send(
        self,
        db: AnySession,
        job: Callable[Concatenate[AsyncSession, P], Any] | Callable[Concatenate[Session, P], Any],
        /,
        *args: P.args,
        **params: P.kwargs,
    ) -> Job: ...

    @overload
    def send(
        self, db: AnySession, job: Callable[Concatenate[Context, P], Any], /, *args: P.args, **params: P.kwargs
    ) -> Job: ...

    @overload
    def send(self, db: AnySession, job: Callable[P, Any], /, *args: P.args, **params: P.kwargs) -> Job: ...

    @overload
    def send(self, db: AnySession, job: str, /, *args: Any, **params: Any) -> Job: ...

    def send(self, db: AnySession, job: str | Callable[..., Any], /, *args: Any, **params: Any) -> Job:
        """Write a job with the transaction of a session; it is sent after the commit, and never after a rollback.

        Nothing is executed now: the row is written when the session is flushed, at the latest by its commit. With an
        `order_key` on PostgreSQL, the flush waits for other transactions that have written jobs of that key. See
        `OutboxOptions` for what is in order then.

        Args:
            db: your `Session` or `AsyncSession`, in a transaction.
            job: as for `Client.send`: a function with `@service.job`, a job of a bound contract, or `service.job`.
            args: parameters by position.
            params: parameters by name.

        Returns:
            The job's ID and key: it is sent under them, however often the relay has to try. Its `order_key` is None if
            its service is known not to be ordered.

        Raises:
            UsageError: no transaction has begun; or it is not a job, or one that runs at most once, because a relay
                that is lost sends its jobs again.
            ConfigurationError: the session is of another database, or the name of the job is not valid.
            InvalidParams: the parameters do not fit the function or the contract.
            NotSerializable: JSON cannot carry a parameter.
            TooLarge: parameters or headers are over the limit.
            TypeError: there are too many parameters by position, or one is given twice.

        """
        session = writing.session_of(db)
        writing.check_session(session, self._database.engine)
        service, name, method = found = find_job(job)
        if runs_at_most_once(method):
            msg = f"{service}.{name} runs at most once, and a relay that is lost sends its jobs again"
            raise UsageError(f"{msg}: send it with a client, after the commit")
        given, now = self._given, clock.now_ms()
        due, expires = given.times(now)
        options = given.call
        if isinstance(method, Method) and not method.ordered:
            options = replace(options, order_key=None)  # it is sent in order, and done beside others
        message = prepare(
            found,
            options,
            args,
            params,
            job_id=secrets.token_hex(16),
            app_id=self.options.name,
            max_body=self.options.max_body,
        )
        message.due_ms, message.expires_ms = due, expires
        if self._observers:
            observed = ObservedWrite(self._topology.jobs.name.encode(), service, name, f"{service}.{name}")
            SendObservation(self._observers, observed, message)
        route = self._topology.jobs.name, self._topology.key(service, message.lane)
        self._write(session, message, f"{service}.{name}", route, encode_job(message, now), now, due)
        when = None if due is None else datetime.fromtimestamp(due / 1000, UTC)
        return Job(message.id, service, name, message.key, when, message.priority, message.order_key)

    def publish(self, db: AnySession, event: Event, /) -> Publication:
        """Write an event with the transaction of a session; it is published after the commit, and never otherwise.

        Args:
            db: your `Session` or `AsyncSession`, in a transaction.
            event: the event. The options `expires` and `priority` are for jobs only.

        Returns:
            The event's ID and key; `heard` is None, since nobody knows yet whether anybody listens.

        Raises:
            UsageError: no transaction has begun; it is no event of a class with a name, or an option is for jobs only.
            ConfigurationError: the session is of another database.
            NotSerializable: JSON cannot carry it.
            InvalidParams: it would not be read again, because it was changed after it was made.
            TooLarge: it is over `max_body` bytes, or its headers over 8 KiB.

        """
        session = writing.session_of(db)
        writing.check_session(session, self._database.engine)
        given, now = self._given, clock.now_ms()
        due, _ = given.times(now)
        # When it is published, and after which others, its row says; a message has nothing for that.
        options = replace(given, at=None, delay=None, order_key=None).call
        message = message_of(
            event,
            options,
            event_id=secrets.token_hex(16),
            app_id=self.options.name,
            max_body=self.options.max_body,
        )
        if self._observers:
            exchange, name = self._events.events.name.encode(), message.name
            SendObservation(self._observers, ObservedWrite(exchange, "", name, name, event=name), message)
        encoded = encode_event(self._events, message, now if due is None else due)
        route = encoded.exchange.decode(), encoded.routing_key.decode()
        self._write(session, message, message.name, route, encoded.properties, now, due)
        return Publication(message.id, message.name, message.version or 1, message.key, None)

    def _write(
        self,
        session: Session,
        message: JobMessage,
        label: str,
        route: tuple[str, str],
        properties: bytes,
        now: int,
        due: int | None,
    ) -> None:
        row = OutboxRow()
        row.message_id, row.label, row.order_key = message.id, label, self._given.order_key
        row.exchange, row.routing_key = route
        row.properties, row.body = properties, message.body
        row.created, row.due, row.tries = now, due, 0
        writing.write(session, row, self._wake)

    @overload
    def cancel(
        self, db: AsyncSession | async_scoped_session[Any], job: Job | Publication | str, /
    ) -> Awaitable[bool]: ...

    @overload
    def cancel(self, db: Session | scoped_session[Any], job: Job | Publication | str, /) -> bool: ...

    def cancel(self, db: AnySession, job: Job | Publication | str, /) -> bool | Awaitable[bool]:
        """Delete a job or an event that is not due yet. With an `AsyncSession`, await it.

        Args:
            db: your session, in a transaction.
            job: what `send` or `publish` returned, or its ID.

        Returns:
            Whether it was there and not due. True: it is not sent, once your transaction is committed. False: it was
            sent, or is about to be, or was cancelled before; or it had no `delay` and no `at`.

        Raises:
            UsageError: no transaction has begun.
            ConfigurationError: the session is of another database, or that is no ID of a job.

        """
        session = writing.session_of(db)
        writing.check_session(session, self._database.engine)
        message_id = job.id if isinstance(job, Job | Publication) else job
        if not isinstance(message_id, str):
            raise ConfigurationError(f"job must be what send returned, or its ID; got {job!r:.100}")
        if isinstance(db, async_scoped_session):
            db = db()
        if isinstance(db, AsyncSession):
            return db.run_sync(_cancel, message_id)
        return _cancel(session, message_id)

    def _wake(self) -> None:
        """The transaction of a session with rows of this outbox is committed, in any thread."""
        for relay in self._relays:
            relay.wake_from_thread()

    # Relaying.

    async def start(self, *, connect: bool = False) -> None:
        """Run a relay in this process, in a task of this event loop.

        Args:
            connect: whether to connect to the broker before this returns; otherwise the relay does it when it can.

        Raises:
            BrokerError: with `connect`, the broker cannot be used; the message says why.
            ConfigurationError: there is no URL of the broker.
            UsageError: a relay of this outbox runs already.

        """
        if self._relays:
            raise UsageError("a relay of this outbox runs already in this process")
        relay = Relay(self._database, broker_url(self._url), self.options)
        if connect:
            await relay.open()
        self._relays.append(relay)  # shared with what `with_options` made
        relay.start()

    async def stop(self) -> None:
        """Send what is committed, within 5 seconds, and end the relay. What is left, another relay sends."""
        while self._relays:
            await self._relays.pop().close()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def is_relaying(self) -> bool:
        """Whether a relay of this outbox runs in this process; it may wait for broker or database."""
        return bool(self._relays)

    def counts(self) -> Counts:
        """What the relay of this process did; zeros if none runs."""
        return self._relays[0].counts if self._relays else Counts()

    def why_not_ready(self) -> str:
        """Why the relay of this process sends nothing now; empty if it does. May be called from another thread."""
        return self._relays[0].problem if self._relays else "no relay runs in this process"

    async def depth(self) -> rows.OutboxDepth:
        """How much waits in the table: one query, which counts all rows.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: the database cannot be used.

        """
        async with self._database.transaction() as run:
            return await run(rows.depth)


def _cancel(session: Session, message_id: str) -> bool:
    session.flush()  # it may have been sent in this very transaction
    connection = session.connection(bind_arguments={"mapper": OutboxRow})
    return bool(connection.execute(rows.cancel(message_id, rows.now_ms(connection))).rowcount)

"""Events with a transaction, and subscriptions whose effects happen once."""

from __future__ import annotations

import asyncio
import secrets
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from rpcq import ConfigurationError, Context, Event, Service, UsageError
from rpcq.outbox import Inbox, Outbox, relay
from rpcq.outbox.tables import inbox as inbox_table
from rpcq.outbox.tables import outbox as rows_table
from support.jobs import Done, settled
from support.load import until
from support.places import Place
from support.stores import Order, Store, orders


class Created(Event, name=f"outbox.t{secrets.token_hex(4)}.created"):
    number: int


class Renamed(Event, name=f"outbox.t{secrets.token_hex(4)}.renamed"):
    number: int


class Unheard(Event, name=f"outbox.t{secrets.token_hex(4)}.unheard"):
    number: int


def subscribed(service: Service, store: Store, done: Done) -> None:
    """A subscription that writes each event down, with an inbox, whichever handlers the store is for."""
    loop = asyncio.get_running_loop()

    if store.is_blocking:

        @service.on(Created, Renamed, name="write", once=Inbox(store.engine))
        def write_blocking(event: Created | Renamed, db: Session, context: Context) -> None:
            db.add(Order(event.number, context.correlation_id))
            loop.call_soon_threadsafe(done.note, event.number)
    else:

        @service.on(Created, Renamed, name="write", once=Inbox(store.engine))
        async def write(db: AsyncSession, event: Created | Renamed, context: Context) -> None:
            db.add(Order(event.number, context.correlation_id))
            done.note(event.number)


async def test_an_event_is_published_after_the_commit_and_its_effect_is_there_once(
    store: Store, outbox: Outbox, home: Place, service: Service, done: Done
) -> None:
    subscribed(service, store, done)
    async with outbox, home.worker(service, remember=0) as worker:
        said = await store.write(lambda db: outbox.publish(db, Created(number=1)))
        await store.write(lambda db: outbox.publish(db, Created(number=2)), commit=False)
        await until(lambda: store.count(inbox_table) == 1)
        async with home.client() as client:  # the same event again
            await client.with_options(idempotency_key=said.id).publish(Created(number=1))
        await until(lambda: worker._jobs.suppressed == 1)
        await settled(worker)
    assert [row[1:] for row in store.asked(orders.select())] == [(1, said.id)]
    assert said.heard is None
    assert (said.name, said.version, said.key) == (Created.event_name, 1, said.id)
    assert done.counts == {1: 1}


async def test_events_of_two_names_with_one_key_are_two(
    store: Store, outbox: Outbox, home: Place, service: Service, done: Done
) -> None:
    subscribed(service, store, done)
    keyed = outbox.with_options(idempotency_key="k")
    async with outbox, home.worker(service, remember=0):
        await store.write(lambda db: [keyed.publish(db, Created(number=1)), keyed.publish(db, Renamed(number=2))])
        await until(lambda: store.count(inbox_table) == 2)
    consumers = {row[0] for row in store.asked(inbox_table.select())}
    assert consumers == {f"{service.name}.write/{kind.event_name}" for kind in (Created, Renamed)}


async def test_an_event_that_nobody_hears_is_published_and_its_key_goes_on(
    store: Store, outbox: Outbox, home: Place, service: Service, done: Done
) -> None:
    subscribed(service, store, done)
    keyed = outbox.with_options(order_key="k")
    async with outbox, home.worker(service):
        await store.write(lambda db: [keyed.publish(db, Unheard(number=1)), keyed.publish(db, Created(number=2))])
        await done.until(lambda counts: counts[2] == 1)
        await until(lambda: not store.count(rows_table))
    assert outbox.counts().dead == 0


async def test_an_event_waits_until_it_is_due_and_can_be_cancelled(
    store: Store, outbox: Outbox, home: Place, service: Service, done: Done
) -> None:
    subscribed(service, store, done)
    async with outbox, home.worker(service):
        at = datetime.now(UTC) + timedelta(seconds=5)  # the second one is cancelled before that
        later = outbox.with_options(at=at)
        await store.write(lambda db: later.publish(db, Created(number=1)))
        dropped = await store.write(lambda db: later.publish(db, Created(number=2)))
        assert await store.write(lambda db: outbox.cancel(db, dropped))
        await done.until(lambda counts: counts[1] == 1)
        assert datetime.now(UTC) >= at
    assert done.counts == {1: 1}


async def test_options_that_are_for_jobs_only_are_refused(store: Store, outbox: Outbox) -> None:
    for options in ({"expires": 60}, {"priority": "high"}):
        changed = outbox.with_options(**options)

        def publish(db: Any, changed: Outbox = changed) -> None:
            with pytest.raises(UsageError, match="which are for jobs"):
                changed.publish(db, Created(number=1))

        await store.write(publish)
    assert not store.count(rows_table)


async def test_a_subscription_of_each_instance_has_no_inbox(store: Store, service: Service) -> None:
    with pytest.raises(ConfigurationError, match="each_instance"):

        @service.on(Created, each_instance=True, once=Inbox(store.engine))
        async def see(event: Created, db: AsyncSession) -> None: ...


async def test_a_relay_that_may_not_publish_events_sends_jobs_and_leaves_the_events(
    store: Store, home: Place, service: Service, done: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rpcq.errors import AccessRefused

    @service.job
    async def work() -> None:
        done.note("work")

    outbox = Outbox(store.engine, home.url, namespace=home.namespace)
    opened = relay.open_transport

    def limited(url: str, options: Any) -> Any:
        transport = opened(url, options)
        declare = transport.declare

        async def refusing(exchanges: Any) -> None:
            if any(exchange.name.endswith(".events") for exchange in exchanges):
                raise AccessRefused("no")
            await declare(exchanges)

        monkeypatch.setattr(transport, "declare", refusing)
        return transport

    monkeypatch.setattr(relay, "open_transport", limited)
    async with outbox, home.worker(service):
        await store.write(lambda db: [outbox.publish(db, Created(number=1)), outbox.send(db, work)])
        await done.until(lambda counts: counts["work"] == 1)
        await until(lambda: store.count(rows_table) == 1)

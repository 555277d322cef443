"""In a world whose time a test moves, `settled` waits for outboxes, too."""

from __future__ import annotations

from typing import Any

import pytest

from rpcq import Event, Service, UsageError
from rpcq.outbox import Outbox
from rpcq.outbox.tables import outbox as rows_table
from rpcq.testing import FakeService, World, memory_url, world, worlds
from support.stores import Store


class Shipped(Event, name="outbox.worlds.shipped"):
    number: int


def outbox_in(w: World, url: str, store: Store) -> Outbox:
    return Outbox(store.engine, url, namespace=w.client.options.namespace)


async def test_it_waits_for_rows_for_what_they_begin_and_for_the_rows_of_that(store: Store, service: Service) -> None:
    url, made = memory_url(), []

    @service.job
    async def ship(number: int) -> None:
        await store.write(lambda db: made[0].publish(db, Shipped(number=number)))
        if number:
            await store.write(lambda db: made[0].send(db, ship, number=number - 1))

    fake = FakeService("listener").hears(Shipped)
    async with world(service, fake, url=url) as w:
        made.append(outbox_in(w, url, store))
        async with made[0]:
            await store.write(lambda db: made[0].send(db, ship, number=3))
            await w.settled(made[0])
            assert [it.number for it in fake.heard(Shipped)] == [3, 2, 1, 0]
            assert w.published(Shipped) == fake.heard(Shipped)
            await store.write(lambda db: made[0].with_options(delay=3600).send(db, ship, number=0))
            await w.settled(made[0])  # what is due later stays
    assert store.count(rows_table) == 1


async def test_rows_that_cannot_be_sent_now_are_told(
    store: Store, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worlds, "PATIENCE", 0.3)
    url = memory_url()

    @service.job
    async def work() -> None: ...

    async def fails(_: Any) -> None:
        raise OSError("the network is down")

    async with world(service, url=url) as w:
        outbox = outbox_in(w, url, store)
        with pytest.raises(UsageError, match="settled must be given outboxes whose relay runs"):
            await w.settled(outbox)
        monkeypatch.setattr("rpcq.outbox.relay.Relay.step", fails)
        async with outbox:
            await store.write(lambda db: outbox.send(db, work))
            with pytest.raises(TimeoutError, match=r"rows of outboxes still wait: .*the network is down"):
                await w.settled(outbox)

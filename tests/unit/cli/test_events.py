"""`rpcq events` and `rpcq topology` as real processes on RabbitMQ."""

import asyncio
import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rpcq import AnyEvent, Client, Event, Service, Worker
from rpcq.cli.options import FAILED, USAGE
from rpcq.wire.events import EventTopology
from support.broker import Broker, Setup
from support.broker import broker as a_broker
from support.command import Rpcq

pytestmark = pytest.mark.long

SHARED = f"t{secrets.token_hex(8)}"
WORD = f"e{secrets.token_hex(6)}"


class Created(Event, name=f"{WORD}.created"):
    number: int


@pytest.fixture(scope="module")
def managed() -> Iterator[tuple[Broker, str]]:
    """A broker with the management API, and where that is."""
    setup = Setup(
        config="management.tcp.port = {ports[0]}\ncollect_statistics_interval = 500\nloopback_users.guest = false\n",
        files=lambda _: {"enabled_plugins": b"[rabbitmq_management].\n"},
        ports=1,
    )
    with a_broker(setup=setup) as own:
        yield own, f"http://127.0.0.1:{next(iter(own.ports.values()))}"


@pytest.fixture
def rpcq(managed: tuple[Broker, str], tmp_path: Path) -> Rpcq:
    return Rpcq(managed[0].url, SHARED, tmp_path)


@pytest.fixture
def service() -> Service:
    return Service(f"s{secrets.token_hex(6)}")


async def ran(rpcq: Rpcq, *arguments: str, code: int = 0, given: str | None = None) -> Any:
    """What a command prints as JSON."""
    own = [*arguments, "--json", "--namespace", SHARED]
    found = await asyncio.to_thread(rpcq.run, *own, given=given)
    assert found.returncode == code, found.stderr
    return json.loads(found.stdout)


async def test_subscriptions_are_listed_an_event_is_published_by_hand_and_watched(rpcq: Rpcq, service: Service) -> None:
    got: asyncio.Queue[Any] = asyncio.Queue()

    @service.on(Created)
    async def ship(event: Created) -> None:
        await got.put(event)

    @service.on(f"{WORD}.#", each_instance=True)
    async def cache(event: AnyEvent) -> None:
        await got.put(event.data)

    async with Worker(service, url=rpcq.url, namespace=SHARED):
        listed = (await ran(rpcq, "events", "list", service.name))["subscriptions"]
        assert [(it["pattern"], it["subscription"], it["events"], it["workers"]) for it in listed] == [
            (f"{WORD}.#", f"{service.name}.cache", [], 1),
            (f"{WORD}.created", f"{service.name}.ship", [f"{WORD}.created 1"], 1),
        ]
        tail = asyncio.create_task(ran(rpcq, "events", "tail", f"{WORD}.*", "--limit", "1"))
        published: list[dict[str, Any]] = []
        while not tail.done():  # its queue may not be there yet
            published.append(await ran(rpcq, "events", "publish", f"{WORD}.created", "number=7", "--key", "k"))
        seen = await tail
        missing: list[Any] = [Created(number=7), {"number": 7}]
        while missing:
            if (came := await got.get()) in missing:
                missing.remove(came)
    assert {it["heard"] for it in published} == {True}
    assert seen["id"] in {it["id"] for it in published}
    assert (seen["event"], seen["version"], seen["data"]) == (f"{WORD}.created", 1, {"number": 7})
    unheard = await ran(rpcq, "events", "publish", f"nobody.{WORD}", "-", "--version", "2", given='{"a": [1]}')
    assert (unheard["heard"], unheard["version"]) == (False, 2)


@pytest.mark.timeout(120)
async def test_what_a_deploy_left_is_shown_and_pruned_and_what_holds_events_stays(
    rpcq: Rpcq, service: Service, managed: tuple[Broker, str]
) -> None:
    names, management = EventTopology(SHARED), ["--management", managed[1]]
    newer = Service(service.name)

    @service.on(Created, f"{WORD}.paid", name="ship")
    @service.on(Created, name="full")
    @service.on(f"{WORD}.other", name="empty")
    async def work(event: AnyEvent) -> None: ...

    @newer.on(Created)
    async def ship(event: Created) -> None: ...

    async with Worker(service, url=rpcq.url, namespace=SHARED):
        pass
    queues = {name: names.queue(service.name, name, ()).name for name in ("ship", "full", "empty")}
    async with Client(rpcq.url, namespace=SHARED) as client, Worker(newer, url=rpcq.url, namespace=SHARED):
        assert (await client.publish(Created(number=1))).heard  # "full" keeps it
        found: list[dict[str, Any]] = []
        while len(found) < 10:  # the management API is late
            found = (await ran(rpcq, "topology", "show", service.name, *management))["topology"]
        stale = {(it["queue"], it["pattern"]) for it in found if it["is_stale"]}
        gone = [*queues.values()][1:]
        assert stale == {
            (queues["ship"], f"{WORD}.paid"),
            *((queue, "") for name in gone for queue in (name, f"{name}:suspects")),
        }
        dry = await ran(rpcq, "topology", "prune", "--dry-run", *management)
        assert {(it["queue"], it["pattern"]) for it in dry["stale"]} == stale
        pruned = await ran(rpcq, "topology", "prune", "--yes", *management, code=FAILED)
        ((stays),) = pruned["stays"]
        assert stays["queue"] == queues["full"]
        assert "it holds 1 messages: let a worker take them, or give --force" in stays["why"]
        assert len(pruned["deleted"]) == 4
        assert not (await client.publish(Paid())).heard
        forced = await ran(rpcq, "topology", "prune", "--yes", "--force", *management)
        assert [it["queue"] for it in forced["deleted"]] == [queues["full"]]
    refused = await asyncio.to_thread(rpcq.run, "topology", "show", "--management", "", "--namespace", SHARED)
    assert refused.returncode == USAGE
    assert "give the URL of the management API with --management" in refused.stderr


class Paid(Event, name=f"{WORD}.paid"):
    pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["publish", "a..b"], "the name of an event must be 1 to 100"),
        (["publish", "order.created", "7"], "fields must be given by name, as in order_id=7; got 7"),
        (["publish", "order.created", "--version", "0"], "--version must be a whole number from 1; got 0"),
        (["tail", "a.#.#"], "a pattern must be words with dots between them"),
        (["tail", "--url", "memory://"], "the broker must be RabbitMQ"),
    ],
)
def test_what_cannot_be_is_refused_with_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    rpcq = Rpcq("amqp://localhost/", SHARED, tmp_path)
    assert message in rpcq.refused("events", *arguments, code=USAGE)

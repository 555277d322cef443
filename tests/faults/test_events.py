"""Events while subscribers fail or are away, and while a broker dies: what `publish` confirmed is lost nowhere."""

import asyncio
import secrets
from collections import Counter
from collections.abc import Iterator

import pytest

from rpcq import Client, Event, Retry, SendError, Service, Worker
from rpcq.wire.events import EventTopology
from support.broker import Broker, Setup
from support.broker import broker as a_broker
from support.letters import letters

pytestmark = [pytest.mark.long, pytest.mark.timeout(240)]

WORD = f"e{secrets.token_hex(6)}"
SOON = Retry(max_attempts=2, initial_backoff=0.01, max_backoff=0.01)


class Happened(Event, name=f"{WORD}.happened"):
    number: int


@pytest.fixture(scope="module")
def own() -> Iterator[Broker]:
    """A broker that is killed."""
    with a_broker(setup=Setup("loopback_users.guest = false\n")) as made:
        yield made


class Ten:
    """Ten services that listen to one event; what each has run is counted."""

    def __init__(self, url: str, namespace: str) -> None:
        self.ran: dict[str, Counter[int]] = {}
        self.options = {"url": url, "namespace": namespace, "connect_timeout": 60}  # it declares 46 queues
        self.services = [self._listening(f"s{number}") for number in range(10)]

    def _listening(self, name: str) -> Service:
        service, ran = Service(name), self.ran.setdefault(name, Counter())

        @service.on(Happened, retry=SOON)
        async def work(event: Happened) -> None:
            ran[event.number] += 1
            if name == "s1":
                raise ValueError("it always fails")

        return service

    def worker(self, *services: Service) -> Worker:
        return Worker(*services, **self.options, job_prefetch=50, grace=5)  # type: ignore[arg-type]

    async def until(self, names: list[str], numbers: set[int]) -> None:
        async with asyncio.timeout(120):
            while any(not numbers <= self.ran[name].keys() for name in names):  # noqa: ASYNC110 - no event tells
                await asyncio.sleep(0.05)


async def test_a_dead_and_a_failing_subscription_hold_up_no_other_and_the_dead_one_gets_all_when_it_is_back(
    rabbitmq_url: str, namespace: str
) -> None:
    ten = Ten(rabbitmq_url, namespace)
    dead, failing, *working = ten.services
    async with ten.worker(*ten.services):
        pass  # all queues are there
    numbers = {*range(300)}
    async with Client(rabbitmq_url, namespace=namespace) as client, ten.worker(failing, *working):
        published = await asyncio.gather(*(client.publish(Happened(number=number)) for number in numbers))
        assert all(it.heard for it in published)
        await ten.until([service.name for service in working], numbers)
        async with letters(rabbitmq_url, EventTopology(namespace).jobs.dead_queue("s1")) as found:
            buried = await found.wait_for(300)
        assert {it.headers["rpcq-dead-reason"] for it in buried} == {"attempts"}
        assert not ten.ran["s0"]
        async with ten.worker(dead):
            await ten.until(["s0"], numbers)
    assert {it.id for it in buried} == {it.id for it in published}
    for service in working:
        assert set(ten.ran[service.name].values()) == {1}


async def test_a_node_that_is_killed_loses_no_event_that_it_confirmed_in_any_subscription(own: Broker) -> None:
    ten, confirmed, stop = Ten(own.url, "killed"), set(), asyncio.Event()
    failed: list[SendError] = []

    async def publish(client: Client, first: int) -> None:
        number = first
        while not stop.is_set():
            try:
                await client.publish(Happened(number=number))
                confirmed.add(number)
            except SendError as error:
                failed.append(error)
            number += 10

    async with ten.worker(*ten.services), Client(own.url, namespace="killed", timeout=60) as client:
        await asyncio.sleep(2)  # the queues are new: see `Broker.kill`
        publishing = [asyncio.create_task(publish(client, first)) for first in range(10)]
        while len(confirmed) < 200:  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0.05)
        await asyncio.to_thread(own.kill)
        await asyncio.to_thread(own.start)
        before = len(confirmed)
        async with asyncio.timeout(120):
            while len(confirmed) < before + 50:  # noqa: ASYNC110 - no event tells
                await asyncio.sleep(0.05)
        stop.set()
        await asyncio.gather(*publishing)
        await ten.until([f"s{number}" for number in range(10)], confirmed)
    assert all(error.queued == "maybe" for error in failed)

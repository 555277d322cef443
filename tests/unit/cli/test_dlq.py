"""`rpcq dlq` as a real process on RabbitMQ.

The tests share a namespace, because each namespace has a ladder of 24 queues; each test has a service of its own.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import subprocess
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pika
import pytest
from pika.adapters.blocking_connection import BlockingChannel

from rpcq import Client, Event, GiveUp, Retry, Service, Worker
from rpcq.cli.options import USAGE
from rpcq.jobs import replaying
from rpcq.jobs.letters import Wanted
from rpcq.jobs.replaying import Letters, Replayer
from rpcq.options import ConnectionOptions
from rpcq.transport.opening import open_admin, open_transport
from rpcq.url import parse
from rpcq.wire.events import EventTopology
from rpcq.wire.job_queues import JobTopology
from support.broker import Setup
from support.broker import broker as a_broker
from support.command import Rpcq, one_line, wait_until

pytestmark = pytest.mark.long

SHARED = f"t{secrets.token_hex(8)}"
TOPOLOGY = JobTopology(SHARED)
EVENTS = EventTopology(SHARED)
ZEROS = "0." * 24


class Bureau:
    """One service of the shared namespace, its dead letters, and the command."""

    def __init__(self, url: str, folder: Path, channel: BlockingChannel) -> None:
        self.url = url
        self.name = f"s{secrets.token_hex(6)}"
        self.service = Service(self.name)
        self.done: list[Any] = []
        self.fails = True
        self.channel = channel
        self._rpcq = Rpcq(url, SHARED, folder)

        @self.service.job(retry=Retry(max_attempts=2, initial_backoff=0.01, max_backoff=0.01))
        async def broken(number: int) -> None:
            self._do(ValueError(f"no \x1b[31m{number}"), number)

        @self.service.job
        async def bounced(number: int) -> None:
            self._do(GiveUp("bounced"), number)

        self.broken, self.bounced = broken, bounced

    def _do(self, error: Exception, number: int) -> None:
        if self.fails:
            raise error
        self.done.append(number)

    def run(self, *arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
        return self._rpcq.run("dlq", *arguments, RPCQ_NAMESPACE=SHARED, **more)

    def refused(self, *arguments: str, code: int) -> str:
        return one_line(self.run(*arguments), code)

    def objects(self, *arguments: str, code: int = 0, **more: Any) -> list[dict[str, Any]]:
        ran = self.run(*arguments, "--json", **more)
        assert ran.returncode == code, ran.stderr
        return [json.loads(line) for line in ran.stdout.splitlines()]

    def listed(self, *arguments: str) -> list[dict[str, Any]]:
        return self.objects("list", self.name, *arguments)

    @property
    def queue(self) -> str:
        return TOPOLOGY.dead_queue(self.name).name

    def count(self, queue: str | None = None) -> int:
        """The messages of a queue that nobody holds."""
        found = self.channel.queue_declare(queue or self.queue, passive=True)
        return int(found.method.message_count)

    def bury(self, broken: int = 0, bounced: int = 0, **options: Any) -> list[str]:
        """Send jobs that fail, and wait until they are dead; returns their IDs."""

        async def work() -> list[str]:
            async with self._worker() as worker, Client(self.url, namespace=SHARED) as client:
                sender = client.with_options(**options)
                sent = []
                for job, count in ((self.broken, broken), (self.bounced, bounced)):
                    sent += [await sender.send(job, number=number) for number in range(count)]
                jobs = worker._jobs
                assert jobs is not None
                while jobs.dead < len(sent) or worker.in_flight:  # noqa: ASYNC110 - no event tells
                    await asyncio.sleep(0.005)
            return [job.id for job in sent]

        return asyncio.run(work())

    def work(self, count: int) -> None:
        """Do so many jobs."""

        async def work() -> None:
            async with self._worker() as worker:
                while len(self.done) < count or worker.in_flight:  # noqa: ASYNC110 - no event tells
                    await asyncio.sleep(0.005)

        self.fails = False
        asyncio.run(asyncio.wait_for(work(), 20))

    def _worker(self) -> Worker:
        return Worker(self.service, url=self.url, namespace=SHARED)

    def publish(self, exchange: str, key: str, **properties: Any) -> None:
        body = properties.pop("body", b'{"number":1}')
        self.channel.basic_publish(exchange, key, body, pika.BasicProperties(delivery_mode=2, **properties))


@pytest.fixture(scope="module")
def channel(rabbitmq_url: str) -> Iterator[BlockingChannel]:
    with pika.BlockingConnection(pika.URLParameters(rabbitmq_url)) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        yield channel
        for queue in TOPOLOGY.shared_queues():
            channel.queue_delete(queue.name)
        for exchange in (*TOPOLOGY.exchanges(), *EVENTS.exchanges()):
            channel.exchange_delete(exchange.name)


@pytest.fixture
def bureau(rabbitmq_url: str, tmp_path: Path, channel: BlockingChannel) -> Iterator[Bureau]:
    found = Bureau(rabbitmq_url, tmp_path, channel)
    yield found
    for queue in (TOPOLOGY.queue, TOPOLOGY.suspects, TOPOLOGY.dead_queue):
        channel.queue_delete(queue(found.name).name)
    for name in ("look", "beside"):
        for queue in (EVENTS.queue(found.name, name, ()), EVENTS.suspects(found.name, name)):
            channel.queue_delete(queue.name)
    for kind in ("req", "once"):
        channel.queue_delete(f"{SHARED}.{kind}.{found.name}")


def shown(ran: subprocess.CompletedProcess[str], code: int = 0) -> str:
    assert ran.returncode == code, ran.stderr + ran.stdout
    return ran.stdout


# Looking.


def test_a_list_shows_what_died_and_why_and_takes_nothing_away(bureau: Bureau) -> None:
    began = datetime.now(UTC)
    one, two = bureau.bury(broken=1, bounced=1)
    for _ in range(25):  # the default limit of deliveries of RabbitMQ 4 is 20
        bureau.channel.basic_get(bureau.queue)
        bureau.channel.basic_nack(0, multiple=True, requeue=True)
    text = shown(bureau.run("list", bureau.name))
    assert "\x1b" not in text
    assert re.search(
        rf"^{one}  {bureau.name}\.broken  attempts, executed: yes, attempt 2, 20\S+ \S+Z$", text, re.MULTILINE
    )
    assert re.search(
        rf"^    ValueError: no \\x1b\[31m0 \(from {bureau.name}, incident [0-9a-f]{{12}}\)$", text, re.MULTILINE
    )
    assert re.search(rf"^    bounced \(from {bureau.name}\)$", text, re.MULTILINE)
    letters = {it["id"]: it for it in bureau.listed()}
    assert set(letters) == {one, two}
    died_at = datetime.fromisoformat(letters[two].pop("died_at"))
    assert began <= died_at.replace(microsecond=999_999) <= datetime.now(UTC).replace(microsecond=999_999)
    assert letters[two] == {
        "id": two,
        "job": f"{bureau.name}.bounced",
        "event": None,
        "reason": "gave_up",
        "executed": "yes",
        "attempt": 1,
        "error": "bounced",
        "incident": None,
        "from": bureau.name,
        "address": f"job.{bureau.name}",
    }
    assert bureau.count() == 2


def test_filters_choose_letters(bureau: Bureau) -> None:
    ids = bureau.bury(broken=2, bounced=2)
    reasons, names = {"attempts": ids[:2], "gave_up": ids[2:]}, {"broken": ids[:2], "bounced": ids[2:]}

    def chosen(*arguments: str) -> list[str]:
        return sorted(it["id"] for it in bureau.listed(*arguments))

    for reason, expected in reasons.items():
        assert chosen("--reason", reason) == sorted(expected)
    assert chosen("--reason", "attempts", "--reason", "gave_up") == sorted(ids)
    assert chosen("--job", "broken") == chosen("--job", f"{bureau.name}.broken") == sorted(names["broken"])
    assert chosen("--id", ids[0], "--id", ids[3]) == sorted([ids[0], ids[3]])
    assert chosen("--since", "1h", "--job", "bounced") == sorted(names["bounced"])
    assert chosen("--since", "2999-01-01") == chosen("--reason", "expired") == []
    assert len(chosen("--limit", "3")) == 3
    ran = bureau.run("list", bureau.name, "--limit", "3")
    assert f"not looked at in '{bureau.queue}': 1 letter; raise --limit" in ran.stderr
    assert bureau.count() == 4


def test_a_look_leaves_letters_in_their_order(bureau: Bureau) -> None:
    bureau.bury()
    sent = [f"j{number}" for number in range(100)]
    for job_id in sent:
        bureau.publish(TOPOLOGY.dead.name, f"job.{bureau.name}", message_id=job_id, type="bounced")
    for _ in range(2):
        assert [it["id"] for it in bureau.listed()] == sent


def test_letters_are_counted_by_job_and_reason(bureau: Bureau) -> None:
    bureau.bury(broken=1, bounced=2)
    said = shown(bureau.run("list", bureau.name, "--count"))
    assert said == (
        f"      2  {bureau.name}.bounced  gave_up, executed: yes\n"
        f"      1  {bureau.name}.broken  attempts, executed: yes\n"
    )
    (one,) = bureau.objects("list", bureau.name, "--count", "--reason", "attempts")
    assert one == {"job": f"{bureau.name}.broken", "reason": "attempts", "executed": "yes", "count": 1}
    assert bureau.count() == 3


def test_one_letter_is_shown_with_all_that_it_has(bureau: Bureau) -> None:
    (job_id,) = bureau.bury(broken=1, metadata={"x-tenant": "t\x1b1"}, idempotency_key="k-7")
    text = shown(bureau.run("show", job_id, bureau.name))
    for line in ("reason attempts", "key k-7", "headers", r"  x-tenant t\x1b1", "  type broken", 'body {"number":0}'):
        assert f"\n{line}\n" in text, text
    (letter,) = bureau.objects("show", job_id, bureau.name)
    assert letter["headers"]["rpcq-dead-reason"] == "attempts"
    assert letter["properties"]["message_id"] == job_id
    assert letter["properties"]["delivery_mode"] == 2
    ran = bureau.run("show", "none", bureau.name)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert f"no such letters among the 1 in '{bureau.queue}'" in ran.stderr


def test_a_letter_that_the_broker_wrote_may_have_run(bureau: Bureau) -> None:
    bureau.bury(bounced=1)
    bureau.publish(TOPOLOGY.jobs.name, bureau.name, message_id="poison", type="broken")
    jobs = TOPOLOGY.queue(bureau.name).name
    for _ in range(21):
        method, *_ = bureau.channel.basic_get(jobs)
        assert method is not None
        bureau.channel.basic_reject(method.delivery_tag, requeue=True)
    wait_until(lambda: bureau.count() == 2)
    (letter,) = bureau.listed("--id", "poison")
    assert datetime.fromisoformat(letter.pop("died_at")).year >= 2024
    assert (letter["reason"], letter["executed"], letter["from"]) == ("delivery_limit", "maybe", jobs)
    assert letter["job"] == f"{bureau.name}.broken"
    shown(bureau.run("replay", bureau.name, "--id", "poison", "--yes"))
    method, properties, _ = bureau.channel.basic_get(jobs, auto_ack=True)
    assert method is not None
    assert set(properties.headers) - {"x-delivery-count"} == {"rpcq-first-sent"}


def test_what_cannot_be_read_is_listed_and_stays(bureau: Bureau) -> None:
    bureau.bury()
    bureau.publish(
        "", bureau.queue, message_id="odd", headers={"rpcq-dead-reason": 7, "x-death": "none"}, body=b"\xff\x1b"
    )
    bureau.publish("", bureau.queue)
    nameless, odd = sorted(bureau.listed(), key=lambda it: str(it["id"]))
    assert (nameless["id"], nameless["executed"], odd["executed"]) == ("", "maybe", "maybe")
    assert "body \\xff\\x1b" in shown(bureau.run("show", "odd", bureau.name)).replace("\\\\", "\\")
    ran = bureau.run("replay", bureau.name, "--yes")
    assert ran.returncode == 1
    assert ran.stdout == "replayed 0 dead letters\n"
    assert "2 dead letters not replayed: the address" in ran.stderr.replace("\n", " ")
    assert bureau.count() == 2


# Lost messages.


def test_messages_whose_queue_is_gone_are_listed_and_replayed(bureau: Bureau) -> None:
    bureau.bury()
    gone = f"{bureau.name}-gone"
    retry = {"message_id": f"{bureau.name}-1", "type": "broken", "headers": {"rpcq-attempt": 3}}
    bureau.publish(TOPOLOGY.due.name, f"{ZEROS}job.{gone}", **retry)
    dead = {"rpcq-dead-reason": "invalid", "rpcq-executed": "no", "rpcq-from": gone}
    bureau.publish(TOPOLOGY.dead.name, f"job.{gone}", message_id=f"{bureau.name}-2", type="bounced", headers=dead)
    bureau.publish(TOPOLOGY.due.name, f"{gone}:suspects", message_id=f"{bureau.name}-3", type="bounced")
    mine = ["--lost", *(part for number in (1, 2, 3) for part in ("--id", f"{bureau.name}-{number}"))]
    found = [(it["job"], it["reason"], it["executed"], it["address"]) for it in bureau.objects("list", *mine)]
    assert sorted(found) == [
        (f"{gone}.bounced", "invalid", "no", f"job.{gone}"),
        (f"{gone}.bounced", "lost", "maybe", f"{gone}:suspects"),
        (f"{gone}.broken", "lost", "yes", f"job.{gone}"),
    ]
    ran = bureau.run("replay", *mine, "--yes")
    assert ran.returncode == 1
    assert f"3 lost messages not replayed: no queue takes jobs of service '{gone}'" in ran.stderr
    assert "replayed 2 lost messages" in shown(
        bureau.run("replay", *mine, "--reason", "lost", "--to", bureau.name, "--yes")
    )
    bureau.work(2)
    assert "deleted 1 lost message\n" in shown(bureau.run("purge", *mine, "--yes"))
    assert bureau.objects("list", *mine) == []


# Replaying.


def test_a_replay_keeps_id_and_key_and_begins_at_the_first_attempt(bureau: Bureau) -> None:
    (job_id,) = bureau.bury(broken=1, metadata={"x-tenant": "t1"}, idempotency_key="k-7")
    assert shown(bureau.run("replay", bureau.name, "--yes")) == "replayed 1 dead letter\n"
    assert bureau.count() == 0
    method, properties, body = bureau.channel.basic_get(TOPOLOGY.queue(bureau.name).name, auto_ack=True)
    assert method is not None
    assert (properties.message_id, properties.type, properties.delivery_mode, body) == (
        job_id,
        "broken",
        2,
        b'{"number":0}',
    )
    headers = properties.headers
    assert isinstance(headers.pop("rpcq-first-sent"), int)
    assert {name: value for name, value in headers.items() if name != "x-delivery-count"} == {
        "rpcq-idempotency-key": "k-7",
        "x-tenant": "t1",
    }


def test_replayed_jobs_are_done(bureau: Bureau) -> None:
    bureau.bury(broken=3, bounced=40)
    assert shown(bureau.run("replay", bureau.name, "--job", "bounced", "--yes")) == "replayed 40 dead letters\n"
    bureau.work(40)
    assert sorted(bureau.done) == list(range(40))
    assert [it["job"] for it in bureau.listed()] == [f"{bureau.name}.broken"] * 3


def test_a_replay_asks_first_with_the_number_of_letters(bureau: Bureau) -> None:
    bureau.bury(broken=1, bounced=2)
    ran = bureau.run("replay", bureau.name, "--job", "bounced", given="n\n")
    assert (ran.returncode, ran.stdout) == (1, "")
    assert f"Replay 2 dead letters to '{bureau.name}'? [y/N]" in ran.stderr
    assert bureau.run("replay", bureau.name).returncode == 1  # nobody answers
    dry = shown(bureau.run("replay", bureau.name, "--job", "bounced", "--dry-run"))
    assert dry.count("gave_up") == 2
    assert dry.endswith(f"would replay 2 dead letters to '{bureau.name}'\n")
    assert bureau.count() == 3
    ran = bureau.run("replay", bureau.name, "--limit", "2", given="y\n")
    assert shown(ran) == "replayed 2 dead letters\n"
    assert f"Replay 2 dead letters to '{bureau.name}'?" in ran.stderr
    assert bureau.count() == 1


def test_a_letter_that_no_queue_takes_stays_and_is_reported(bureau: Bureau) -> None:
    ids = bureau.bury(bounced=3)
    ran = bureau.run("replay", bureau.name, "--to", f"{bureau.name}-none", "--yes")
    assert ran.returncode == 1
    assert ran.stdout == "replayed 0 dead letters\n"
    assert (
        f"3 dead letters not replayed: no queue takes jobs of service '{bureau.name}-none': run `rpcq setup`"
        in ran.stderr
    )
    said = bureau.objects("replay", bureau.name, "--to", f"{bureau.name}-none", "--yes", code=1)
    assert {(it["id"], it["replayed"]) for it in said} == {(each, False) for each in ids}
    assert all("no queue takes jobs" in it["why"] for it in said)
    said = bureau.objects("replay", bureau.name, "--to", f"{bureau.name}-none", "--limit", "2", "--yes", code=1)
    assert len(said) == 2
    assert bureau.count() == 3


def test_a_letter_that_the_broker_refuses_stays_and_is_reported(bureau: Bureau) -> None:
    bureau.bury(bounced=3)
    full = f"{SHARED}.full.{bureau.name}"
    arguments = {"x-queue-type": "quorum", "x-max-length": 1, "x-overflow": "reject-publish"}
    bureau.channel.queue_declare(full, durable=True, arguments=arguments)
    bureau.channel.queue_bind(full, TOPOLOGY.jobs.name, f"{bureau.name}-full")
    for _ in range(2):  # a quorum queue takes a few more than its limit
        bureau.channel.basic_publish("", full, b"")
    wait_until(lambda: bureau.count(full) == 2)
    said = bureau.objects("replay", bureau.name, "--to", f"{bureau.name}-full", "--yes", code=1)
    refused = [it for it in said if not it["replayed"]]
    assert len(said) == 3
    assert refused
    assert all("the broker refused it" in it["why"] for it in refused)
    assert bureau.count() == len(refused)
    bureau.channel.queue_delete(full)


def test_a_rate_holds_replays_back(bureau: Bureau) -> None:
    bureau.bury(bounced=10)
    began = datetime.now(UTC)
    assert shown(bureau.run("replay", bureau.name, "--rate", "5", "--yes")) == "replayed 10 dead letters\n"
    assert (datetime.now(UTC) - began).total_seconds() > 9 / 5


def test_thousands_of_letters_are_gone_through_once_and_none_is_left_or_lost(bureau: Bureau) -> None:
    bureau.bury()
    headers = {"rpcq-dead-reason": "gave_up", "rpcq-executed": "yes"}
    for number in range(3000):
        name = ("broken", "bounced", "other")[number % 3]
        bureau.publish(TOPOLOGY.dead.name, f"job.{bureau.name}", message_id=f"j{number}", type=name, headers=headers)
    assert len(bureau.listed("--limit", "5000")) == 3000
    assert len(bureau.listed()) == 1000
    assert [it["count"] for it in bureau.listed("--count")] == [1000] * 3
    assert shown(bureau.run("replay", bureau.name, "--job", "bounced", "--yes")) == "replayed 1000 dead letters\n"
    assert bureau.count(TOPOLOGY.queue(bureau.name).name) == 1000
    assert shown(bureau.run("purge", bureau.name, "--job", "other", "--yes")) == "deleted 1000 dead letters\n"
    wait_until(lambda: bureau.count() == 1000)
    assert {it["job"] for it in bureau.listed()} == {f"{bureau.name}.broken"}
    assert shown(bureau.run("purge", bureau.name, "--yes")) == "deleted 1000 dead letters\n"
    wait_until(lambda: bureau.count() == 0)


async def test_what_is_held_too_long_goes_back_and_each_letter_is_tried_once(
    bureau: Bureau, monkeypatch: pytest.MonkeyPatch
) -> None:
    await asyncio.to_thread(bureau.bury, 2, 4)
    headers = {"rpcq-dead-reason": "gave_up"}
    await asyncio.to_thread(bureau.publish, "", bureau.queue, message_id="stays", type="bounced", headers=headers)
    monkeypatch.setattr(replaying, "HELD_AT_MOST", -1.0)  # after each letter
    reported: list[tuple[str, str]] = []
    options, broker = ConnectionOptions(), parse(bureau.url)
    async with open_admin(broker, options, *broker.hosts[0]) as admin:
        letters = Letters(admin, EVENTS, bureau.queue)
        replayer = Replayer(
            letters,
            open_transport(bureau.url, options),
            to=None,
            rate=None,
            report=lambda letter, why: reported.append((letter.job.id, why)),
        )
        await replayer.run(Wanted(jobs=frozenset(["bounced"])), 7, 7)
    assert (replayer.done, replayer.stay, len(reported)) == (4, 1, 5)
    assert [job_id for job_id, why in reported if why] == ["stays"]
    wait_until(lambda: bureau.count() == 3)


# Purging.


def test_a_purge_deletes_what_is_meant_and_no_more(bureau: Bureau) -> None:
    ids = bureau.bury(broken=2, bounced=2)
    assert "would delete 2 dead letters for good" in shown(
        bureau.run("purge", bureau.name, "--reason", "attempts", "--dry-run")
    )
    ran = bureau.run("purge", bureau.name, "--reason", "attempts", given="y\n")
    assert shown(ran) == "deleted 2 dead letters\n"
    assert "Delete 2 dead letters for good?" in ran.stderr
    assert sorted(it["id"] for it in bureau.listed()) == sorted(ids[2:])
    (gone,) = bureau.objects("purge", bureau.name, "--limit", "1", "--yes")
    assert (gone["id"] in ids[2:], gone["deleted"]) == (True, True)
    assert bureau.count() == 1


# Others at the same queue.


def test_letters_that_somebody_else_holds_are_not_passed_over_in_silence(bureau: Bureau) -> None:
    bureau.bury(bounced=3)
    with pika.BlockingConnection(pika.URLParameters(bureau.url)) as connection:
        channel = connection.channel()
        channel.basic_qos(prefetch_count=1)
        consumer = channel.consume(bureau.queue)
        next(consumer)
        ran = bureau.run("list", bureau.name, "--json")
    assert len(shown(ran).splitlines()) == 2
    assert f"'{bureau.queue}' has 1 consumer, who may hold letters: these are not seen here" in ran.stderr
    wait_until(lambda: bureau.count() == 3)


def test_a_command_that_is_killed_loses_no_letter(bureau: Bureau) -> None:
    bureau.bury(bounced=5)
    own = ["dlq", "replay", bureau.name, "--rate", "0.5", "--yes", "--namespace", SHARED]
    process = bureau._rpcq.start(*own)
    wait_until(lambda: bureau.count(TOPOLOGY.queue(bureau.name).name) > 0)
    process.kill()
    wait_until(lambda: bureau.count() + bureau.count(TOPOLOGY.queue(bureau.name).name) >= 5)
    bureau.fails = False
    shown(bureau.run("replay", bureau.name, "--yes"))
    bureau.work(5)
    assert set(bureau.done) == set(range(5))


# All services.


def test_the_management_api_knows_the_queues_of_all_services(tmp_path: Path) -> None:
    setup = Setup(
        config="management.tcp.port = {ports[0]}\nloopback_users.guest = false\n",
        files=lambda _: {"enabled_plugins": b"[rabbitmq_management].\n"},
        ports=1,
    )
    with a_broker(setup=setup) as own, pika.BlockingConnection(pika.URLParameters(own.url)) as connection:
        two = [Bureau(own.url, tmp_path, connection.channel()) for _ in range(2)]
        ids = [job_id for each in two for job_id in each.bury(bounced=2)]
        management = f"http://127.0.0.1:{next(iter(own.ports.values()))}"
        found: list[dict[str, Any]] = []

        def all_of_them() -> list[dict[str, Any]]:
            found[:] = two[0].objects("list", "--management", management)
            return found if len(found) == 4 else []

        wait_until(all_of_them)  # the API's view of the queues is a little late
        assert {it["id"] for it in found} == set(ids)
        assert {it["job"] for it in found} == {f"{each.name}.bounced" for each in two}
        (letter,) = two[0].objects("show", ids[3], "--management", management)
        assert letter["id"] == ids[3]
        wrong = management.replace("//", "//guest:wrong@")
        assert "the management API did not answer" in two[0].refused("list", "--management", wrong, code=3)


# Errors.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["list"], "name a service, or give --lost; or --management, because AMQP cannot list queues"),
        (["replay"], "name a service, or give --lost"),
        (["list", "things", "--lost"], "--lost is about messages of all services; got the service 'things' too"),
        (["list", "a:b"], "the name of a service must"),
        (["list", "things", "--since", "often"], "--since must be a duration such as 90s"),
        (["replay", "things", "--rate", "0"], "--rate must be a number of letters a second above 0; got 0"),
        (["replay", "things", "--rate", "nan"], "--rate must be a number of letters a second above 0; got nan"),
        (["list", "--url", "memory://"], "its broker is part of each process, and ends with it"),
        (["purge", "things", "--url", "memory://"], "its broker is part of each process, and ends with it"),
    ],
)
def test_what_cannot_be_done_is_said(rpcq: Rpcq, arguments: Sequence[str], message: str) -> None:
    assert message in rpcq.refused("dlq", *arguments, code=USAGE)


def test_a_service_without_a_queue_is_named(bureau: Bureau) -> None:
    said = bureau.refused("list", bureau.name, code=3)
    assert f"there is no queue '{bureau.queue}'" in said
    assert "there is no queue" in bureau.refused("purge", bureau.name, "--yes", code=3)


# Events.


class Shipped(Event, name=f"{SHARED}.shipped"):
    number: int


def test_dead_letters_of_a_subscription_are_shown_and_replayed_to_it_alone(bureau: Bureau) -> None:
    fails, ran = [True], []

    @bureau.service.on(Shipped)
    async def look(event: Shipped) -> None:
        ran.append(("look", event.number))
        if fails:
            raise GiveUp("no such order")

    @bureau.service.on(Shipped)
    async def beside(event: Shipped) -> None:
        ran.append(("beside", event.number))

    def serve(count: int, *events: Shipped) -> None:
        async def work() -> None:
            worker = Worker(bureau.service, url=bureau.url, namespace=SHARED)
            async with worker, Client(bureau.url, namespace=SHARED) as client:
                for event in events:
                    await client.publish(event)
                while len(ran) < count or worker.in_flight:  # noqa: ASYNC110 - no event tells
                    await asyncio.sleep(0.005)

        asyncio.run(work())

    serve(4, Shipped(number=7), Shipped(number=8))
    found = bureau.listed()
    assert {(it["job"], it["event"], it["reason"]) for it in found} == {
        (f"{bureau.name}.look", f"{SHARED}.shipped", "gave_up")
    }
    assert len(found) == 2
    assert f"{bureau.name}.look ({SHARED}.shipped)" in shown(bureau.run("list", bureau.name, "--job", "look"))
    text = shown(bureau.run("show", found[0]["id"], bureau.name))
    assert "rpcq-event-version" in text
    assert '{"number":7}' in text
    fails.clear()
    (stays,) = bureau.objects("replay", bureau.name, "--to", bureau.name, "--limit", "1", "--yes", code=1)
    assert f"name a subscription, --to {bureau.name}:look" in stays["why"]
    (gone,) = bureau.objects("replay", bureau.name, "--to", f"{bureau.name}:gone", "--limit", "1", "--yes", code=1)
    assert "the subscription is gone" in gone["why"]
    assert bureau.run("replay", bureau.name, "--yes").returncode == 0
    serve(6)
    assert sorted(ran[4:]) == [("look", 7), ("look", 8)]
    assert bureau.count() == 0

"""Mixed load for minutes while faults strike at random, and a report.

    python tests/soak.py --minutes 10 --seed 7

The report says what was injected, what callers were told, whether the oracle holds, and what the client and a worker
hold at the start and at the end. Two scenes run side by side, one with a classic and one with a quorum request queue,
on a broker of the soak's own. Every choice comes from the seed; what the machine makes of it does not.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import platform
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aio_pika
import psutil

import broker as brokers
from load import Ledger, Load, Scene, WorkerProcess
from proxy import Proxy, proxy
from rpcq import Client, Retry, RpcqError

WARM_UP = 15.0
"""Seconds of load before the first fault, and before memory is taken as that of the start."""

CALM = 15.0
"""Seconds without faults at the end: everything has to come back."""

HEARTBEAT = 2

UNDERWAY: Counter[str] = Counter()

YOUNG = asyncio.Lock()
"""Held while a request queue may be new: see `Broker.kill`."""


@dataclass
class Stage:
    """One scene, with all that faults strike at."""

    scene: Scene
    client: Client
    client_proxy: Proxy
    worker_proxies: list[Proxy]
    broker: brokers.Broker
    dice: random.Random
    steady: WorkerProcess
    victims: list[WorkerProcess] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    plain: Load = field(init=False)
    """Calls of which none fails where nothing strikes."""
    faulty: Ledger = field(init=False)
    """Calls that are faults themselves."""

    # Workers.

    async def start_victim(self, number: int) -> WorkerProcess:
        url = self.worker_proxies[number].url
        return await self.scene.worker("--grace", "8", url=url, RPCQ_HEARTBEAT=str(HEARTBEAT))

    async def replace(self, number: int) -> None:
        """Another worker for one that has ended."""
        await self.bury(self.victims[number])
        while True:
            try:
                self.victims[number] = await self.start_victim(number)
            except AssertionError:  # the broker was away
                await self.bury(self.scene.workers[-1])
                await asyncio.sleep(0.5)
            else:
                return

    async def bury(self, gone: WorkerProcess) -> None:
        await asyncio.to_thread(gone.kill)  # closes its pipes
        self.scene.workers.remove(gone)

    async def worker_killed(self) -> None:
        number = self.dice.randrange(len(self.victims))
        self.victims[number].signal(signal.SIGKILL)
        await self.replace(number)

    async def worker_terminated(self) -> None:
        number = self.dice.randrange(len(self.victims))
        self.victims[number].signal(signal.SIGTERM)
        await self.victims[number].exit_code(30.0)
        await self.replace(number)

    async def worker_stopped(self) -> None:
        victim = self.dice.choice(self.victims)
        victim.freeze()
        await asyncio.sleep(self.dice.uniform(0.5, 3 * HEARTBEAT))
        victim.thaw()

    async def event_loop_blocked(self) -> None:
        await self.one_call("block", seconds=self.dice.uniform(1.0, 3 * HEARTBEAT))

    async def poison_request(self) -> None:
        await self.one_call("die")
        for number, victim in enumerate(self.victims):
            if not victim.is_alive:
                await self.replace(number)

    # Connections.

    async def client_reset(self) -> None:
        self.client_proxy.reset()
        await asyncio.sleep(1)

    async def client_consuming_reset(self) -> None:
        await self.reset_role(self.client_proxy, "consuming")

    async def client_publishing_reset(self) -> None:
        await self.reset_role(self.client_proxy, "publishing")

    async def worker_consuming_reset(self) -> None:
        await self.reset_role(self.dice.choice(self.worker_proxies), "consuming")

    async def worker_publishing_reset(self) -> None:
        await self.reset_role(self.dice.choice(self.worker_proxies), "publishing")

    async def reset_role(self, between: Proxy, role: str) -> None:
        for connection in between.with_role(role):
            connection.reset()
        await asyncio.sleep(1)

    async def client_half_open(self) -> None:
        await self.frozen(self.client_proxy)

    async def worker_half_open(self) -> None:
        await self.frozen(self.dice.choice(self.worker_proxies))

    async def frozen(self, between: Proxy) -> None:
        between.freeze()
        await asyncio.sleep(self.dice.uniform(0.5, 3 * HEARTBEAT))
        between.thaw()

    async def worker_cut_off(self) -> None:
        between = self.dice.choice(self.worker_proxies)
        between.refuse()
        between.reset()
        await asyncio.sleep(self.dice.uniform(0.5, 2))
        between.allow()

    async def slow_network(self) -> None:
        await self.disturbed(delay=self.dice.uniform(0.02, 0.1))

    async def narrow_network(self) -> None:
        await self.disturbed(rate=self.dice.uniform(100_000, 400_000))

    async def split_frames(self) -> None:
        await self.disturbed(split=self.dice.randrange(1, 64))

    async def disturbed(self, **faults: Any) -> None:
        between = self.dice.choice([self.client_proxy, *self.worker_proxies])
        between.both(**faults)
        await asyncio.sleep(self.dice.uniform(1, 2))
        between.both(delay=0, rate=0, split=0)

    async def cut_at_byte(self) -> None:
        between = self.dice.choice([self.client_proxy, *self.worker_proxies])
        way = self.dice.choice(["up", "down"])
        for connection in list(between.connections):
            connection.cut(**{way: self.dice.randrange(20_000)})
        await asyncio.sleep(1.5)
        between.cut()

    async def garbage_frames(self) -> None:
        between = self.dice.choice([self.client_proxy, *self.worker_proxies])
        way = self.dice.choice([between.up, between.down])

        def spoil(data: bytes) -> bytes:
            at = (
                len(data) - 1
            )  # the end of a frame, which has to be 0xCE: a flipped byte of a body is nobody's to notice
            return data[:at] + bytes([data[at] ^ 0xFF])

        way.filter = spoil
        await asyncio.sleep(0.3)
        way.filter = lambda data: data
        await asyncio.sleep(1)

    # Messages, callers.

    async def strange_messages(self) -> None:
        """Duplicate, late, unknown and broken replies; requests that are none."""
        encoder = self.client._sender.encoder
        with contextlib.suppress(Exception):  # the broker may be away just now: then there is nobody to confuse
            async with await aio_pika.connect(self.scene.url, timeout=5) as connection:
                channel = await connection.channel()
                requests = await channel.get_exchange(f"{self.scene.namespace}.requests", ensure=False)
                for number in range(50):
                    correlation_id = self.dice.choice(["", "nobody", f"{self.dice.getrandbits(64):x}-{number}"])
                    body = self.dice.choice([b"", b"null", b"[" * 100_000, b"\xff\xfe", b'"stray"'])
                    kind = self.dice.choice(["result", "error", "item", ""])
                    message = aio_pika.Message(body, type=kind, correlation_id=correlation_id)
                    if encoder is not None:
                        name = encoder.reply_to.decode()
                        await channel.default_exchange.publish(message, name, mandatory=False)
                    message = aio_pika.Message(body, type="once", content_type=self.dice.choice(["text/plain", None]))
                    await requests.publish(message, "target", mandatory=False)

    async def callers_cancelled(self) -> None:
        load = Load(self.client, self.faulty, params={"seconds": 2.0})
        calls = [asyncio.create_task(load.call()) for _ in range(100)]
        await asyncio.sleep(self.dice.uniform(0, 0.3))
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

    async def overload(self) -> None:
        """Far more than the workers can do in the time: what does not come to its turn has to end all the same."""
        burst = Load(self.client, self.faulty, timeout=1.0, params={"seconds": 0.3})
        await asyncio.gather(*(burst.call() for _ in range(2000)))

    async def client_killed(self) -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            __file__,
            "--call",
            self.scene.url,
            self.scene.namespace,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        assert process.stdout is not None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5):
                await process.stdout.readline()
        await asyncio.sleep(self.dice.uniform(0, 0.5))
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself: the broker was away
            process.kill()
        await process.wait()

    async def one_call(self, method: str, **params: Any) -> None:
        load = Load(self.client, self.faulty, method=method, timeout=10.0)
        await load.call(**params)

    # The broker, but only this scene's part of it.

    async def request_queue_deleted(self) -> None:
        async with YOUNG:
            await self.ctl("delete_queue", self.scene.queue, "--vhost", brokers.vhost_of(self.scene.url))
            await asyncio.sleep(8)

    async def reply_queue_deleted(self) -> None:
        if (encoder := self.client._sender.encoder) is not None:
            await self.ctl("delete_queue", encoder.reply_to.decode(), "--vhost", brokers.vhost_of(self.scene.url))

    async def queue_full(self) -> None:
        vhost = ("--vhost", brokers.vhost_of(self.scene.url))
        pattern = "^" + self.scene.queue.replace(".", "[.]") + "$"
        name = f"full-{self.scene.namespace}"
        if not await self.ctl("set_policy", *vhost, name, pattern, '{"max-length":1}', "--apply-to", "queues"):
            return
        await asyncio.sleep(0.5)
        while not await self.ctl("clear_policy", *vhost, name):  # noqa: ASYNC110 - until the broker is there again
            await asyncio.sleep(1)

    async def ctl(self, *arguments: str) -> bool:
        """Whether that succeeded: the broker may be away just now, or the queue be gone already."""
        try:
            await asyncio.to_thread(self.broker.ctl, *arguments)
        except brokers.CtlFailed:
            return False
        return True


STAGE_FAULTS: tuple[Callable[[Stage], Awaitable[None]], ...] = (
    Stage.worker_killed,
    Stage.worker_terminated,
    Stage.worker_stopped,
    Stage.event_loop_blocked,
    Stage.poison_request,
    Stage.client_reset,
    Stage.client_consuming_reset,
    Stage.client_publishing_reset,
    Stage.worker_consuming_reset,
    Stage.worker_publishing_reset,
    Stage.client_half_open,
    Stage.worker_half_open,
    Stage.worker_cut_off,
    Stage.slow_network,
    Stage.narrow_network,
    Stage.split_frames,
    Stage.cut_at_byte,
    Stage.garbage_frames,
    Stage.strange_messages,
    Stage.callers_cancelled,
    Stage.overload,
    Stage.client_killed,
    Stage.request_queue_deleted,
    Stage.reply_queue_deleted,
    Stage.queue_full,
)


async def broker_restarted(broker: brokers.Broker) -> None:
    await asyncio.to_thread(broker.restart)


async def broker_killed(broker: brokers.Broker) -> None:
    async with YOUNG:
        await asyncio.to_thread(broker.kill)
        await asyncio.to_thread(broker.start)


async def memory_alarm(broker: brokers.Broker) -> None:
    await asyncio.to_thread(broker.ctl, "set_vm_memory_high_watermark", "absolute", "1MB")
    await asyncio.sleep(2)
    await asyncio.to_thread(broker.ctl, "set_vm_memory_high_watermark", "0.6")


async def connections_closed(broker: brokers.Broker) -> None:
    await asyncio.to_thread(broker.close_connections, broker.url)
    await asyncio.sleep(2)


BROKER_FAULTS: tuple[Callable[[brokers.Broker], Awaitable[None]], ...] = (
    broker_restarted,
    broker_killed,
    memory_alarm,
    connections_closed,
)


async def strike(faults: Any, at: Any, dice: random.Random, struck: Counter[str], until: float, rest: float) -> None:
    """Let all faults strike in random order, again and again."""
    while time.monotonic() < until:
        for fault in dice.sample(faults, len(faults)):
            if time.monotonic() > until:
                return
            name = fault.__name__
            UNDERWAY[name] += 1
            await fault(at)
            UNDERWAY[name] -= 1
            struck[name] += 1
            await asyncio.sleep(dice.uniform(0, rest))


async def set_stage(
    stack: AsyncExitStack, broker: brokers.Broker, queue_type: Any, folder: Path, dice: random.Random
) -> Stage:
    namespace = f"soak-{queue_type}-{dice.getrandbits(32):08x}"
    scene = Scene(broker.url, namespace, queue_type, folder / queue_type)
    scene.folder.mkdir()
    await stack.enter_async_context(scene)
    proxies = [await stack.enter_async_context(proxy(broker.url)) for _ in range(3)]
    client = await stack.enter_async_context(Client(proxies[0].url, namespace=namespace, heartbeat=HEARTBEAT))
    # With little room for remembered results, which else would be most of what it comes to hold.
    steady = await scene.worker(RPCQ_TEST_LIVES="yes", RPCQ_REMEMBER="1000000")
    stage = Stage(scene, client, proxies[0], proxies[1:], broker, dice, steady)
    stage.victims = [await stage.start_victim(number) for number in range(2)]
    quick = {"seconds": 0.01}
    retry = Retry(max_attempts=20, initial_backoff=0.05, max_backoff=1.0)
    stage.plain = scene.load(client, callers=25, params=quick, think=0.01)
    stage.loads = [
        stage.plain,
        scene.load(client, callers=15, method="again", idempotent=True, params=quick, timeout=20, think=0.01),
        scene.load(client, callers=5, retry=retry, timeout=20, think=0.02),
        scene.load(client, callers=3, method="thread", params={"seconds": 0.02}, think=0.02),
        scene.load(client, callers=3, params={"seconds": 0.3}, timeout=0.25, think=0.1),
        scene.load(client, callers=2, method="fail", think=0.1),
        scene.load(client, callers=2, method="refuse", think=0.1),
    ]
    stage.loads.append(scene.load(client, callers=0))
    stage.faulty = stage.loads[-1].ledger
    return stage


@dataclass
class Held:
    """What a process holds."""

    memory: float
    files: int
    tasks: int | None = None
    pending: int | None = None

    @classmethod
    def by(cls, process: WorkerProcess) -> Held:
        found = psutil.Process(process.pid)
        return cls(found.memory_info().rss / 1e6, found.num_fds())

    @classmethod
    def here(cls, stages: list[Stage]) -> Held:
        gc.collect()
        found = psutil.Process()
        pending = sum(stage.client.in_flight for stage in stages)
        return cls(found.memory_info().rss / 1e6, found.num_fds(), len(asyncio.all_tasks()), pending)

    def __str__(self) -> str:
        more = "" if self.tasks is None else f", {self.tasks} tasks, {self.pending} calls pending"
        return f"{self.memory:.1f} MB, {self.files} file descriptors{more}"


class Soak:
    """A run, and what came of it."""

    def __init__(self, minutes: float, seed: int) -> None:
        self.minutes = minutes
        self.seed = seed
        self.dice = random.Random(seed)
        self.stages: list[Stage] = []
        self.struck: Counter[str] = Counter()
        self.held: dict[str, list[Held]] = {}
        self.problems: list[str] = []
        self.seconds = 0.0
        self.version = ""

    @property
    def loads(self) -> list[Load]:
        return [load for stage in self.stages for load in stage.loads]

    async def run(self) -> None:
        with tempfile.TemporaryDirectory(prefix="rpcq-soak-") as name, brokers.broker(setup=brokers.Setup()) as broker:
            self.version = broker.version
            async with AsyncExitStack() as stack:
                for kind in ("classic", "quorum"):
                    dice = random.Random(self.dice.getrandbits(64))
                    self.stages.append(await set_stage(stack, broker, kind, Path(name), dice))
                idle = Held.here(self.stages)
                async with AsyncExitStack() as calling:
                    for load in self.loads:
                        await calling.enter_async_context(load)
                    await self.under_faults(broker)
                for _ in range(100):  # replies on their way
                    if len(asyncio.all_tasks()) == idle.tasks:
                        break
                    await asyncio.sleep(0.05)
                last = self.note("client process: both clients, the proxies, all callers", Held.here(self.stages))
                if (last.tasks, last.pending) != (idle.tasks, 0):
                    self.problems.append(f"left over: {last}, and {idle.tasks} tasks there were before")
                for stage in self.stages:
                    self.note(f"a worker, {stage.scene.queue_type} queue", Held.by(stage.steady))
                    try:
                        await stage.scene.check()
                    except AssertionError as error:
                        self.problems.append(f"{stage.scene.queue_type}: {error}")

    async def under_faults(self, broker: brokers.Broker) -> None:
        await asyncio.sleep(WARM_UP)
        self.note("client process: both clients, the proxies, all callers", Held.here(self.stages))
        for stage in self.stages:
            self.note(f"a worker, {stage.scene.queue_type} queue", Held.by(stage.steady))
        began = time.monotonic()
        until = began + self.minutes * 60
        progress = asyncio.create_task(self.tell(began))
        await asyncio.gather(
            *(strike(STAGE_FAULTS, stage, stage.dice, self.struck, until, 0.5) for stage in self.stages),
            strike(BROKER_FAULTS, broker, random.Random(self.dice.getrandbits(64)), self.struck, until, 20.0),
        )
        progress.cancel()
        await asyncio.sleep(CALM)
        # Everything has come back: of calls made now that are not meant to fail, none does.
        before = [stage.plain.ledger.failed for stage in self.stages]
        await asyncio.sleep(3)
        if [stage.plain.ledger.failed for stage in self.stages] != before:
            self.problems.append("calls still failed after the calm")
        self.note("client process: both clients, the proxies, all callers", Held.here(self.stages))
        self.seconds = time.monotonic() - began + WARM_UP

    def note(self, who: str, held: Held) -> Held:
        self.held.setdefault(who, []).append(held)
        return held

    async def tell(self, began: float) -> None:
        """Every half a minute, how it goes."""
        while True:
            await asyncio.sleep(30)
            ended = sum(load.ledger.ended for load in self.loads)
            failed = sum(load.ledger.failed for load in self.loads)
            violations = sum(len(load.ledger.violations) for load in self.loads)
            after, faults = time.monotonic() - began, sum(self.struck.values())
            now = ", ".join(name.replace("_", " ") for name in +UNDERWAY)
            say(f"{after:4.0f} s: {ended} calls, {failed} failed, {faults} faults, {violations} violations; now {now}")
            for stage in self.stages:
                for worker in stage.scene.workers:
                    del worker.lines[:-20]  # their logs would be this process's memory

    def report(self) -> None:
        told: Counter[str] = Counter()
        for load in self.loads:
            told.update(load.ledger.counts)
        say(f"\nRabbitMQ {self.version}, Python {platform.python_version()}, seed {self.seed}\n")
        say(
            f"{told.total()} calls in {self.seconds:.0f} s, {told.total() / self.seconds:.0f} a second; "
            f"{self.struck.total()} faults; {len(self.problems)} violations of the oracle\n"
        )
        say("| what callers were told | calls |\n|---|---|")
        for kind, count in told.most_common():
            say(f"| {kind.replace('/', ', executed ')} | {count} |")
        say("\n| fault | times |\n|---|---|")
        for kind, count in sorted(self.struck.items()):
            say(f"| {kind.replace('_', ' ')} | {count} |")
        say("\n| holds | at the start | ... | at the end |\n|---|---|---|---|")
        for who, held in self.held.items():
            say(f"| {who} | {held[0]} | {held[1] if len(held) > 2 else ''} | {held[-1]} |")
        for problem in self.problems:
            say(f"\nVIOLATION: {problem}")


def say(text: str) -> None:
    print(text, flush=True)


async def call_on(url: str, namespace: str) -> None:
    """What is killed in the middle of it."""
    async with Client(url, namespace=namespace) as client:
        say("calling")
        while True:
            calls = (client.call("target.again", nonce=f"of-the-killed-{number}", seconds=0.1) for number in range(50))
            await asyncio.gather(*calls, return_exceptions=True)


def main() -> int:
    if sys.argv[1:2] == ["--call"]:
        with contextlib.suppress(RpcqError):
            asyncio.run(call_on(*sys.argv[2:]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=None, help="default: another each time; it is printed")
    given = parser.parse_args()
    logging.getLogger("rpcq").setLevel(logging.CRITICAL)
    seed = random.SystemRandom().getrandbits(32) if given.seed is None else given.seed
    say(f"seed {seed}, {given.minutes:g} minutes")
    run = Soak(given.minutes, seed)
    asyncio.run(run.run())
    run.report()
    return 1 if run.problems else 0


if __name__ == "__main__":
    sys.exit(main())

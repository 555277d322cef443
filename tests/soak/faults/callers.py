"""Callers that die, give up and overdo it; messages that nobody should have sent."""

from __future__ import annotations

import asyncio
import contextlib
import random

import aio_pika

from soak.faults import Fault
from soak.stage import CALL, SERVICES, Stage, environment
from support.load import Load


async def strange_messages(stage: Stage, dice: random.Random) -> None:
    """Duplicate, late, unknown and broken replies; requests that are none."""
    encoder = stage.client._sender.encoder
    with contextlib.suppress(Exception):  # the broker may be away just now: then there is nobody to confuse
        async with await aio_pika.connect(stage.scene.url, timeout=5) as connection:
            channel = await connection.channel()
            requests = await channel.get_exchange(f"{stage.scene.namespace}.requests", ensure=False)
            for number in range(50):
                correlation_id = dice.choice(["", "nobody", f"{dice.getrandbits(64):x}-{number}"])
                body = dice.choice([b"", b"null", b"[" * 100_000, b"\xff\xfe", b'"stray"'])
                kind = dice.choice(["result", "error", "item", ""])
                message = aio_pika.Message(body, type=kind, correlation_id=correlation_id)
                if encoder is not None:
                    name = encoder.reply_to.decode()
                    await channel.default_exchange.publish(message, name, mandatory=False)
                message = aio_pika.Message(body, type="once", content_type=dice.choice(["text/plain", None]))
                await requests.publish(message, dice.choice(SERVICES), mandatory=False)


async def callers_cancelled(stage: Stage, dice: random.Random) -> None:
    load = Load(stage.client, stage.faulty, service=dice.choice(SERVICES), params={"seconds": 2.0})
    calls = [asyncio.create_task(load.call()) for _ in range(100)]
    await asyncio.sleep(dice.uniform(0, 0.3))
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)


async def overload(stage: Stage, dice: random.Random) -> None:
    """Far more than the workers can do in the time: what does not come to its turn has to end all the same."""
    burst = Load(stage.client, stage.faulty, service=dice.choice(SERVICES), timeout=1.0, params={"seconds": 0.3})
    await asyncio.gather(*(burst.call() for _ in range(2000)))


async def client_killed(stage: Stage, dice: random.Random) -> None:
    process = await asyncio.create_subprocess_exec(
        *CALL,
        stage.scene.url,
        stage.scene.namespace,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env=environment(),
    )
    assert process.stdout is not None
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(5):
            await process.stdout.readline()
    await asyncio.sleep(dice.uniform(0, 0.5))
    with contextlib.suppress(ProcessLookupError):  # it has ended by itself: the broker was away
        process.kill()
    await process.wait()


FAULTS: tuple[Fault, ...] = (strange_messages, callers_cancelled, overload, client_killed)

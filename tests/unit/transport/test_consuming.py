"""The consuming channel of RabbitMQ's transport, with a connection that only notes what is written."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from rpcq.transport.rabbitmq import consuming
from rpcq.transport.rabbitmq.consuming import _ConsumingChannel

PREFETCH = 10


def channel(written: list[bytes]) -> _ConsumingChannel:
    protocol: Any = SimpleNamespace(lost=None, write=written.append, register=lambda *_: None)
    link: Any = SimpleNamespace(protocol=protocol, frame_max=4096)
    queue = SimpleNamespace(arguments={"x-delivery-limit": 0})
    subscription: Any = SimpleNamespace(prefetch=PREFETCH, queue=queue, on_delivery=lambda _: None, no_ack=False)
    return _ConsumingChannel(link, 1, subscription, SimpleNamespace(max_body=1000))  # type: ignore[arg-type]


def deliver(to: _ConsumingChannel, *tags: int) -> None:
    for tag in tags:
        to._on_deliver(tag, redelivered=False, properties=b"", body=b"", size=0)


@pytest.mark.parametrize("before", [4, 8], ids=["few in hand: a timer", "many in hand: the end of the iteration"])
async def test_once_it_says_that_nothing_is_on_its_way_no_acknowledgement_makes_the_broker_send_more(
    before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consuming, "QUIET", 0.2)
    written: list[bytes] = []
    it = channel(written)
    deliver(it, *range(1, before + 1))
    it.settle(1, accept=True, requeue=False)
    filling = asyncio.create_task(it.fill())
    await asyncio.sleep(0)
    assert len(written) == 1  # what was settled before: the broker may still send for that, and it is waited for
    it.settle(2, accept=True, requeue=False)
    deliver(it, *range(before + 1, PREFETCH + 2))
    await filling
    await asyncio.sleep(2 * consuming.ACK_DELAY)
    assert len(written) == 1
    it.release()
    assert len(written) == 2

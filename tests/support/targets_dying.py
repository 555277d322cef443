"""What `targets` serves, by a worker that does at the worst moment what others do at some time or other.

RPCQ_TEST_DIES_AFTER: requests after which it acknowledges no more; once it has all messages that it may hold, all
requests in them are answered, and the broker has confirmed each answer, it kills itself.
RPCQ_TEST_LINGERS: seconds that the broker takes to cancel its consumers, and so delivers to a worker that stops.
"""

from __future__ import annotations

import asyncio
import os
import signal

from rpcq.calls.in_hand import CallRun
from rpcq.calls.replying import Replier
from rpcq.transport.rabbitmq.transport import RabbitMQTransport
from support.targets import target

__all__ = ["target"]

if "RPCQ_TEST_DIES_AFTER" in os.environ:
    dies_after, prefetch = int(os.environ["RPCQ_TEST_DIES_AFTER"]), int(os.environ["RPCQ_PREFETCH"])
    answered: list[CallRun] = []
    acknowledge = Replier.acknowledge

    def die(self: Replier, run: CallRun) -> None:
        if self.finished < dies_after:
            acknowledge(self, run)
            return
        answered.append(run)
        if len({it.delivery for it in answered}) == prefetch and len(answered) == len(self.in_hand):
            os.kill(os.getpid(), signal.SIGKILL)

    Replier.acknowledge = die  # type: ignore[method-assign]

if "RPCQ_TEST_LINGERS" in os.environ:
    stop_consuming = RabbitMQTransport.stop_consuming

    async def linger(self: RabbitMQTransport) -> None:
        await asyncio.sleep(float(os.environ["RPCQ_TEST_LINGERS"]))
        await stop_consuming(self)

    RabbitMQTransport.stop_consuming = linger  # type: ignore[method-assign]

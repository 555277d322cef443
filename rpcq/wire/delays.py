"""The ladder of delay queues: how RabbitMQ holds a message for a while. Pure.

A delay is a number of steps of 250 ms. Its 24 bits are the first 24 words of the routing key, the highest first; the
words after them name where the message goes then:

    0.0. ... .1.0.1.job.emails          5 steps: 1.25 s, then job.emails

Level 23 is for the highest bit. Each level has a topic exchange, and a queue whose messages expire after `2 ** level`
steps. The exchange routes a message whose bit is 1 to the queue, and one whose bit is 0 to the next lower level. What
expires goes to the next lower level too, and below level 0 is the exchange for what is due.

The queues are the same for every service and every delay, so no setting of a user becomes an argument of a queue.

What a level has no way out for, such as a message that somebody put into a queue by hand, goes to the alternate
exchange. Without one it would stay in its queue, and 32 such messages hold up all others (the prefetch of RabbitMQ's
dead-lettering).
"""

from __future__ import annotations

import math
from typing import Any, Final

from rpcq.options import check_delay
from rpcq.wire.topology import Exchange, Queue

LEVELS: Final = 24

STEP: Final = 0.25
"""Seconds of one step."""

ANY_DELAY: Final = "*." * LEVELS
"""The start of the binding key for what was delayed: one `*` for each bit."""


def steps_of(seconds: float) -> int:
    """The steps of a delay, rounded up.

    Raises:
        ConfigurationError: it is not a number from 0 to `MAX_DELAY`.

    """
    check_delay("a delay", seconds)
    return math.ceil(seconds / STEP)


def coarse(steps: int) -> int:
    """The steps rounded down to their two highest bits: at most two queues hold the message."""
    return steps & -(1 << max(0, steps.bit_length() - 2))


class Ladder:
    """The names of one namespace's ladder, and its arguments.

    Args:
        namespace: the namespace.
        due: the name of the exchange for what is due.
        lost: the name of the exchange for what has no way out.

    """

    def __init__(self, namespace: str, due: str, lost: str) -> None:
        self._namespace = namespace
        self._due = due
        self._lost = lost

    def name(self, level: int) -> str:
        """The name of the exchange and of the queue of a level; below level 0, of the exchange for what is due."""
        return self._due if level < 0 else f"{self._namespace}.delay.{level:02}"

    def bindings(self, level: int) -> tuple[tuple[str, str], ...]:
        """How the exchange of a level, or below level 0 the one for what is due, is bound to the level above."""
        return ((self.name(level + 1), _key(level + 1, "0")),) if level + 1 < LEVELS else ()

    def exchanges(self) -> list[Exchange]:
        """The exchanges, the highest level first: each is bound to the one before."""
        return [
            Exchange(self.name(level), "topic", alternate=self._lost, bindings=self.bindings(level))
            for level in reversed(range(LEVELS))
        ]

    def queues(self) -> list[Queue]:
        """The queues."""
        return [self._queue(level) for level in range(LEVELS)]

    def _queue(self, level: int) -> Queue:
        name = self.name(level)
        arguments: dict[str, Any] = {
            "x-queue-type": "quorum",
            "x-message-ttl": round(STEP * 1000) << level,
            "x-dead-letter-exchange": self.name(level - 1),
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",
        }
        return Queue(name, durable=True, arguments=arguments, bindings=((name, _key(level, "1")),))

    def route(self, steps: int, address: str) -> tuple[bytes, bytes]:
        """The exchange and the routing key for a message that is to go to `address` after so many steps.

        Without a step, it goes to the exchange for what is due, with as many bits as any other: so a worker needs no
        permission to write to the exchange for jobs.
        """
        bits = ".".join(f"{steps:0{LEVELS}b}")
        return self.name(steps.bit_length() - 1).encode(), f"{bits}.{address}".encode()


def _key(level: int, bit: str) -> str:
    """The binding key for messages whose bit of this level is `bit`."""
    return f"{'*.' * (LEVELS - 1 - level)}{bit}.#"

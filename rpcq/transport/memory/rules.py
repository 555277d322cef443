"""RabbitMQ's rules about one declaration or one message. Pure functions.

What a queue may be declared with (https://www.rabbitmq.com/docs/queues), what CC and `expiration` mean
(https://www.rabbitmq.com/docs/sender-selected, https://www.rabbitmq.com/docs/ttl), and how a dead letter tells where it
died (https://www.rabbitmq.com/docs/dlx). Errors carry RabbitMQ's own words for them, and have the classes that
its reply codes 403, 404, 405 and 406 get.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final, Literal

from rpcq.errors import AccessRefused, PreconditionFailed, TopologyMismatch
from rpcq.wire.topology import Queue

Reason = Literal["expired", "rejected", "delivery_limit"]

_EXPIRATION: Final = re.compile(rb"[+-]?[0-9]+\Z")
_ARGUMENTS: Final = frozenset(
    ("x-max-length", "x-overflow", "x-dead-letter-exchange", "x-queue-type", "x-delivery-limit")
)


def copies_of(headers: Mapping[str, Any] | None) -> list[bytes]:
    """The routing keys of the header CC; what is not a string in it counts for nothing.

    Raises:
        PreconditionFailed: RabbitMQ closes the channel over it, with 406.

    """
    copies = headers.get("CC") if headers else None
    if copies is None:
        return []
    if not isinstance(copies, list):
        msg = f"PRECONDITION_FAILED - invalid message: the header CC is a {type(copies).__name__}, and no array"
        raise PreconditionFailed(msg)
    return [key.encode() if isinstance(key, str) else key for key in copies if isinstance(key, str | bytes)]


def words_of(key: bytes) -> list[bytes]:
    """The words of a routing key or binding key of a topic exchange; an empty key has none."""
    return key.split(b".") if key else []


def has_wildcard(words: list[bytes]) -> bool:
    """Whether a binding key of a topic exchange matches more than itself."""
    return b"*" in words or b"#" in words


def topic_matches(pattern: list[bytes], words: list[bytes]) -> bool:
    """Whether a binding key matches a routing key: `*` stands for one word, `#` for any number of words."""
    if not pattern:
        return not words
    if pattern[0] == b"#":
        return any(topic_matches(pattern[1:], words[at:]) for at in range(len(words) + 1))
    return bool(words) and pattern[0] in (b"*", words[0]) and topic_matches(pattern[1:], words[1:])


def milliseconds(expiration: bytes) -> int:
    """What the property `expiration` says.

    Raises:
        PreconditionFailed: RabbitMQ closes the channel over it, with 406.

    """
    if not _EXPIRATION.match(expiration) or int(expiration) < 0:
        msg = f"PRECONDITION_FAILED - invalid expiration {expiration.decode(errors='replace')!r}"
        raise PreconditionFailed(msg)
    return int(expiration)


def check_user(user: bytes | None) -> None:
    """Raise `PreconditionFailed` where a message names another user than its sender, who is guest in this broker."""
    if user is not None and user != b"guest":
        named = user.decode(errors="replace")
        msg = f"PRECONDITION_FAILED - user_id property set to {named!r} but authenticated user was 'guest'"
        raise PreconditionFailed(msg)


def record_death(
    headers: dict[str, Any],
    queue: str,
    reason: Reason,
    exchange: bytes,
    routing_key: bytes,
    expiration: bytes | None,
    time: datetime,
) -> list[Any]:
    """Put a death into the headers of a message; all its deaths, the most recent first.

    There is one table for each queue and reason; dying there again counts it up, and leaves its other fields.
    """
    came_to = exchange.decode(errors="replace")
    earlier = headers.get("x-death")
    if not isinstance(earlier, list):
        earlier = []
        headers |= {
            "x-first-death-exchange": came_to,
            "x-first-death-queue": queue,
            "x-first-death-reason": reason,
        }
    again = [death for death in earlier if _died(death, queue) and death.get("reason") == reason]
    if again:
        death = again[0] | {"count": again[0]["count"] + 1}
    else:
        keys = [key.decode(errors="replace") for key in (routing_key, *copies_of(headers))]
        death = {"count": 1, "reason": reason, "queue": queue, "time": time, "exchange": came_to, "routing-keys": keys}
        if expiration is not None:  # whatever the reason
            death["original-expiration"] = expiration.decode()
    deaths = [death, *(other for other in earlier if other not in again)]
    headers["x-death"] = deaths
    return deaths


def _died(death: Any, queue: str) -> bool:
    return isinstance(death, dict) and death.get("queue") == queue


def is_cycle(queue: str, deaths: list[Any]) -> bool:
    """Whether a message was in a queue before, and only expiry or a limit brought it back there."""
    for death in deaths:
        if not isinstance(death, dict) or death.get("reason") == "rejected":
            return False
        if _died(death, queue):
            return True
    return False


def check_reserved(what: str, name: str) -> None:
    """Raise `AccessRefused` for a name that only RabbitMQ gives."""
    if name.startswith("amq."):
        msg = f"ACCESS_REFUSED - {what} name {name!r} contains reserved prefix 'amq.*'"
        raise AccessRefused(msg)


def check_arguments(queue: Queue) -> None:
    """Raise `PreconditionFailed` for what RabbitMQ refuses, and for what is not there to be honoured."""
    arguments = queue.arguments
    quorum = arguments.get("x-queue-type", "classic") == "quorum"
    wrong = [name for name in arguments if name not in _ARGUMENTS]
    if arguments.get("x-queue-type", "classic") not in {"classic", "quorum"}:
        wrong.append("x-queue-type")
    if not isinstance(arguments.get("x-dead-letter-exchange", ""), str):
        wrong.append("x-dead-letter-exchange")
    wrong += [
        name for name in ("x-max-length", "x-delivery-limit") if name in arguments and not _is_count(arguments[name])
    ]
    if "x-delivery-limit" in arguments and not quorum:
        wrong.append("x-delivery-limit")
    if arguments.get("x-overflow", "reject-publish") != "reject-publish" or (
        "x-max-length" in arguments and "x-overflow" not in arguments
    ):
        wrong.append("x-overflow")
    if quorum and (not queue.durable or queue.exclusive or queue.auto_delete):
        wrong.append("x-queue-type: a quorum queue is durable, and neither exclusive nor auto-delete")
    if wrong:
        msg = f"PRECONDITION_FAILED - the queue {queue.name!r} cannot be declared with {', '.join(sorted(set(wrong)))}"
        raise PreconditionFailed(msg)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def check_equivalent(present: Queue, wanted: Queue) -> None:
    """Raise `TopologyMismatch`, which says what differs, where a queue exists otherwise than wanted."""
    was, given = _properties(present), _properties(wanted)
    differences = [
        f"{name} is {was.get(name)!r}, not {given.get(name)!r}"
        for name in sorted({*was, *given})
        if was.get(name) != given.get(name)
    ]
    if differences:
        msg = f"PRECONDITION_FAILED - the queue {present.name!r} exists with other arguments: {'; '.join(differences)}"
        raise TopologyMismatch(msg)


def _properties(queue: Queue) -> dict[str, Any]:
    return {
        "durable": queue.durable and not queue.exclusive,  # an exclusive queue never is
        "exclusive": queue.exclusive,
        "auto_delete": queue.auto_delete,
        "x-queue-type": "classic",
        **queue.arguments,
    }

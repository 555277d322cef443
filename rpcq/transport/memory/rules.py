"""RabbitMQ's rules about one declaration or one message. Pure functions.

They cover the arguments of queues (https://www.rabbitmq.com/docs/queues), CC and `expiration`
(https://www.rabbitmq.com/docs/sender-selected, https://www.rabbitmq.com/docs/ttl), and the headers of dead letters
(https://www.rabbitmq.com/docs/dlx). Errors have RabbitMQ's own texts, and the classes for its reply codes 403, 404, 405
and 406.
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
    (
        "x-max-length",
        "x-overflow",
        "x-dead-letter-exchange",
        "x-dead-letter-routing-key",
        "x-dead-letter-strategy",
        "x-message-ttl",
        "x-queue-type",
        "x-delivery-limit",
        "x-single-active-consumer",
    )
)


def copies_of(headers: Mapping[str, Any] | None) -> list[bytes]:
    """The routing keys of the header CC; items that are not strings are ignored.

    Raises:
        PreconditionFailed: CC is not an array. RabbitMQ would close the channel, with 406.

    """
    copies = headers.get("CC") if headers else None
    if copies is None:
        return []
    if not isinstance(copies, list):
        msg = f"PRECONDITION_FAILED - invalid message: the header CC must be an array; got a {type(copies).__name__}"
        raise PreconditionFailed(msg)
    return [key.encode() if isinstance(key, str) else key for key in copies if isinstance(key, str | bytes)]


def milliseconds(expiration: bytes) -> int:
    """The value of the property `expiration`.

    Raises:
        PreconditionFailed: it is not a number from 0. RabbitMQ would close the channel, with 406.

    """
    if not _EXPIRATION.match(expiration) or int(expiration) < 0:
        msg = f"PRECONDITION_FAILED - invalid expiration {expiration.decode(errors='replace')!r}"
        raise PreconditionFailed(msg)
    return int(expiration)


def check_user(user: bytes | None) -> None:
    """Raise `PreconditionFailed` if a message names another user than its sender, who is guest in this broker."""
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
    """Add a death to the headers of a message; returns all its deaths, the most recent first.

    There is one table for each queue and reason. Another death for the same adds 1 to its count, and changes no other
    field.
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
        if expiration is not None:  # for each reason, not only for "expired"
            death["original-expiration"] = expiration.decode()
    deaths = [death, *(other for other in earlier if other not in again)]
    headers["x-death"] = deaths
    return deaths


def _died(death: Any, queue: str) -> bool:
    return isinstance(death, dict) and death.get("queue") == queue


def is_cycle(queue: str, deaths: list[Any]) -> bool:
    """Whether a message was in this queue before, and came back only by expiry or limits, without a rejection."""
    for death in deaths:
        if not isinstance(death, dict) or death.get("reason") == "rejected":
            return False
        if _died(death, queue):
            return True
    return False


def check_reserved(what: str, name: str) -> None:
    """Raise `AccessRefused` for a name that is reserved for RabbitMQ."""
    if name.startswith("amq."):
        msg = f"ACCESS_REFUSED - {what} name {name!r} contains reserved prefix 'amq.*'"
        raise AccessRefused(msg)


def check_arguments(queue: Queue) -> None:
    """Raise `PreconditionFailed` for arguments that RabbitMQ refuses, or that this broker does not support."""
    arguments = queue.arguments
    quorum = arguments.get("x-queue-type", "classic") == "quorum"
    wrong = [name for name in arguments if name not in _ARGUMENTS]
    if arguments.get("x-queue-type", "classic") not in {"classic", "quorum"}:
        wrong.append("x-queue-type")
    wrong += [
        name
        for name in ("x-dead-letter-exchange", "x-dead-letter-routing-key")
        if not isinstance(arguments.get(name, ""), str)
    ]
    if "x-dead-letter-routing-key" in arguments and "x-dead-letter-exchange" not in arguments:
        wrong.append("x-dead-letter-routing-key: it needs x-dead-letter-exchange")
    wrong += [
        name
        for name in ("x-max-length", "x-delivery-limit", "x-message-ttl")
        if name in arguments and not _is_count(arguments[name])
    ]
    if not isinstance(arguments.get("x-single-active-consumer", False), bool):
        wrong.append("x-single-active-consumer")
    strategy = arguments.get("x-dead-letter-strategy", "at-most-once")
    if strategy not in {"at-most-once", "at-least-once"} or ("x-dead-letter-strategy" in arguments and not quorum):
        wrong.append("x-dead-letter-strategy")
    if "x-delivery-limit" in arguments and not quorum:
        wrong.append("x-delivery-limit")
    # What is dropped from the head would be dead-lettered: not supported here.
    overflows = {"reject-publish"} if "x-dead-letter-exchange" in arguments else {"reject-publish", "drop-head"}
    if arguments.get("x-overflow", "reject-publish") not in overflows or (
        "x-max-length" in arguments and "x-overflow" not in arguments
    ):
        wrong.append("x-overflow")
    if quorum and (not queue.durable or queue.exclusive or queue.auto_delete):
        wrong.append("x-queue-type: a quorum queue must be durable, and neither exclusive nor auto-delete")
    if wrong:
        msg = f"PRECONDITION_FAILED - the queue {queue.name!r} cannot be declared with {', '.join(sorted(set(wrong)))}"
        raise PreconditionFailed(msg)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def check_equivalent(present: Queue, wanted: Queue) -> None:
    """Raise `TopologyMismatch`, which names the differences, if a queue exists with other arguments than wanted."""
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
        "durable": queue.durable and not queue.exclusive,  # an exclusive queue is never durable
        "exclusive": queue.exclusive,
        "auto_delete": queue.auto_delete,
        "x-queue-type": "classic",
        **queue.arguments,
    }

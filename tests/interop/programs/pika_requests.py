"""Sends requests exactly as told and prints all that comes back, property by property.

    python pika_requests.py URL < SPEC

SPEC is JSON. Each of "requests" has "exchange", "routing_key", "body" (text), and may have "properties" (AMQP's names),
"headers" and "correlation_id_hex" (for IDs that are not text). `reply_to` is this program's own exclusive queue unless
the properties give one; null leaves it out. The text "$reply" in headers stands for the own queue's name. The queues
named in "watch" are declared and consumed, too; "bind" names an exchange that the own queue is bound to under its name.
Waits until "expect" messages have come (1 for each request unless given), at most "wait" seconds (10), then "linger"
seconds more (0) for those that should not come.

Prints a JSON line for each message: "queue" (null: the own one), "properties", "headers", "correlation_id_hex", "body".
"""

# ruff: noqa: T201 - what it prints is its result

from __future__ import annotations

import json
import signal
import sys
import time
from typing import Any

import pika  # type: ignore[import-untyped]

TEXTS = ("content_type", "type", "app_id", "message_id", "expiration", "delivery_mode", "reply_to")


def as_hex(value: str | bytes | None) -> str | None:
    """Pika gives text where the bytes are UTF-8, else bytes."""
    return None if value is None else (value.encode() if isinstance(value, str) else value).hex()


def fill_in(value: Any, own: str) -> Any:
    if isinstance(value, list):
        return [fill_in(each, own) for each in value]
    return own if value == "$reply" else value


def publish(channel: Any, request: dict[str, Any], own: str) -> None:
    properties = {"reply_to": own, **request.get("properties", {})}
    if "correlation_id_hex" in request:
        properties["correlation_id"] = bytes.fromhex(request["correlation_id_hex"])
    if "headers" in request:
        properties["headers"] = {name: fill_in(value, own) for name, value in request["headers"].items()}
    channel.basic_publish(
        exchange=request["exchange"],
        routing_key=request["routing_key"],
        properties=pika.BasicProperties(**properties),
        body=request["body"].encode(),
    )


def main(url: str, spec: dict[str, Any]) -> None:
    connection = pika.BlockingConnection(pika.URLParameters(url))
    channel = connection.channel()
    own = channel.queue_declare(queue="", exclusive=True).method.queue
    came = 0

    def show(_channel: object, method: Any, properties: pika.BasicProperties, body: bytes) -> None:
        nonlocal came
        came += 1
        queue = method.consumer_tag.removeprefix("watch ") if method.consumer_tag != "own" else None
        line = {
            "queue": queue,
            "properties": {name: getattr(properties, name) for name in TEXTS if getattr(properties, name) is not None},
            "headers": properties.headers or {},
            "correlation_id_hex": as_hex(properties.correlation_id),
            "body": body.decode(),
        }
        print(json.dumps(line, default=str), flush=True)

    if "bind" in spec:
        channel.queue_bind(own, spec["bind"], own)
    channel.basic_consume(own, show, auto_ack=True, consumer_tag="own")
    for name in spec.get("watch", ()):
        channel.queue_declare(queue=name, durable=True, arguments={"x-expires": 30_000})
        channel.basic_consume(name, show, auto_ack=True, consumer_tag=f"watch {name}")
    for request in spec["requests"]:
        publish(channel, request, own)
    until = time.monotonic() + spec.get("wait", 10.0)
    while came < spec.get("expect", len(spec["requests"])) and time.monotonic() < until:
        connection.process_data_events(time_limit=0.1)
    until = time.monotonic() + spec.get("linger", 0.0)
    while time.monotonic() < until:
        connection.process_data_events(time_limit=0.1)
    connection.close()


if __name__ == "__main__":
    signal.alarm(20)  # it ends by itself, whatever happens
    main(sys.argv[1], json.load(sys.stdin))

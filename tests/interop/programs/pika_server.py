"""An RPC server as plain as they come: one number in, its Fibonacci number out, one request at a time.

    python pika_server.py URL QUEUE [REPLY [TYPE]]

Knows nothing of methods, types, headers or deadlines; replies with the bare number and the request's correlation ID.
With REPLY it answers every request with that text instead, and with TYPE under that `type`. Prints {"ready": true} when
it serves, then a JSON line for each request: its body, properties and headers. Ends after 20 seconds, or when it is
terminated; its queue goes a little later.
"""

# ruff: noqa: T201 - what it prints is its result

from __future__ import annotations

import json
import signal
import sys

import pika  # type: ignore[import-untyped]

SHOWN = ("type", "content_type", "reply_to", "correlation_id", "expiration", "app_id", "message_id", "delivery_mode")


def fibonacci(n: int) -> int:
    before, last = 0, 1
    for _ in range(n):
        before, last = last, before + last
    return before


def main(url: str, queue: str, fixed: str | None, kind: str | None) -> None:
    connection = pika.BlockingConnection(pika.URLParameters(url))
    channel = connection.channel()
    channel.queue_declare(queue=queue, durable=True, arguments={"x-expires": 30_000})

    def answer(_channel: object, method: pika.spec.Basic.Deliver, asked: pika.BasicProperties, body: bytes) -> None:
        text = str(fibonacci(int(body))) if fixed is None else fixed
        properties = pika.BasicProperties(correlation_id=asked.correlation_id, type=kind)
        channel.basic_publish(exchange="", routing_key=asked.reply_to, properties=properties, body=text.encode())
        channel.basic_ack(delivery_tag=method.delivery_tag)
        seen = {name: getattr(asked, name) for name in SHOWN}
        print(json.dumps({"body": body.decode(), "properties": seen, "headers": asked.headers or {}}), flush=True)

    channel.basic_qos(prefetch_count=1)
    channel.basic_consume(queue, answer)
    print(json.dumps({"ready": True}), flush=True)
    channel.start_consuming()


if __name__ == "__main__":
    signal.alarm(20)  # it ends by itself, whatever happens
    given = dict(enumerate(sys.argv))
    main(sys.argv[1], sys.argv[2], given.get(3), given.get(4))

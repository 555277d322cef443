"""A client that has no reply queue at all: RabbitMQ's direct reply-to.

    python pika_direct.py URL EXCHANGE ROUTING_KEY METHOD BODY [BODY ...]

Sends all requests at once, then waits for the replies. Prints a JSON line for each, in the order of the requests:
{"sent": "[3]", "type": "result", "reply": "9"}.
"""

# ruff: noqa: T201 - what it prints is its result

from __future__ import annotations

import json
import signal
import sys

import pika  # type: ignore[import-untyped]

HERE = "amq.rabbitmq.reply-to"


def main(url: str, exchange: str, routing_key: str, method: str, bodies: list[str]) -> None:
    connection = pika.BlockingConnection(pika.URLParameters(url))
    channel = connection.channel()
    replies: dict[str, tuple[str, str]] = {}

    def keep(_channel: object, _method: object, properties: pika.BasicProperties, body: bytes) -> None:
        replies[properties.correlation_id] = (properties.type, body.decode())

    channel.basic_consume(HERE, keep, auto_ack=True)  # first: the broker wants a consumer there before a request
    for number, body in enumerate(bodies):
        properties = pika.BasicProperties(reply_to=HERE, correlation_id=f"direct-{number}", type=method)
        channel.basic_publish(exchange=exchange, routing_key=routing_key, properties=properties, body=body.encode())
    while len(replies) < len(bodies):
        connection.process_data_events(time_limit=1)
    for number, body in enumerate(bodies):
        kind, reply = replies[f"direct-{number}"]
        print(json.dumps({"sent": body, "type": kind, "reply": reply}), flush=True)
    connection.close()


if __name__ == "__main__":
    signal.alarm(20)  # it ends by itself, whatever happens
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4], sys.argv[5:])

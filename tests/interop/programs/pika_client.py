"""An RPC client as plain as they come: a bare number to a queue, `reply_to` and `correlation_id`, nothing else.

    python pika_client.py URL QUEUE NUMBER [NUMBER ...]

Asks for one number after the other and prints a JSON line for each: {"sent": "30", "reply": "832040"}.
"""

# ruff: noqa: T201 - what it prints is its result

from __future__ import annotations

import json
import signal
import sys
import uuid

import pika  # type: ignore[import-untyped]


def main(url: str, queue: str, numbers: list[str]) -> None:
    connection = pika.BlockingConnection(pika.URLParameters(url))
    channel = connection.channel()
    callback_queue = channel.queue_declare(queue="", exclusive=True).method.queue
    replies: dict[str, bytes] = {}

    def keep(_channel: object, _method: object, properties: pika.BasicProperties, body: bytes) -> None:
        replies[properties.correlation_id] = body

    channel.basic_consume(callback_queue, keep, auto_ack=True)
    for number in numbers:
        ours = str(uuid.uuid4())
        properties = pika.BasicProperties(reply_to=callback_queue, correlation_id=ours)
        channel.basic_publish(exchange="", routing_key=queue, properties=properties, body=number.encode())
        while ours not in replies:
            connection.process_data_events(time_limit=1)
        print(json.dumps({"sent": number, "reply": replies.pop(ours).decode()}), flush=True)
    connection.close()


if __name__ == "__main__":
    signal.alarm(20)  # it ends by itself, whatever happens
    main(sys.argv[1], sys.argv[2], sys.argv[3:])

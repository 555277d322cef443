"""The worker's side of control messages: it answers for itself."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import lru_cache
from typing import Final

from rpcq import logs
from rpcq.control.infos import WorkerInfo, WorkerStats
from rpcq.transport.base import Delivery, Message, Published, Transport
from rpcq.wire import bodies, control, replies
from rpcq.wire.properties import MalformedProperties, Properties, decode

MOST_ANSWERS: Final = 16
"""Answers that a worker may have sent and the broker has not confirmed yet."""

MOST_QUESTIONS: Final = 1000
"""Questions that a worker keeps until it can answer them."""

log = logs.get_logger("rpcq.control")


class Answerer:
    """The worker's side: takes control messages, answers questions, and passes on cancellations.

    Clients may ask without limit. So at most `MOST_ANSWERS` answers are sent and unconfirmed at once, and questions
    beyond `MOST_QUESTIONS` are dropped.

    Args:
        transport: sends the answers.
        info: the worker's description of itself.
        stats: called with the worker's name, host, process ID and seconds since its start; returns its state.
        takes: called with the name of a service; returns how many calls it wants in one message.
        cancel: called with the key of a call whose caller is gone, and the properties of the control message.
        is_reply_queue: whether answers may be sent to a queue.
        reply_exchange: the exchange for answers; None for the default one.
        max_body: the most bytes of an answer.

    """

    def __init__(
        self,
        transport: Transport,
        info: WorkerInfo,
        stats: Callable[[str, str, int, float], WorkerStats],
        *,
        takes: Callable[[str], int],
        cancel: Callable[[tuple[bytes, bytes], Properties], None],
        is_reply_queue: Callable[[bytes], bool],
        reply_exchange: str | None,
        max_body: int,
    ) -> None:
        self._transport = transport
        self._cancel = cancel
        self._is_reply_queue = is_reply_queue
        self._exchange = (reply_exchange or "").encode()
        self._encoder = replies.ReplyEncoder()
        ping = bodies.dumps({"name": info.name, "services": [service.name for service in info.services]})

        @lru_cache(maxsize=1)  # it is costly to write
        def describe_taking(*counts: int) -> bytes:
            services = (replace(it, takes=count) for it, count in zip(info.services, counts, strict=True))
            return _fitting(replace(info, services=tuple(services)), max_body)

        def get_description() -> bytes:
            return describe_taking(*(takes(service.name) for service in info.services))

        def get_stats() -> bytes:
            return bodies.dumps(asdict(stats(info.name, info.host, info.pid, time.monotonic() - self._opened)))

        self._answers: dict[bytes, Callable[[], bytes]] = {
            control.PING: lambda: ping,
            control.DESCRIBE: get_description,
            control.STATS: get_stats,
        }
        self._questions: deque[tuple[bytes, bytes, bytes]] = deque()
        self._unconfirmed = 0
        self._seldom = logs.Seldom(log)
        self._is_answering = False
        self._opened = time.monotonic()

    def open(self) -> None:
        """Start to count the worker's uptime."""
        self._opened = time.monotonic()

    def on_delivery(self, delivery: Delivery) -> None:
        """Take a control message."""
        try:
            found = decode(delivery.properties)
        except MalformedProperties as error:
            self._drop(str(error))
            return
        reply_to, correlation_id = found.reply_to or b"", found.correlation_id or b""
        if not reply_to or not correlation_id:
            self._drop("it has no reply_to or no correlation_id")
        elif found.type == control.CANCEL:
            self._cancel((reply_to, correlation_id), found)
        elif not self._is_reply_queue(reply_to):
            self._drop(f"its reply_to is {reply_to!r}")
        elif not self.answer(found.type or b"", reply_to, correlation_id):
            self._drop(f"its type is {found.type!r}, which this version does not know")

    def _drop(self, cause: str) -> None:
        self._seldom.warning("control message dropped", cause=cause)

    def answer(self, kind: bytes, reply_to: bytes, correlation_id: bytes) -> bool:
        """Answer a question, perhaps later; return False if its kind is not known."""
        if kind not in self._answers:
            return False
        if len(self._questions) >= MOST_QUESTIONS:
            self._seldom.warning("question dropped: there are too many", reply_to=reply_to.decode("utf-8", "replace"))
        else:
            self._questions.append((kind, reply_to, correlation_id))
            self._send_answers()
        return True

    def _send_answers(self) -> None:
        if self._is_answering:  # `publish` called `_on_published` at once; the loop below goes on
            return
        self._is_answering = True
        try:
            while self._questions and self._unconfirmed < MOST_ANSWERS:
                kind, reply_to, correlation_id = self._questions.popleft()
                properties = self._encoder.encode(replies.RESULT, correlation_id, None, 0.0)
                body = self._answers[kind]()
                self._unconfirmed += 1
                self._transport.publish(
                    Message(self._exchange, reply_to, correlation_id, properties, body, self._on_published)
                )
        finally:
            self._is_answering = False

    def _on_published(self, _: Published) -> None:
        self._unconfirmed -= 1
        self._send_answers()


def _fitting(info: WorkerInfo, max_body: int) -> bytes:
    """Write a description; if it is too large, without docs, then without signatures, then without methods and jobs."""
    described = asdict(info)
    body = bodies.dumps(described)
    for left_out in ("doc", "signature"):
        if len(body) <= max_body:
            return body
        log.warning("this worker's description is larger than max_body: part of it is left out", part=left_out)
        for service in described["services"]:
            for each in (*service["methods"], *service["jobs"]):
                each[left_out] = ""
        body = bodies.dumps(described)
    if len(body) > max_body:
        for service in described["services"]:
            service["methods"] = service["jobs"] = []
        body = bodies.dumps(described)
    return body

"""Publishes the rows of an outbox, and says what became of each. Rows of one key go one after another."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from rpcq.transport.base import Outgoing, Published, Transport

CONFIRM_TIMEOUT: Final = 10.0
"""Seconds that the first confirm of a batch may take."""

QUIET: Final = 2.0
"""Seconds without a further confirm after which the rows that have none wait no longer, and hold up no others."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row that is to be published.

    Attributes:
        id: its number.
        order_key: its order key; None for none.
        tries: how often it was published and not confirmed.
        message_id: the ID of its message.
        exchange: where it is published to.
        routing_key: the same.
        properties: of the message, encoded.
        body: of the message.

    """

    id: int
    order_key: str | None
    tries: int
    message_id: str
    exchange: str
    routing_key: str
    properties: bytes
    body: bytes


class _Sending(Outgoing):
    """A row on its way to the broker."""

    __slots__ = ("batch", "row")

    def __init__(self, batch: _Batch, row: Row) -> None:
        super().__init__(
            row.exchange.encode(), row.routing_key.encode(), row.message_id.encode(), row.properties, row.body
        )
        self.batch = batch
        self.row = row

    def on_published(self, published: Published) -> None:
        """See `Outgoing`."""
        self.batch.published(self.row, published)


class _Batch:
    """Rows that are published together. A row that is not taken stops those of its key that come after it."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._following: dict[str, deque[Row]] = {}
        self._under_way: dict[int, Row] = {}
        self._confirmed = asyncio.Event()
        self._ended = asyncio.Event()
        self._is_over = False
        self.outcomes: dict[int, Published] = {}

    def begin(self, rows: Sequence[Row]) -> None:
        """Publish the rows: all without a key, and the first one of each key."""
        firsts = []
        for row in rows:
            if row.order_key is None:
                firsts.append(row)
            elif row.order_key in self._following:
                self._following[row.order_key].append(row)
            else:
                self._following[row.order_key] = deque()
                firsts.append(row)
        self._under_way.update((row.id, row) for row in firsts)
        for row in firsts:
            self._transport.publish(_Sending(self, row))

    def published(self, row: Row, published: Published) -> None:
        """What became of a row."""
        if self._is_over:
            return  # it counts as not confirmed, and is published again
        self.outcomes[row.id] = published
        del self._under_way[row.id]
        if published is Published.CONFIRMED:
            self._confirmed.set()
            rest = None if row.order_key is None else self._following[row.order_key]
            if rest:
                following = rest.popleft()
                self._under_way[following.id] = following
                self._transport.publish(_Sending(self, following))
        if not self._under_way:
            self._ended.set()

    async def end(self) -> None:
        """Wait until all have ended, or until nothing more is confirmed."""
        patience = CONFIRM_TIMEOUT
        while self._under_way:
            self._confirmed.clear()
            waiting = [asyncio.ensure_future(it.wait()) for it in (self._ended, self._confirmed)]
            try:
                done, _ = await asyncio.wait(waiting, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for each in waiting:
                    each.cancel()
            if not done:
                break
            patience = QUIET
            if self._under_way:  # many confirms come together: do not wake up for each
                await asyncio.sleep(0.001)
        self._is_over = True
        for number in self._under_way:
            self.outcomes[number] = Published.UNKNOWN


async def publish(transport: Transport, rows: Sequence[Row]) -> dict[int, Published]:
    """Publish rows, and wait until it is known what became of them.

    Returns:
        What became of each row by its number: `UNKNOWN` if the broker said nothing in time. A row that is missing was
        not published, because one of its key before it was not confirmed.

    """
    batch = _Batch(transport)
    batch.begin(rows)
    await batch.end()
    return batch.outcomes

"""The slots of a service in one worker: how many of its calls run at once, and how many a message may bring.

A worker counts calls, and the broker counts messages: it delivers while fewer than `prefetch` are unacknowledged. So a
worker that gets several calls in each message acknowledges later. It keeps back messages that it has finished with:

    prefetch  =  messages that are kept back  +  messages whose calls are in hand, or are on their way

The more it keeps back, the more calls it asks for in each message, so that it has about twice `prefetch` in hand. What
was kept back first is acknowledged first. It keeps back one more while it is busy, and one less when it has a free slot
and the broker may deliver nothing else. Nothing is sent for that, and no consumer has to be changed. If the worker is
lost, the broker gives what was kept back to another one, which does not run it: the callers have their replies.

Only the calls of this session count. What a lost session brought goes on, and the broker knows nothing of it any more:
it delivers `prefetch` messages through the next one, and their calls begin at once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Final

from rpcq.calls.carrier import Carrier

if TYPE_CHECKING:
    from rpcq.calls.in_hand import CallRun
    from rpcq.transport.base import Acknowledger, Delivery

SHARE: Final = 8
"""A message has at most this part of the `prefetch` of its worker: one worker must not get all calls of a client."""

MOST: Final = 32
"""Calls in a message that a service wants at most. More would save next to nothing."""

MOST_MS: Final = 2.0
"""Milliseconds that the handlers of the calls in one message may take together, by their mean."""

WEIGHT: Final = 1 / 16
"""The weight of a handler in the mean."""

LOOK_EVERY: Final = 1.0
"""Seconds between two looks whether it is still worth it to keep messages back."""

FEW: Final = 2.5
"""Calls in a message, by the mean between two looks, below which it is not."""

KEPT: Final = 60
"""Looks after which what was kept back must have been acknowledged; ten times as many if the worker has no free slot.
RabbitMQ waits for 30 minutes at most."""


class Slots:
    """The slots of one service.

    Args:
        prefetch: calls that run at once, and messages that the broker leaves unacknowledged.
        batching: whether the service takes message batches.

    Attributes:
        prefetch: as given.
        session: the number of the session; each call has that of its own.
        running: calls of this session that have a slot.
        held: calls of this session that the worker has in hand.
        waiting: calls that wait for a slot; those that end meanwhile keep their places.
        freed: slots that were freed since this was last set to 0.
        waiting_timer: until the next look at the calls that wait.
        is_beginning: whether calls that waited are being started.

    """

    def __init__(self, prefetch: int, *, batching: bool) -> None:
        self.prefetch = prefetch
        self.session = 0
        self.running = 0
        self.held = 0
        self.freed = 0
        self.waiting_timer: asyncio.TimerHandle | None = None
        self.is_beginning = False
        self.waiting: deque[CallRun] = deque()
        self._most = min(prefetch // SHARE, MOST) if batching else 0
        self._mean_ms = -1.0  # of handlers; none has ended yet
        self._source: Acknowledger | None = None  # of this session; earlier ones have nothing to acknowledge
        self._messages = 0  # that came through it, and are not finished
        self._kept: deque[Delivery] = deque()
        self._look: asyncio.TimerHandle | None = None
        self._came = self._brought = 0  # messages, and the calls in them, since the last look
        self._asked = 0  # for so many calls in a message, at the last look
        self._is_closed = False

    @property
    def takes(self) -> int:
        """How many calls the service wants in one message now; 0 for one."""
        wanted = min(self._in_time, 2 * self.prefetch // self._deliverable)
        return wanted if wanted > 1 else 0

    @property
    def most_held(self) -> int:
        """Calls that the worker has in hand before it turns further ones away.

        What it asks for is less. But when it begins, clients may send it what they filled for others.
        """
        return 2 * self.prefetch + self._most

    def ended(self, handler_ms: float) -> None:
        """A handler has ended, after this time."""
        mean = self._mean_ms
        self._mean_ms = handler_ms if mean < 0.0 else mean + (handler_ms - mean) * WEIGHT

    def took(self, delivery: Delivery, calls: int) -> None:
        """A message has come, with so many calls. They are not in hand yet."""
        if delivery.source is not self._source:
            self._begin_session(delivery.source)
        self._messages += 1
        self._came += 1
        self._brought += calls
        self._let_more_come(self.held + calls)

    def _begin_session(self, source: Acknowledger) -> None:
        """Count anew. Calls that wait have no slot, and get those of this session."""
        self._source, self._messages = source, 0
        self._kept.clear()
        self.session += 1
        self.running, self.held = 0, len(self.waiting)
        for run in self.waiting:
            run.session = self.session

    def settled(self, message: Delivery | Carrier) -> None:
        """A call needs its message no more: acknowledge it, or keep it back, once this is true of all its calls."""
        if isinstance(message, Carrier):
            if not message.let_go():
                self._let_more_come(self.held)
                return
            delivery = message.delivery
        else:
            delivery = message
        if delivery.source is not self._source or self._is_closed:
            delivery.ack()
            return
        self._messages -= 1
        kept, most = self._kept, len(self._kept)
        if self._is_busy:
            most += 1
        elif not most:
            delivery.ack()
            return
        delivery.body = None  # it may be large, and nobody reads it again
        kept.append(delivery)
        if self._look is None:
            self._look = asyncio.get_running_loop().call_later(LOOK_EVERY, self._look_again)
        if len(kept) > min(most, self._most_kept):
            kept.popleft().ack()

    def close(self) -> None:
        """Want nothing more, and keep nothing more back."""
        self._is_closed = True
        self._most = 0
        for timer in (self._look, self.waiting_timer):
            if timer is not None:
                timer.cancel()

    def release(self) -> None:
        """Acknowledge all that was kept back. Not while a consumer of the service is being cancelled."""
        while self._kept:
            self._kept.popleft().ack()

    @property
    def _in_time(self) -> int:
        """Calls whose handlers may be expected to end within `MOST_MS`, one after another."""
        mean = self._mean_ms
        if mean < 0.0:
            return 0
        return self._most if mean * self._most <= MOST_MS else int(MOST_MS / mean)

    @property
    def _deliverable(self) -> int:
        """Messages that the broker may deliver beside those that are kept back."""
        return self.prefetch - len(self._kept)

    @property
    def _most_kept(self) -> int:
        """Messages that may be kept back: the others, full of calls, are about twice `prefetch` calls.

        If it has more in hand, it needs no other messages at all. How long handlers take does not count: they may be
        slow for a moment only, and `_let_more_come` uses all slots then.
        """
        if self.held >= 2 * self.prefetch:
            return self.prefetch - 1
        return self.prefetch - 2 * self.prefetch // max(2, self._most)

    @property
    def _is_busy(self) -> bool:
        """Whether one message less would keep all slots busy, by the calls of those that are in hand."""
        held, prefetch = self.held, self.prefetch
        return 2 * held >= prefetch and held * (self._deliverable - 1) >= prefetch * self._messages

    def _let_more_come(self, held: int) -> None:
        """Acknowledge a message if the broker may deliver nothing else, and slots are free with so many in hand."""
        if self._kept and self._messages >= self._deliverable and held < self.prefetch:
            self._kept.popleft().ack()

    def _look_again(self) -> None:
        """Look whether full messages still come, and not too slowly."""
        kept, came, brought = len(self._kept), self._came, self._brought
        self._came = self._brought = 0
        if self.held >= self.prefetch:
            less = -(-kept // (10 * KEPT)) if came * 10 * KEPT < kept else 0
        elif brought < FEW * came or came * KEPT < kept:
            less = kept
        else:
            less = -(-kept // 8) if 2 * brought < came * min(self._asked, self.takes) else 0
        for _ in range(less):
            self._kept.popleft().ack()
        self._look, self._asked = None, self.takes
        if self._kept:
            self._look = asyncio.get_running_loop().call_later(LOOK_EVERY, self._look_again)

"""The requests that a worker has in hand, each with its delivery, by the key of its call."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rpcq.calls.admission import MayHaveRun
from rpcq.calls.carrier import Carrier
from rpcq.calls.slots import Slots
from rpcq.execution import Run
from rpcq.invocation import Interruption, Invocation
from rpcq.observer import Endings, ObservedRequest
from rpcq.transport.base import Delivery

if TYPE_CHECKING:
    from rpcq.calls.replying import Replier

Key = tuple[bytes, bytes]
"""reply_to and correlation ID: they name a call among those of all clients. Without reply_to, no reply is wanted."""


class CallRun(Run):
    """A request in hand; once its handler has ended, the reply to it.

    Attributes:
        replier: what replies to it.
        slots: of its service.
        session: the session that it counts in; see `Slots`.
        waits_since: when it began to wait for a slot, on `time.monotonic()`.
        delivery: what is acknowledged at the end.
        key: the key of the call.
        may_have_run: why the call may have run before; None if it certainly has not.
        queue_ms: milliseconds since the caller sent it; None if the request does not say.
        reads_batches: whether the reply may go with others, in a message batch.
        has_slot: whether it has one of the slots.
        is_waiting: whether it waits for a slot, also if it ended meanwhile: see `Replier.acknowledge`.
        is_over: whether it is acknowledged as soon as it does not wait any more.
        said: the content of an error reply; None for a result.
        observed: what observers see of it; None without observers, and after their callbacks at its end.
        endings: the callbacks of observers for its end; None before they were called with its beginning.

    """

    __slots__ = (
        "delivery",
        "endings",
        "has_slot",
        "is_over",
        "is_waiting",
        "key",
        "may_have_run",
        "observed",
        "queue_ms",
        "reads_batches",
        "replier",
        "said",
        "session",
        "slots",
        "waits_since",
    )

    def __init__(
        self,
        replier: Replier,
        slots: Slots,
        delivery: Delivery | Carrier,
        key: Key,
        may_have_run: MayHaveRun | None = None,
    ) -> None:
        super().__init__()
        self.replier = replier
        self.slots = slots
        self.session = slots.session
        self.waits_since = 0.0
        self.delivery = delivery
        self.key = key
        self.may_have_run = may_have_run
        self.queue_ms: float | None = None
        self.reads_batches = False
        self.has_slot = self.is_waiting = self.is_over = False
        self.said: dict[str, Any] | None = None
        self.observed: ObservedRequest | None = None
        self.endings: Endings[ObservedRequest] | None = None

    @property
    def may_go_elsewhere(self) -> bool:
        """Whether it is as if it had never come, once it is refused before it begins: its client sends it again.

        Clients that do not read message batches may not do that. Of what may have run, a refusal would say `maybe`
        where a stored result may be found. And what has ended keeps its place.
        """
        return self.reads_batches and self.may_have_run is None and self.invocation is not None

    @property
    def id(self) -> str:
        """The correlation ID, for logs."""
        return self.key[1].decode("utf-8", "replace")

    def returned(self, invocation: Invocation, value: Any) -> None:
        """See `Run`."""
        self.replier.returned(self, invocation, value)  # type: ignore[arg-type]  # it runs calls only

    def raised(self, invocation: Invocation, error: BaseException) -> None:
        """See `Run`."""
        self.replier.raised(self, invocation, error)  # type: ignore[arg-type]  # it runs calls only

    def interrupted(self, invocation: Invocation, why: Interruption) -> None:
        """See `Run`."""
        self.replier.interrupted(self, invocation, why)


class CallsInHand:
    """The requests in hand, by the key of their call."""

    def __init__(self) -> None:
        self._by_key: dict[Key, CallRun] = {}
        self._others: set[CallRun] = set()  # no reply is wanted, or the caller used a correlation ID twice
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._by_key) + len(self._others)

    def __iter__(self) -> Iterator[CallRun]:
        return iter((*self._by_key.values(), *self._others))  # a copy: they change meanwhile

    def __contains__(self, key: Key) -> bool:
        """Whether a call that wants a reply is in hand under this key."""
        return bool(key[0]) and key in self._by_key

    def get(self, key: Key) -> CallRun | None:
        """The call that wants a reply and is in hand under this key."""
        return self._by_key.get(key)

    def add(self, run: CallRun) -> None:
        """Take a request in hand."""
        if not run.key[0] or self._by_key.setdefault(run.key, run) is not run:
            self._others.add(run)
        self._idle.clear()

    def remove(self, run: CallRun) -> None:
        """It is acknowledged."""
        if self._by_key.get(run.key) is run:
            del self._by_key[run.key]
        else:
            self._others.discard(run)
        if not self._by_key and not self._others:
            self._idle.set()

    def adopt(self, key: Key, delivery: Delivery | Carrier) -> bool:
        """Let a call that is still in hand take over its redelivery. Returns False if there is no such call.

        The session of its first delivery is gone. If the redelivery came over that very session, it is another call
        with the same reply_to and correlation ID.
        """
        if not key[0]:
            return False
        for run in (self._by_key.get(key), *self._others):
            if run is not None and run.key == key and run.delivery.source is not delivery.source:
                run.delivery = delivery
                return True
        return False

    async def none_left(self) -> None:
        """Wait until nothing is in hand."""
        await self._idle.wait()

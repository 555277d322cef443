"""The requests that a worker has in hand: runs or refuses each, publishes the reply, and acknowledges.

A request is in hand from `begin` or `refuse` until it is acknowledged, once the broker has confirmed the reply:

    begin -> a slot -> execution.Executor -> CallRun.returned | raised | interrupted -+
    refuse ---------------------------------------------------------------------------+-> reply -> confirm -> ack

A call has its slot until its handler has ended. How a reply is published, alone or with others, is decided in
`rpcq.calls.posting`; whether a request may run is decided before, in `rpcq.calls.admission`.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

from rpcq import logs, observer
from rpcq.calls.admission import CallInvocation, MayHaveRun, never_no
from rpcq.calls.authorization import authorize
from rpcq.calls.in_hand import CallRun, CallsInHand, Key
from rpcq.calls.posting import Post
from rpcq.calls.replaying import Replays
from rpcq.calls.slots import Slots
from rpcq.errors import (
    CallError,
    CallTimeout,
    DomainError,
    InvalidReply,
    OutcomeUnknown,
    RemoteError,
    ServiceUnavailable,
    in_short,
    to_wire,
)
from rpcq.execution import Enter, Executor, Run
from rpcq.invocation import Interruption, Invocation, Refused, Unfit
from rpcq.observer import CANCELLED, OK, Endings, ObservedRequest
from rpcq.results import StoredResult
from rpcq.runtime.backlog import Backlog
from rpcq.transport.base import Published, Transport
from rpcq.transport.sessions import Sessions
from rpcq.validation.attributes import write_details
from rpcq.wire import bodies, replies

log = logs.get_logger("rpcq.worker")

WAIT: Final = 0.1
"""Seconds that a call waits for a slot before it may be turned away."""

CUT_OFF_TIMEOUT: Final = 2.0
"""Seconds that the broker has to confirm the replies to callers whose handlers were cut off."""


class Replier:
    """Runs requests or refuses them, replies, and acknowledges once the broker has the reply.

    Args:
        transport: where replies go.
        sessions: the worker's sessions.
        executor: what runs handlers.
        replays: runs calls with an idempotency key once.
        reply_exchange: the exchange that replies go through; None for the default one.
        max_body: bytes of a reply.
        observers: of requests, as `Observers.requests` has them.
        on_message: called with the number of replies in each message; None for no callback.

    Attributes:
        in_hand: the requests that are not acknowledged yet.
        finished: requests that were in hand and are acknowledged.
        refused_redeliveries: requests that were refused because they may have run before.
        unroutable_replies: replies whose caller was gone.

    """

    def __init__(
        self,
        transport: Transport,
        sessions: Sessions,
        executor: Executor,
        replays: Replays,
        *,
        reply_exchange: str | None,
        max_body: int,
        observers: Sequence[Callable[[ObservedRequest], Callable[[ObservedRequest], None] | None]],
        on_message: Callable[[int], None] | None,
    ) -> None:
        self._transport = transport
        self._sessions = sessions
        # Services whose calls have free slots, and wait until a reply could be published.
        self._held_up: Backlog[Slots] = Backlog(lambda: sessions.can_exchange, sessions.ready, self.begin_waiting)
        self._executor = executor
        self._replays = replays
        self._post = Post(transport, self, (reply_exchange or "").encode(), max_body, on_message)
        self._max_body = max_body
        self._observers = observers
        self._abandoned = False
        self._seldom = logs.Seldom(log)
        self.in_hand = CallsInHand()
        self.finished = 0
        self.refused_redeliveries = 0
        self.unroutable_replies = 0

    def open(self) -> None:
        """From now on, in this event loop."""
        self._executor.open()
        self._post.open()

    @property
    def reply_messages(self) -> int:
        """Messages that its replies took."""
        return self._post.messages

    @property
    def replayed(self) -> int:
        """Requests that were answered with a stored result."""
        return self._replays.replayed

    def begin(self, run: CallRun, invocation: CallInvocation, now: float) -> None:
        """Start the handler as soon as a slot is free; `now` on `time.monotonic()`."""
        run.queue_ms = invocation.queue_ms
        slots = run.slots
        slots.held += 1
        self.in_hand.add(run)
        if slots.running < slots.prefetch and not slots.waiting:
            self._start(run, invocation, now)
        else:
            run.is_waiting = True
            run.waits_since = now
            slots.waiting.append(run)
            self._executor.hold(run, invocation, now)
            if slots.waiting_timer is None:
                self._look_later(slots)

    def begin_waiting(self, slots: Slots) -> None:
        """Start the handlers of calls that wait, while slots are free."""
        if slots.is_beginning:
            return  # a handler ended at once, and the loop below goes on
        slots.is_beginning = True
        try:
            while slots.waiting and slots.running < slots.prefetch and self._can_begin:
                run = self._next(slots)
                if run.invocation is not None:  # else it has ended
                    self._start(run, run.invocation, time.monotonic())  # type: ignore[arg-type]  # it runs calls only
        finally:
            slots.is_beginning = False
        if slots.waiting and slots.running < slots.prefetch and not self._abandoned:
            self._held_up.add(slots)

    @property
    def _can_begin(self) -> bool:
        """Whether a reply could be published now: no call begins that cannot be replied to."""
        return not self._abandoned and self._sessions.can_exchange

    def turn_away_waiting(self, slots: Slots) -> None:
        """Reply to the calls that wait that they did not begin: the worker shuts down."""
        while slots.waiting:
            self._turn_away(self._next(slots), "shuts down")

    def _turn_away(self, run: CallRun, why: str) -> None:
        if (invocation := run.invocation) is not None:  # else it has ended
            self._executor.drop(run)
            self._refuse(run, ServiceUnavailable(f"the worker of {invocation.method.label} {why}, and did not begin"))

    def _look_later(self, slots: Slots) -> None:
        slots.freed = 0
        loop = asyncio.get_running_loop()
        slots.waiting_timer = loop.call_later(WAIT, self._look_at_waiting, slots, loop.time() + WAIT)

    def _look_at_waiting(self, slots: Slots, due: float) -> None:
        """Turn calls away that would wait much longer: their clients send them again, and another worker may be idle.

        They wait only because the messages that brought those before them had several calls: the broker thinks that
        there is room.
        """
        slots.waiting_timer = None
        late = asyncio.get_running_loop().time() - due
        if late < WAIT / 2 and self._can_begin:  # else the loop stood still, or nothing may begin
            soon, now = 2 * slots.freed, time.monotonic()
            waiting = [*slots.waiting]
            slots.waiting.clear()
            for number, run in enumerate(waiting):
                if number >= soon and run.may_go_elsewhere and now - run.waits_since >= WAIT:
                    run.is_waiting = False
                    self._turn_away(run, "has no free slot")
                else:
                    slots.waiting.append(run)
        if slots.waiting and not self._abandoned:
            self._look_later(slots)

    def _next(self, slots: Slots) -> CallRun:
        """Take the first of the calls that wait. One that ended meanwhile gives its place free now."""
        run = slots.waiting.popleft()
        run.is_waiting = False
        if run.is_over:
            self.acknowledge(run)
        return run

    def _start(self, run: CallRun, invocation: CallInvocation, now: float) -> None:
        run.slots.running += 1
        run.has_slot = True
        if run.waits_since and run.queue_ms is not None:
            run.queue_ms += (now - run.waits_since) * 1000
        limit = invocation.method.timeout
        if limit is not None and now + limit < invocation.deadline:
            invocation.deadline = now + limit
            if run.invocation is not None:
                self._executor.shorten(run, invocation, now)
        around = None
        if invocation.authorize is not None or invocation.deduplication is not None or run.observed is not None:
            around = partial(self._around, run, invocation)
        self._executor.begin(run, invocation, now, around)

    def refuse(self, run: CallRun, error: CallError) -> None:
        """Reply with an error, and run nothing."""
        run.slots.held += 1
        self.in_hand.add(run)
        self._refuse(run, error)

    def cancel(self, key: Key) -> bool:
        """The caller is gone: cancel the handler. Returns False if the call is not in hand."""
        run = self.in_hand.get(key)
        if run is None:
            return False
        self._executor.cancel(run)
        return True

    def hurry(self) -> None:
        """Let no call wait for others that would go with it in a batch: no more come."""
        self._executor.hurry()

    def name_of(self, task: asyncio.Task[Any]) -> dict[str, Any]:
        """What a task runs, as fields for a log; may be called from another thread."""
        for run in self.in_hand:
            if run.task is task:
                invocation = run.invocation  # gone once the handler has ended
                return {"method": invocation.method.label if invocation else None, "correlation_id": run.id}
        return {"task": task.get_name()}  # a task that a handler or rpcq created

    async def abandon(self, others: Sequence[Run] = ()) -> None:
        """Cancel the runs that are left, and reply to their callers while the broker can be reached.

        A request whose reply is not confirmed stays unacknowledged: the broker delivers it again. The executor's other
        runs are cancelled at the same time.
        """
        self._abandoned = True
        self._post.abandon()
        runs = list(self.in_hand)
        for run in runs:
            if run.is_over:
                self.acknowledge(run)
        runs = list(self.in_hand)
        if runs:
            log.error("calls cut off", count=len(runs), correlation_ids=[run.id for run in runs[:20]])
        await self._executor.abandon([*runs, *others])
        if self._transport.can_publish:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CUT_OFF_TIMEOUT):
                    await self.in_hand.none_left()
        for run in runs:
            if run.result is not None:
                run.result.cancel()  # its thread may end after the loop
        await self._held_up.close()
        await self._post.close()
        await self._replays.close()

    # Running.

    async def _around(self, run: CallRun, invocation: CallInvocation, enter: Enter) -> Any:
        if run.observed is not None:
            run.observed.ran = True
            run.endings = self._observe_begin(run, run.observed)
        if invocation.authorize is not None:
            await authorize(invocation, invocation.authorize, self._seldom)
            self._executor.check_wanted(run)
        if invocation.deduplication is not None:
            return await self._replays.run(run, invocation, invocation.deduplication, enter)
        return await enter()

    def returned(self, run: CallRun, invocation: CallInvocation, value: Any) -> None:
        """The handler returned this, or a stored result is replayed."""
        try:
            body = value.body if type(value) is StoredResult else invocation.method.write_result(value, self._max_body)
        except InvalidReply as error:
            log.exception("result cannot be sent", method=invocation.method.label, correlation_id=run.id)
            self._reply_error(run, error)
        except Exception as error:  # noqa: BLE001 - raised by a serialiser of the user's type
            self._fail(run, invocation, error)
        else:
            if run.observed is not None:
                self._observe_end(run, run.observed, OK)
            self._reply(run, replies.RESULT, body)

    def raised(self, run: CallRun, invocation: CallInvocation, error: BaseException) -> None:
        """The handler raised, or was not entered."""
        if isinstance(error, Refused):
            self._refuse(run, error.error)
        elif isinstance(error, Unfit):
            log.error("results cannot be sent", method=invocation.method.label, correlation_id=run.id, cause=str(error))
            self._reply_error(run, error.error)
        elif isinstance(error, invocation.method.errors):
            self._reply_error(run, error, raised=True)
        elif isinstance(error, CallTimeout) and error.deadline == invocation.deadline:
            message = f"{invocation.method.label} ran into the deadline in a call of its own: {error.message}"
            self._reply_error(run, CallTimeout(message, executed="yes"))
        else:
            self._fail(run, invocation, error)

    def interrupted(self, run: CallRun, invocation: Invocation, why: Interruption) -> None:
        """The handler was interrupted, or never entered."""
        label, seconds = invocation.method.label, f"{run.handler_ms / 1000:.3f} s"
        match why:
            case Interruption.CANCELLED:
                if run.observed is not None:
                    self._observe_end(run, run.observed, CANCELLED)
                if run.has_slot:
                    self._free(run)
                self.acknowledge(run)
            case Interruption.TIMED_OUT:
                self._reply_error(run, CallTimeout(f"{label} ran into the deadline after {seconds}", executed="yes"))
            case Interruption.TIMED_OUT_UNBEGUN:
                message = f"{label} did not begin until the deadline: its worker, authorize or a store was busy"
                self._reply_error(run, CallTimeout(message, executed="no"))
            case Interruption.CUT_OFF:
                self._reply_error(run, OutcomeUnknown(f"it was stopped, and cut {label} off after {seconds}"))
            case Interruption.CUT_OFF_UNBEGUN:
                self._reply_error(run, ServiceUnavailable(f"the worker of {label} stopped, and did not begin"))

    def _fail(self, run: CallRun, invocation: Invocation, error: BaseException) -> None:
        """Reply to an exception that the service does not declare; its text stays in the log."""
        incident = secrets.token_hex(6)
        name = type(error).__name__
        hint = (
            {"hint": f"declare it in errors=[{name}], and its callers get it"} if isinstance(error, DomainError) else {}
        )
        log.error(
            "handler failed",
            **invocation.names(),
            **hint,
            incident=incident,
            duration_ms=round(run.handler_ms, 3),
            exc_info=error,
        )
        self._reply_error(run, RemoteError(f"{invocation.method.label} failed", incident=incident))

    # Replying.

    def _refuse(self, run: CallRun, error: CallError) -> None:
        if run.may_have_run is not None or isinstance(error, MayHaveRun):
            self.refused_redeliveries += 1
        self._reply_error(run, error)

    def _reply_error(self, run: CallRun, error: CallError, *, raised: bool = False) -> None:
        """Reply with an error. If the handler `raised` it, it says `yes`, whatever the error object says."""
        error = never_no(error, run.may_have_run) if not raised else error
        said = to_wire(error)
        if raised:
            said |= {"executed": "yes", "retryable": False}
        try:
            said["details"] = write_details(error)
            body = bodies.dumps(said)
        except Exception:  # noqa: BLE001 - raised by a serialiser of the user's type
            body = b""
        if not body or len(body) > self._max_body:
            log.error("an error's details cannot be sent", correlation_id=run.id, code=error.code)
            said = in_short(said)
            body = bodies.dumps(said)
        run.said = said
        if run.observed is not None:
            self._observe_end(run, run.observed, error.code, error)
        self._reply(run, replies.ERROR, body)

    def _reply(self, run: CallRun, kind: bytes, body: bytes) -> None:
        run.task = None
        if run.has_slot:
            self._free(run)
        if not run.key[0]:
            self.acknowledge(run)
            return
        self._post.post(run, kind, body)

    def not_taken(self, run: CallRun, published: Published, size: int) -> None:
        """The broker does not have a reply, whose body is `size` bytes, and never will."""
        if published is Published.TOO_LARGE:
            self._reply_in_short(run, size)
        else:
            self.unroutable_replies += 1
            log.debug("a reply did not reach its caller", correlation_id=run.id, reply=published.value)
            self.acknowledge(run)

    def _reply_in_short(self, run: CallRun, size: int) -> None:
        """The broker does not take a message of this size: reply with a short error."""
        log.error("a reply is larger than the broker takes (its max_message_size)", correlation_id=run.id, bytes=size)
        if run.said is not None:
            run.said = in_short(run.said)
        else:
            run.said = to_wire(InvalidReply(f"the result is {size} bytes of JSON, more than the broker takes"))
        body = bodies.dumps(run.said)
        if len(body) < size:
            self._reply(run, replies.ERROR, body)
        else:
            self.acknowledge(run)  # no reply can reach the caller

    def acknowledge(self, run: CallRun) -> None:
        """Acknowledge, but not before the thread has ended: until then, its slot of the prefetch is in use.

        Nor while the call would still wait for a slot. If what expires there made room for the next message, a worker
        without a free slot would go on taking calls, and let them expire, while other workers are idle.
        """
        if run.is_waiting and not self._abandoned:
            run.is_over = True
            return
        if run.outlasts and not self._abandoned:
            assert run.result is not None  # noqa: S101 - made with the thread
            run.result.add_done_callback(lambda _: self.acknowledge(run))
            return
        self.in_hand.remove(run)
        self.finished += 1
        slots = run.slots
        if run.session == slots.session:
            slots.held -= 1
        slots.settled(run.delivery)

    def _free(self, run: CallRun) -> None:
        """Free the slot of a call, but not before its thread has ended."""
        if not run.has_slot:
            return
        if run.outlasts and not self._abandoned:
            assert run.result is not None  # noqa: S101 - made with the thread
            run.result.add_done_callback(lambda _: self._free(run))
            return
        run.has_slot = False
        slots = run.slots
        if run.session == slots.session:
            slots.running -= 1
            slots.freed += 1
        if run.began:
            slots.ended(run.handler_ms)
        if slots.waiting:
            self.begin_waiting(slots)

    # Observing.

    def _observe_begin(self, run: CallRun, observed: ObservedRequest) -> Endings[ObservedRequest]:
        observed.queue_seconds = None if run.queue_ms is None else run.queue_ms / 1000
        return observer.begin(self._observers, observed)

    def _observe_end(self, run: CallRun, observed: ObservedRequest, code: str, error: CallError | None = None) -> None:
        # It may never have begun.
        endings = self._observe_begin(run, observed) if run.endings is None else run.endings
        observed.code, observed.error, observed.seconds = code, error, run.handler_ms / 1000
        run.observed = run.endings = None
        observer.end(endings, observed)

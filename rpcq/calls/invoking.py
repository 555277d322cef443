"""Makes calls: each from its parameters to its result."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from rpcq import observer
from rpcq.calls.outcomes import MAX_ATTEMPTS, CallEvent, too_late
from rpcq.calls.pending import PendingCalls
from rpcq.calls.receiving import ResultReader
from rpcq.calls.retrying import Retries
from rpcq.calls.sending import ClientCall, Sender
from rpcq.calls.targets import Target
from rpcq.control import Control
from rpcq.errors import CallError, CallTimeout, UsageError
from rpcq.observer import ObservedCall, Observers
from rpcq.options import CallOptions, Retry
from rpcq.runtime.deadline import inherit
from rpcq.runtime.timeouts import Timeouts
from rpcq.transport.base import Transport
from rpcq.wire import bodies
from rpcq.wire.replies import Reply


class Invoker:
    """Makes the calls of a client.

    Args:
        transport: the client's.
        sender: sends the requests.
        calls: the table of calls under way.
        control: sends cancellations.
        observers: the client's.
        check: raises if no call can be made.
        max_body: the most bytes of parameters.

    Attributes:
        retries: of the calls that failed.
        results: reads what replies contain.

    """

    def __init__(
        self,
        transport: Transport,
        sender: Sender,
        calls: PendingCalls,
        control: Control,
        observers: Observers,
        check: Callable[[], None],
        max_body: int,
    ) -> None:
        self._transport = transport
        self._sender = sender
        self._calls = calls
        self._control = control
        self._observers = observers.calls
        self._check = check
        self._max_body = max_body
        self._timeouts: Timeouts[ClientCall]
        self.retries = Retries()
        self.results = ResultReader()

    def __len__(self) -> int:
        return len(self._calls) + len(self.retries)

    def open(self) -> None:
        """From now on, in this event loop."""
        self._timeouts = Timeouts(self._sender.loop, self._sender.expire)

    def close(self) -> None:
        """End all calls, and the pauses between them."""
        for call in self._calls:
            self._calls.happened(call, CallEvent.CLOSE)
        self.retries.close()
        self._timeouts.close()

    def consuming_lost(self, why: str) -> None:
        """No reply to any call under way will come."""
        self._sender.consuming_lost()
        for call in self._calls:
            self._calls.happened(call, CallEvent.LOST, why=why)

    def invoke(
        self, target: Target, options: CallOptions, args: tuple[Any, ...], params: Mapping[str, Any]
    ) -> Coroutine[Any, Any, Any]:
        """Make one call, from its parameters to its result. `CallMaker` and the proxies use it."""
        if options.is_for_jobs:
            names = "delay, at, expires, priority, order_key and watch"
            raise UsageError(f"{names} are for send; got one for a call of {target.label}")
        if self._observers:
            return self._observed(target, options, args, params)
        if options.retry is None:
            return self._call(target, options, args, params)
        return self._retry(target, options, options.retry, args, params)

    async def _observed(
        self, target: Target, options: CallOptions, args: tuple[Any, ...], params: Mapping[str, Any]
    ) -> Any:
        """Make one call and call the observers with it."""
        observed = ObservedCall(target.exchange, target.routing_key.decode(), target.method.decode(), target.label)
        observed.correlation_id = self._calls.next_id().decode()
        began = time.perf_counter()
        endings = observer.begin(self._observers, observed)
        try:
            if options.retry is None:
                value = await self._call(target, options, args, params, observed=observed)
            else:
                value = await self._retry(target, options, options.retry, args, params, observed)
        except BaseException as error:
            observed.error, observed.code = error, observer.code_of(error)
            raise
        else:
            observed.code = observer.OK
            return value
        finally:
            observed.seconds = time.perf_counter() - began
            observer.end(endings, observed)
            del observed, endings  # an error's traceback holds this frame

    async def _retry(
        self,
        target: Target,
        options: CallOptions,
        retry: Retry,
        args: tuple[Any, ...],
        params: Mapping[str, Any],
        observed: ObservedCall | None = None,
    ) -> Any:
        """Make one call, and again if it fails as `retry` says, within one deadline."""
        self._check()
        deadline = inherit(options.timeout, time.monotonic())
        key = options.idempotency_key
        if key is None and options.idempotent:
            key = self._calls.next_id().decode()  # the same each time
        attempt, retries = 1, 0
        while True:
            try:
                return await self._call(target, options, args, params, deadline, key, attempt, observed)
            except CallError as error:
                if not await self.retries.pause(error, retry, retries, deadline, idempotent=options.idempotent):
                    raise
                attempt = error.attempt + (error.executed != "no")
                retries += 1
            if observed is not None:
                observed.correlation_id, observed.attempt = self._calls.next_id().decode(), attempt

    async def _call(
        self,
        target: Target,
        options: CallOptions,
        args: tuple[Any, ...],
        params: Mapping[str, Any],
        deadline: float | None = None,
        key: str | None = None,
        attempt: int = 1,
        observed: ObservedCall | None = None,
    ) -> Any:
        """Make one call; `deadline`, `key` and `attempt` are for a call that is or may be made again."""
        self._check()
        body = bodies.encode_params(args, params, self._max_body)
        now = time.monotonic()
        if deadline is None:
            deadline, key = inherit(options.timeout, now), options.idempotency_key
        correlation_id = self._calls.next_id() if observed is None else observed.correlation_id.encode()
        if key is None and options.idempotent:
            key = correlation_id.decode()  # the first request's ID: no other call has it
        call = ClientCall(self._sender, correlation_id, target, options, body, deadline, key, attempt)
        if deadline <= now:
            raise too_late(call, deadline)
        if observed is not None:
            call.trace = observed.headers
        del body, params, args  # the call may last
        if options.metadata:
            call.headers(MAX_ATTEMPTS)  # checks the size now, with the longest attempt number
        self._calls.add(call)
        self._timeouts.set(call, deadline, now)
        try:
            self._sender.send(call)
            outcome = await call.future
        except BaseException:
            self._give_up(call)
            raise
        finally:
            self._timeouts.cancel(call)
            if self._sender.waiting.items:
                self._sender.waiting.discard(call)
        try:
            if type(outcome) is Reply:
                return self.results.read(call, outcome, target.label, options)
            raise outcome  # type: ignore[misc]  # else the outcome is an error
        except CallTimeout as error:
            error.deadline = deadline
            raise
        finally:
            del outcome, call  # the error's traceback holds this frame

    def _give_up(self, call: ClientCall) -> None:
        """The caller is gone: forget the call, and send a cancellation if it may have begun."""
        may_run = call.sent and self._calls.is_pending(call)
        self._calls.happened(call, CallEvent.CANCEL)
        encoder = self._sender.encoder
        if may_run and call.target.is_ours and encoder is not None and self._transport.can_publish:
            deadline_ms = int((time.time() + call.deadline - time.monotonic()) * 1000)
            self._control.cancel(call.target.routing_key, call.request_id, encoder.reply_to, deadline_ms)

"""Takes what comes to a client's reply queue: matches it to its call, and reads the value or the error in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import pydantic

from rpcq import logs
from rpcq.calls.outcomes import Call, CallEvent, event_of_notice, event_of_refusal, event_of_reply, for_call
from rpcq.calls.pending import PendingCalls
from rpcq.calls.sending import ClientCall, Sender
from rpcq.contracts import Result, result_adapter
from rpcq.control import Control
from rpcq.errors import InvalidReply, from_wire
from rpcq.observer import Observers
from rpcq.options import CallOptions
from rpcq.transport.base import Delivery
from rpcq.validation.attributes import read_attributes
from rpcq.validation.bounds import NotRead, first_error
from rpcq.wire import replies
from rpcq.wire.batches import read_replies
from rpcq.wire.properties import MalformedProperties
from rpcq.wire.replies import Notice, Reply

_REPLY: Final = CallEvent.REPLY  # a name of its own: getting at an enum's member is slow in CPython 3.11

log = logs.get_logger("rpcq.client")


class Receiver:
    """Takes what comes to the reply queue, and matches it to the calls under way.

    Args:
        calls: the table of calls under way.
        sender: what sends their requests.
        control: what takes the answers of workers to questions.
        observers: called with notices.
        notices: the name of the exchange that notices come through.
        take_of_jobs: takes a message about a job; returns False if it is about none.

    """

    def __init__(
        self,
        calls: PendingCalls,
        sender: Sender,
        control: Control,
        observers: Observers,
        notices: str,
        take_of_jobs: Callable[[Reply], bool],
    ) -> None:
        self._calls = calls
        self._sender = sender
        self._control = control
        self._observers = observers
        self._notices = notices.encode()
        self._take_of_jobs = take_of_jobs
        self._seldom = logs.Seldom(log)

    def on_delivery(self, delivery: Delivery) -> None:
        """Take a message of the reply queue."""
        try:
            encoder = self._sender.encoder
            came = replies.read_reply(delivery.properties, delivery.body, b"" if encoder is None else encoder.reply_to)
        except MalformedProperties as error:
            self._drop("a malformed reply is dropped", cause=str(error))
            return
        if type(came) is Reply and came.kind == replies.RESULT and delivery.exchange != self._notices:
            call = self._calls.get(came.correlation_id)  # by the ID of any of its requests: one of them ran
            if call is not None:
                self._note_takes(call, came.takes)
                self._calls.happened(call, _REPLY, came)
                return
        self._take_other(delivery, came)

    def _take_other(self, delivery: Delivery, came: Reply | Notice | None) -> None:
        """Take what is not the result of a call under way."""
        if came is None:
            self._drop("a copy of a request came to the reply queue, and is dropped: something moves messages")
            return
        if (delivery.exchange == self._notices) is not isinstance(came, Notice):
            # Clients can have the broker send anything through the notices, and workers anything that looks like one.
            self._drop("a forged reply or notice came to the reply queue, and is dropped")
            return
        if isinstance(came, Reply) and came.kind == replies.REPLIES:
            self._take_several(came)
            return
        self._take_news(came, delivery.body)

    def _take_several(self, batch: Reply) -> None:
        """Take the replies in a message batch, each for itself."""
        try:
            found = read_replies(batch)
        except ValueError as error:
            self._drop("a malformed batch of replies is dropped", cause=str(error))
            return
        calls, heard = self._calls, False
        for reply in found:
            call = calls.get(reply.correlation_id)
            if call is None or reply.kind != replies.RESULT:
                self._take_news(reply, reply.body)
                continue
            if not heard:
                heard = True
                self._note_takes(call, batch.takes)
            calls.happened(call, _REPLY, reply)

    def _note_takes(self, call: Call, takes: int) -> None:
        """Note how many calls the service of a call wants in one message, as a worker said with its reply."""
        gathering = self._sender.gathering
        if takes != gathering.told.get(call.target.routing_key, 0):  # type: ignore[attr-defined]  # it is a ClientCall
            gathering.told_by(cast("ClientCall", call), takes)

    def _take_news(self, came: Reply | Notice, body: bytes | None) -> None:
        """Take a reply that is not the result of a call under way, or a notice."""
        request_id = came.correlation_id
        if self._control.answered(request_id, body):
            return
        if isinstance(came, Reply) and self._take_of_jobs(came):
            return
        call = self._calls.get(request_id)
        if call is None and (together := self._calls.together(request_id)):
            self._take_news_of_batch(came, cast("Sequence[ClientCall]", together))
            return
        if isinstance(came, Notice):
            self._observers.notice(came.reason)
        if call is None:
            self._calls.count_unmatched(request_id)
            log.debug("reply for no call under way", correlation_id=request_id.decode("utf-8", "replace"))
        elif call.request_id != request_id:
            pass  # it is about an earlier request of the call
        elif isinstance(came, Reply):
            event, why = event_of_reply(came)
            self._calls.happened(call, event, came, why)
        else:
            is_unrun = came.reason == "expired" and self._sender.is_unrun(cast("ClientCall", call), came)
            event, why = event_of_notice(came, is_unrun=is_unrun)
            self._calls.happened(call, event, why=why)

    def _take_news_of_batch(self, came: Reply | Notice, calls: Sequence[ClientCall]) -> None:
        """Take news of a message batch: it is for each of its calls that has none of its own."""
        if isinstance(came, Reply):
            event, reply, why = event_of_refusal(came)
            if event_of_reply(came)[0] is not CallEvent.TURNED_AWAY:  # that one shuts down: others may read them
                self._sender.gathering.bar(calls[0].target.routing_key)
            for call in calls:
                self._calls.happened(call, event, reply, why)
            return
        for call in calls:
            self._observers.notice(came.reason)
            is_unrun = came.reason == "expired" and self._sender.is_unrun(call, came)
            event, why = event_of_notice(came, is_unrun=is_unrun)
            self._calls.happened(call, event, why=why)

    def _drop(self, what: str, **fields: str) -> None:
        """Count and report something that is neither a reply nor a notice of ours."""
        self._calls.stray += 1
        self._seldom.warning(what, **fields)


class ResultReader:
    """Reads replies into values and errors; remembers the types that it reads.

    Attributes:
        on_reply: called with each reply that ends a call, before it is read; None for no callback.

    """

    def __init__(self) -> None:
        self._results: dict[Any, Result] = {}
        self.on_reply: Callable[[Reply], None] | None = None

    def read(self, call: Call, reply: Reply, label: str, options: CallOptions) -> Any:
        """The value in a reply.

        Raises:
            CallError: it is an error, or cannot be read as what the caller expects.

        """
        if self.on_reply is not None:
            self.on_reply(reply)
        try:
            if reply.kind == replies.RESULT and reply.body is not None and options.returns is not None:
                replies.check_readable(reply)
                return self._typed(options.returns, label)(reply.body)
            value = replies.read_body(reply)
        except InvalidReply as error:
            raise for_call(call, error) from None
        except (pydantic.ValidationError, NotRead) as error:
            try:
                replies.read_body(reply)
            except InvalidReply as unread:  # it is not JSON at all
                raise for_call(call, unread) from error
            why = first_error(error)
            raise for_call(call, InvalidReply(f"{label} gave what does not fit {options.returns!r}: {why}")) from error
        except Exception as error:  # what validators of the caller's own type raise
            raise for_call(call, InvalidReply(f"the result of {label} could not be read: {error!r}")) from error
        if reply.kind == replies.RESULT:
            return value
        failed = from_wire(value, options.errors)
        read_attributes(failed)
        raise for_call(call, failed)

    def _typed(self, returns: Any, label: str) -> Callable[[bytes], Any]:
        try:
            found = self._results.get(returns)
        except TypeError:  # unhashable, such as Annotated[..., []]
            return result_adapter(label, returns).read
        if found is None:
            found = self._results[returns] = result_adapter(label, returns)
        return found.read

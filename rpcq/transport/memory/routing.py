"""The exchanges of the in-process broker: which queues a message goes to. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rpcq.transport.memory.rules import copies_of, has_wildcard, topic_matches, words_of
from rpcq.wire.topology import Exchange

if TYPE_CHECKING:
    from rpcq.transport.memory.vhost import LiveQueue


class LiveExchange:
    """An exchange that was declared, with its bindings: binding key -> queues.

    A topic exchange tries the keys with a wildcard one by one: there are few of them in one process.
    """

    def __init__(self, declared: Exchange) -> None:
        self.declared = declared
        self.bindings: dict[bytes, tuple[LiveQueue, ...]] = {}
        self._patterns: dict[bytes, list[bytes]] = {}

    def bind(self, queue: LiveQueue, key: bytes) -> bool:
        """Bind a queue; returns False if it is bound under this key already."""
        bound = self.bindings.get(key, ())
        if queue in bound:
            return False
        self.bindings[key] = (*bound, queue)
        if self.declared.type == "topic" and has_wildcard(words := words_of(key)):
            self._patterns[key] = words
        return True

    def unbind(self, queue: LiveQueue, key: bytes) -> None:
        """Remove a binding of a queue."""
        if rest := tuple(other for other in self.bindings[key] if other is not queue):
            self.bindings[key] = rest
        else:
            del self.bindings[key]
            self._patterns.pop(key, None)

    def bound_to(self, routing_key: bytes) -> Iterable[LiveQueue]:
        """The queues that a message with this routing key goes to, each once."""
        if not self._patterns:
            return self.bindings.get(routing_key, ())
        exact = () if routing_key in self._patterns else self.bindings.get(routing_key, ())
        words = words_of(routing_key)
        matched = [self.bindings[key] for key, pattern in self._patterns.items() if topic_matches(pattern, words)]
        return dict.fromkeys(queue for queues in (exact, *matched) for queue in queues)

    def route(self, routing_key: bytes, headers: Mapping[str, Any] | None) -> Iterable[LiveQueue]:
        """The queues that a message goes to under any of its keys, each once."""
        copies = copies_of(headers)
        if not copies:
            return self.bound_to(routing_key)
        return dict.fromkeys(queue for key in (routing_key, *copies) for queue in self.bound_to(key))

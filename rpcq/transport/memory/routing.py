"""The exchanges of the in-process broker: which queues a message goes to. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from rpcq.transport.memory.rules import copies_of
from rpcq.wire.patterns import has_wildcard, topic_matches, words_of
from rpcq.wire.topology import Exchange

if TYPE_CHECKING:
    from rpcq.transport.memory.queues import LiveQueue

T = TypeVar("T")


class _Bindings(Generic[T]):
    """The bindings of an exchange: binding key -> what is bound.

    A topic exchange tries the keys with a wildcard one by one: there are few of them in one process.
    """

    def __init__(self, *, is_topic: bool) -> None:
        self.by_key: dict[bytes, tuple[T, ...]] = {}
        self.patterns: dict[bytes, list[bytes]] = {}
        self._is_topic = is_topic

    def add(self, target: T, key: bytes) -> bool:
        """Add a binding; returns False if there is this one already."""
        bound = self.by_key.get(key, ())
        if target in bound:
            return False
        self.by_key[key] = (*bound, target)
        if self._is_topic and has_wildcard(words := words_of(key)):
            self.patterns[key] = words
        return True

    def remove(self, target: T, key: bytes) -> None:
        if rest := tuple(other for other in self.by_key[key] if other is not target):
            self.by_key[key] = rest
        else:
            del self.by_key[key]
            self.patterns.pop(key, None)

    def matching(self, routing_key: bytes) -> Iterable[T]:
        """What is bound for this routing key, each once."""
        if not self.patterns:
            return self.by_key.get(routing_key, ())
        exact = () if routing_key in self.patterns else self.by_key.get(routing_key, ())
        words = words_of(routing_key)
        matched = [self.by_key[key] for key, pattern in self.patterns.items() if topic_matches(pattern, words)]
        return dict.fromkeys(target for targets in (exact, *matched) for target in targets)

    def all(self) -> Iterable[T]:
        return dict.fromkeys(target for targets in self.by_key.values() for target in targets)


class LiveExchange:
    """An exchange that was declared, with what is bound to it: queues, and other exchanges.

    Args:
        declared: its declaration.
        exchanges: all exchanges of the vhost, by name; its alternate exchange is looked up there.

    """

    def __init__(self, declared: Exchange, exchanges: Mapping[bytes, LiveExchange]) -> None:
        self.declared = declared
        self._exchanges = exchanges
        self._is_fanout = declared.type == "fanout"
        self._is_plain = not self._is_fanout and not declared.alternate
        self._queues: _Bindings[LiveQueue] = _Bindings(is_topic=declared.type == "topic")
        self._bound: _Bindings[LiveExchange] = _Bindings(is_topic=declared.type == "topic")

    def bind(self, queue: LiveQueue, key: bytes) -> bool:
        """Bind a queue; returns False if it is bound under this key already."""
        return self._queues.add(queue, key)

    def bind_exchange(self, exchange: LiveExchange, key: bytes) -> None:
        """Bind another exchange: it gets the messages with this key, under their own keys."""
        self._bound.add(exchange, key)
        self._is_plain = False

    def unbind(self, queue: LiveQueue, key: bytes) -> None:
        """Remove a binding of a queue."""
        self._queues.remove(queue, key)

    def bound_to(self, routing_key: bytes) -> Iterable[LiveQueue]:
        """The queues that a message with this routing key goes to, each once."""
        if self._is_plain:
            return self._queues.matching(routing_key)
        found: dict[LiveQueue, None] = {}
        visited, ahead = {self}, [self]
        while ahead:
            here = ahead.pop()
            queues, further = here.matching(routing_key)
            found |= dict.fromkeys(queues)
            ahead += [each for each in further if each not in visited]
            visited.update(further)
        return found

    def route(self, routing_key: bytes, headers: Mapping[str, Any] | None) -> Iterable[LiveQueue]:
        """The queues that a message goes to under any of its keys, each once."""
        copies = copies_of(headers)
        if not copies:
            return self.bound_to(routing_key)
        return dict.fromkeys(queue for key in (routing_key, *copies) for queue in self.bound_to(key))

    def matching(self, routing_key: bytes) -> tuple[list[LiveQueue], list[LiveExchange]]:
        """What a message goes to from here; to the alternate exchange if there is nothing else."""
        if self._is_fanout:
            queues, further = [*self._queues.all()], [*self._bound.all()]
        else:
            queues, further = [*self._queues.matching(routing_key)], [*self._bound.matching(routing_key)]
        if not queues and not further:
            alternate = self._exchanges.get(self.declared.alternate.encode()) if self.declared.alternate else None
            further = [] if alternate is None else [alternate]
        return queues, further

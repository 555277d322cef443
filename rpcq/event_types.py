"""Events as classes: their names and versions, and which of them a subscription takes. Pure.

The class of an event is its contract: publishers and subscribers import the same class, or write classes of the same
name and version.
"""

from __future__ import annotations

import inspect
import itertools
import sys
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, TypeVar
from weakref import WeakValueDictionary

from pydantic import BaseModel, ConfigDict, PydanticUserError

from rpcq.contracts import Result, read_fitting
from rpcq.errors import ConfigurationError, InvalidParams, NotSerializable, TooLarge, UsageError
from rpcq.options import NAME
from rpcq.validation.schemas import make_codec
from rpcq.wire import bodies
from rpcq.wire.patterns import has_wildcard, topic_matches, words_of
from rpcq.wire.values import refuse_beyond_float, refuse_nan

MAX_PATTERN: Final = 255
"""Bytes of a routing key, and so of a pattern."""

MAX_VERSION: Final = 2**31 - 1

E = TypeVar("E", bound="Event")


class Event(BaseModel):
    """The base class of events. An event says what has happened; every subscription to it gets a copy.

        class OrderCreated(Event, name="order.created", version=1):
            order_id: str

    A class without a name is a base of others, and cannot be published. The version says which fields it has: give
    it the next number when a reader of the fields before cannot read it any more.

    Args:
        name: 1 to 100 of the characters `A-Za-z0-9_.-`: words with dots between them.
        version: a whole number of at least 1; 1 if it is not given.

    Attributes:
        event_name: the name; empty for a base of other events.
        event_version: the version.

    Raises:
        ConfigurationError: the name or the version is not valid, another class has both, or a field hides one of them.

    """

    model_config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64", ser_json_inf_nan="constants")

    event_name: ClassVar[str] = ""
    event_version: ClassVar[int] = 1

    def __init_subclass__(cls, *, name: str | None = None, version: int | None = None, **kwargs: Any) -> None:
        """Take the name and the version, which pydantic does not know."""
        super().__init_subclass__(**kwargs)
        if hidden := sorted({"event_name", "event_version"} & inspect.get_annotations(cls).keys()):
            raise ConfigurationError(f"{cls.__qualname__} must not have a field {hidden[0]!r}: rpcq uses this name")

    @classmethod
    def __pydantic_init_subclass__(cls, *, name: str | None = None, version: int | None = None, **kwargs: Any) -> None:
        """Check the name and the version, once the class has its fields."""
        super().__pydantic_init_subclass__(**kwargs)
        cls.event_name, cls.event_version = "", 1  # not those of the class that it is based on
        if name is None:
            if version is not None:
                raise ConfigurationError(f"{cls.__qualname__} must have a name with its version {version!r}")
            return
        cls.event_name = check_event_name(f"the name of {cls.__qualname__}", name)
        cls.event_version = _check_version(cls, 1 if version is None else version)
        _enter(cls)


@dataclass(frozen=True, slots=True)
class AnyEvent:
    """An event of any name, for a subscription whose patterns take events that have no class there.

    Attributes:
        id: its ID, the same in all copies, attempts and replays.
        name: its name, such as "order.created".
        version: the version of its class.
        data: its fields, as JSON values: a dict, if its publisher is rpcq.

    """

    id: str
    name: str
    version: int
    data: Any

    def read(self, kind: type[E]) -> E:
        """The event as an instance of its class, or of a class without a name: a base, which has what several share.

        Raises:
            InvalidParams: it does not fit.
            UsageError: the class is one of another name.

        """
        if kind.event_name not in ("", self.name):
            raise UsageError(f"the class must be one of {self.name!r}; got {kind.__name__}, of {kind.event_name!r}")
        return read_event(kind, bodies.dumps(self.data))


_entered: WeakValueDictionary[tuple[str, int], type[Event]] = WeakValueDictionary()


def _enter(kind: type[Event]) -> None:
    """Note a class under its name and version.

    Raises:
        ConfigurationError: another class that can be imported has both.

    """
    found = _entered.get((kind.event_name, kind.event_version))
    # A module that is loaded again makes its classes again; so does one that runs as __main__ and is imported, too.
    is_same = found is not None and found.__qualname__ == kind.__qualname__
    is_again = is_same and found is not None and ("__main__" in (found.__module__, kind.__module__))
    if found is not None and not (is_again or (is_same and found.__module__ == kind.__module__)) and _is_there(found):
        raise ConfigurationError(twice(found, kind))
    _entered[kind.event_name, kind.event_version] = kind


def _is_there(kind: type[Event]) -> bool:
    """Whether a class can be imported: not one of a test or of a module that was loaded again."""
    found: Any = sys.modules.get(kind.__module__)
    for name in kind.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is kind


def twice(first: type[Event], second: type[Event]) -> str:
    """What is wrong with two classes of one name and version."""
    return (
        f"events must differ in name or version; got {_where(first)} and {_where(second)} for {second.event_name!r}, "
        f"version {second.event_version}: import the first one, or give the second one version="
        f"{second.event_version + 1}"
    )


def _where(kind: type[Event]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def check_event_name(what: str, name: Any) -> str:
    """Check the name of an event, and return it.

    Raises:
        ConfigurationError: it is not valid; the message begins with `what`.

    """
    if not isinstance(name, str) or not NAME.match(name) or "" in name.split("."):
        raise ConfigurationError(
            f"{what} must be 1 to 100 of the characters A-Z a-z 0-9 _ . -, as words with dots between them, such as "
            f"'order.created'; got {name!r}"
        )
    return name


def _check_version(kind: type[Event], version: Any) -> int:
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= MAX_VERSION:
        raise ConfigurationError(f"the version of {kind.__qualname__} must be a whole number from 1; got {version!r}")
    return version


def check_pattern(pattern: str) -> str:
    """Check a pattern of names of events, and return it.

    Raises:
        ConfigurationError: it is none.

    """
    words = pattern.split(".")
    is_valid = all(word in ("*", "#") or NAME.match(word) for word in words) and len(pattern) <= MAX_PATTERN
    if not is_valid or any(pair == ("#", "#") for pair in itertools.pairwise(words)):
        raise ConfigurationError(
            f"a pattern must be words with dots between them, where a word may be * for one word, or # for any number "
            f"of them, such as 'order.*', 'order.#' or '#'; got {pattern!r}"
        )
    return pattern


def named(event: Any) -> type[Event]:
    """The class of an event that can be published.

    Raises:
        UsageError: it is not an event, or one whose class has no name.

    """
    if isinstance(event, type) and issubclass(event, Event):
        raise UsageError(f"publish takes an event; got its class: publish({event.__name__}(...))")
    if not isinstance(event, Event):
        raise UsageError(
            f"publish takes an instance of a class of events, class OrderCreated(rpcq.Event, name='order.created'); "
            f"got {event!r:.100}"
        )
    kind = type(event)
    if not kind.event_name:
        raise UsageError(
            f"an event must be of a class with a name; got {kind.__name__}: write class {kind.__name__}(Event, "
            "name='order.created')"
        )
    return kind


def write_event(event: Event, max_body: int) -> bytes:
    """Write an event as JSON, as its subscribers read it.

    Raises:
        UsageError: its class has no name.
        NotSerializable: JSON cannot carry it.
        InvalidParams: it would not be read again, because it was changed after it was made.
        TooLarge: it is over `max_body` bytes.

    """
    kind = named(event)
    codec = _codec(kind)
    try:
        body = codec.write(event)
    except (ValueError, TypeError, RecursionError) as error:
        raise NotSerializable(f"JSON cannot carry the event {kind.event_name!r}: {error}") from error
    if len(body) > max_body:
        raise TooLarge(f"the event is {len(body)} bytes of JSON; the limit is {max_body} (max_body)")
    read_event(kind, body)
    return body


def read_event(kind: type[E], body: bytes) -> E:
    """Read an event from JSON.

    Raises:
        InvalidParams: it is not JSON, or does not fit the class.

    """
    label = f"{kind.event_name!r} version {kind.event_version}" if kind.event_name else repr(kind.__name__)
    event: E = read_fitting(_codec(kind).read, body, label, "fields")
    return event


class _EventCodec:
    """Reads and writes the events of one class."""

    __slots__ = ("read", "write")

    def __init__(self, kind: type[Event]) -> None:
        label = f"the event {kind.__name__} has"
        try:
            codec = make_codec(kind, label, written=True)
        except (PydanticUserError, NameError, TypeError) as error:
            raise ConfigurationError(f"{label} fields that pydantic cannot handle: {error}") from error
        self.write = Result(kind.event_name, codec).write

        def read(body: bytes) -> Any:
            found = codec.read(refuse_nan(body))
            if codec.floats:
                refuse_beyond_float(body, found, codec.read)
            return found

        self.read: Callable[[bytes], Any] = read


def _codec(kind: type[Event]) -> _EventCodec:
    """The codec of a class; it is made when it is first needed, because annotations may name later classes.

    Raises:
        ConfigurationError: pydantic has no schema for a field, or would change its secrets or bytes on the way.

    """
    found: _EventCodec | None = kind.__dict__.get("__rpcq_codec__")
    if found is None:
        found = _EventCodec(kind)
        type.__setattr__(kind, "__rpcq_codec__", found)
    return found


class Topics:
    """The events that a subscription takes: the patterns of its queue, and the classes that its handler takes.

    Args:
        label: the subscription in texts of errors, `service.subscription`.
        topics: classes of events and patterns, as `Service.on` got them.
        annotation: of the handler's parameter for the event; `Any` if it has none.
        each_instance: whether every process gets each event.

    Attributes:
        patterns: names and patterns, as the queue is bound.
        each_instance: as above.

    Raises:
        ConfigurationError: they do not fit each other; the message says how to make them fit.

    """

    def __init__(self, label: str, topics: Sequence[Any], annotation: Any, *, each_instance: bool) -> None:
        self.each_instance = each_instance
        self._label = label
        classes = [topic for topic in topics if isinstance(topic, type)]
        self.patterns = tuple(dict.fromkeys(pattern_of(topic) for topic in topics))
        self._words = [words_of(pattern.encode()) for pattern in self.patterns]
        self._matched: dict[str, bool] = {}
        members = _members(annotation)
        if annotation is Any:
            is_open = len(classes) < len(topics)
            members = [*classes, AnyEvent] if is_open else classes
        for member in members:
            if not (isinstance(member, type) and issubclass(member, Event | AnyEvent)):
                raise ConfigurationError(f"{label} must take the event in one parameter that {_FORMS}; got {member!r}")
        self.takes_any = AnyEvent in members
        kinds = {it: None for it in members if issubclass(it, Event) and it.event_name}
        for kind in classes:
            if issubclass(kind, tuple(members)):  # the annotation is the class, or a base of it
                kinds[kind] = None
            elif not self.takes_any:
                raise ConfigurationError(
                    f"{label} subscribes to {kind.__name__}, which its parameter does not take: annotate it with "
                    f"{' | '.join((*(it.__name__ for it in members), kind.__name__))}"
                )
        self._kinds = _by_name(kinds)
        self._check_reached()

    def _check_reached(self) -> None:
        """Check that each class has a pattern, and each pattern a class."""
        for name, (kind, *_) in self._kinds.items():
            if not self.matches(name):
                raise ConfigurationError(
                    f"{self._label} takes {kind.__name__}, and none of its patterns takes {name!r}: add the class, "
                    f"@{self._label.rpartition('.')[0]}.on(..., {kind.__name__})"
                )
        names = [words_of(name.encode()) for name in self._kinds]
        for pattern, words in zip(self.patterns, self._words, strict=True):
            if not self.takes_any and not any(topic_matches(words, name) for name in names):
                what = "events of any name" if has_wildcard(words) else "this event"
                raise ConfigurationError(
                    f"{self._label} subscribes to {pattern!r}, and its parameter takes no such event: annotate it with "
                    f"the classes that it takes, or with AnyEvent for {what}"
                )

    @property
    def kinds(self) -> Iterable[type[Event]]:
        """The classes that its handler takes."""
        return [kind for kinds in self._kinds.values() for kind in kinds]

    def matches(self, name: str) -> bool:
        """Whether a pattern takes events of this name."""
        found = self._matched.get(name)
        if found is None:
            words = words_of(name.encode())
            found = any(topic_matches(pattern, words) for pattern in self._words)
            if len(self._matched) < _REMEMBERED:
                self._matched[name] = found
        return found

    def kind_of(self, name: str, version: int) -> type[Event] | None:
        """The class that reads an event: that of its version, else the next lower one, else the lowest.

        None if no class here has this name; it is taken as an `AnyEvent`, if at all.
        """
        kinds = self._kinds.get(name)
        if kinds is None:
            return None
        return next((kind for kind in reversed(kinds) if kind.event_version <= version), kinds[0])

    def read(self, name: str, version: int, event_id: str, body: bytes) -> Event | AnyEvent:
        """Read an event for the handler.

        Raises:
            InvalidParams: it does not fit its class, or the handler takes no event of this name.

        """
        kind = self.kind_of(name, version)
        if kind is not None:
            return read_event(kind, body)
        if not self.takes_any:
            raise InvalidParams(f"{self._label} takes no event {name!r}: it takes {', '.join(self._kinds)}")
        return AnyEvent(event_id, name, version, read_fitting(bodies.loads, body, repr(name), "fields"))


_REMEMBERED: Final = 1024
"""Names of events whose match is remembered for each subscription; a peer may write any name."""

_FORMS: Final = (
    "is annotated with a class of events, `event: OrderCreated`, with several, `OrderCreated | OrderPaid`, or with "
    "AnyEvent"
)


def pattern_of(topic: Any, function: str = "on") -> str:
    """The pattern of what a subscription is given.

    Args:
        topic: a class of events, or a pattern.
        function: to which function it was given, for texts of errors.

    Raises:
        ConfigurationError: it is no class of events and no pattern.

    """
    if isinstance(topic, str):
        return check_pattern(topic)
    must = f"{function} must be given classes of events"
    if not isinstance(topic, type):
        example = f"as in {function}(OrderCreated) and {function}('order.*')"
        raise ConfigurationError(f"{must}, or patterns, {example}; got {topic!r}")
    name = topic.__name__
    if not issubclass(topic, Event):
        fix = f"write class {name}(rpcq.Event, name='order.created')"
        raise ConfigurationError(f"{must}; got {name}, which is none: {fix}")
    if not topic.event_name:
        fix = f"write class {name}(Event, name='order.created')"
        raise ConfigurationError(f"{must} with a name; got {name}: {fix}")
    return topic.event_name


def _members(annotation: Any) -> list[Any]:
    """The members of a union; without one, the annotation alone."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _members(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [each for member in typing.get_args(annotation) for each in _members(member)]
    return [annotation]


def _by_name(kinds: Iterable[type[Event]]) -> dict[str, list[type[Event]]]:
    """Classes by the name of the event, those of each name by version.

    Raises:
        ConfigurationError: two have one name and version.

    """
    found: dict[str, list[type[Event]]] = {}
    for kind in kinds:
        found.setdefault(kind.event_name, []).append(kind)
    for same in found.values():
        same.sort(key=lambda kind: kind.event_version)
        for first, second in itertools.pairwise(same):
            if first.event_version == second.event_version:
                raise ConfigurationError(twice(first, second))
    return found

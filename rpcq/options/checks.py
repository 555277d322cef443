"""Limits, and the checks that options share."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable
from typing import Any, Final

from rpcq.errors import ConfigurationError, DomainError

NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,100}\Z")
"""Names that services and clients may have."""

NAMESPACE: Final = re.compile(r"(?!amq\Z)[A-Za-z0-9_-]{1,100}\Z")
"""Names that namespaces may have: without a dot, since two pairs of namespace and service must not share a queue."""

MAX_HEADERS: Final = 8 * 1024
"""Bytes of all headers of a message together; RabbitMQ closes a connection over far larger ones."""

MAX_PROPERTIES: Final = MAX_HEADERS + 4 * 1024
"""Bytes of all properties of a message: the headers, and the others, which have at most 256 bytes each."""

MAX_TIMEOUT: Final = 25 * 60.0
"""RabbitMQ closes a channel whose consumer holds a message for 30 minutes (`consumer_timeout`)."""

MAX_DELAY: Final = (2**24 - 1) * 0.25
"""Seconds of the longest delay of a job, 48 days and 13 hours: 24 bits of 250 ms; see `rpcq.wire.delays`."""

OWNED_HEADERS: Final = re.compile(r"x-(death\Z|first-death-|last-death-|delivery-count\Z|opt-|acquired-count\Z)")
"""Names of headers that RabbitMQ owns: refused from users, and never shown as metadata."""


def check_name(what: str, name: str | None) -> str:
    """Check a name, and return it; `what` is the subject of the error's message, such as "the name of a service".

    Raises:
        ConfigurationError: the name is not 1 to 100 of `A-Za-z0-9_.-`.

    """
    if not isinstance(name, str) or not NAME.match(name):
        msg = f"{what} must be 1 to 100 of the characters A-Z a-z 0-9 _ . -; got {name!r}"
        raise ConfigurationError(msg)
    return name


def check_seconds(name: str, value: float, most: float = math.inf) -> None:
    """Check a number of seconds.

    Raises:
        ConfigurationError: it is not a finite number above 0 and at most `most`; the message contains `name`.

    """
    largest = min(most, sys.float_info.max)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= largest:
        upper = "" if most == math.inf else f" and at most {most:g}"
        msg = f"{name} must be a number of seconds above 0{upper}; got {value!r}"
        raise ConfigurationError(msg)


def check_several(name: str, value: Any) -> tuple[Any, ...]:
    """Check that a value is several items, in a tuple, list or other iterable, and return them as a tuple.

    Raises:
        ConfigurationError: it is a string, or not iterable.

    """
    if isinstance(value, str | bytes | type) or not isinstance(value, Iterable):
        raise ConfigurationError(f"{name} must be a tuple, even for one item; got {value!r}")
    return tuple(value)


def check_errors(errors: Any) -> tuple[type[DomainError], ...]:
    """Check domain errors in a tuple, list or other iterable, and return them as a tuple.

    Raises:
        ConfigurationError: `errors` is not iterable, or contains something else.

    """
    kinds = check_several("errors", errors)
    for kind in kinds:
        if not (isinstance(kind, type) and issubclass(kind, DomainError)):
            raise ConfigurationError(f"errors must be subclasses of DomainError; got {kind!r}")
    return kinds


def check_count(name: str, value: int, least: int, most: int) -> None:
    """Check a whole number.

    Raises:
        ConfigurationError: it is not one from `least` to `most`.

    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ConfigurationError(f"{name} must be a whole number from {least} to {most}; got {value!r}")


def check_amount(name: str, value: float) -> None:
    """Check how much of something there is.

    Raises:
        ConfigurationError: it is not a finite number of at least 0.

    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= sys.float_info.max:
        raise ConfigurationError(f"{name} must be a number of at least 0; got {value!r:.100}")


def size_of(value: Any) -> int:
    """Bytes of a string in UTF-8; -1 if the value is not a string, or cannot be encoded."""
    try:
        return len(value.encode()) if isinstance(value, str) else -1
    except UnicodeEncodeError:
        return -1


def check_short(name: str, value: str | None) -> None:
    """Check a string that AMQP carries as a short one; None is none.

    Raises:
        ConfigurationError: it is not 1 to 255 bytes in UTF-8.

    """
    if value is not None and not 1 <= size_of(value) <= 255:
        raise ConfigurationError(f"{name} must be a string of 1 to 255 bytes; got {value!r}")


def check_delay(name: str, seconds: float) -> None:
    """Check a delay, in seconds.

    Raises:
        ConfigurationError: it is not a number from 0 to `MAX_DELAY`.

    """
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= MAX_DELAY:
        raise ConfigurationError(f"{name} must be a number of seconds from 0 to {MAX_DELAY} (48 days); got {seconds!r}")

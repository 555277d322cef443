"""What a caller knows of a service: its contract, a Protocol class, and the types of its results. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from pydantic import PydanticUserError

from rpcq.errors import ConfigurationError, DomainError, InvalidReply
from rpcq.options import check_errors, check_name
from rpcq.validation.schemas import Codec, make_codec
from rpcq.wire import bodies
from rpcq.wire.values import (
    EXPONENT,
    MARKS,
    MAX_DIGITS,
    OWN_SECRETS,
    refuse_beyond_float,
    refuse_changed,
    refuse_nan,
)

METHOD_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,100}\Z")
"""A method's name has no dot: `a.b.c` is method `c` of service `a.b`."""

C = TypeVar("C")


@dataclass(frozen=True, slots=True)
class Contract:
    """What `contract` says of a Protocol class."""

    service: str
    errors: tuple[type[DomainError], ...] = ()
    idempotent: frozenset[str] = frozenset()


def contract(
    service: str, *, errors: Iterable[type[DomainError]] = (), idempotent: Iterable[str] = ()
) -> Callable[[C], C]:
    """Say what service a Protocol class describes, so that `Client.bind` needs no more.

    Args:
        service: its name.
        errors: domain errors that callers want to catch by their class.
        idempotent: names of methods that may be sent again where an attempt may have been lost.

    """
    said = Contract(check_name("the service", service), check_errors(errors), frozenset(idempotent))

    def mark(api: C) -> C:
        unknown = sorted(name for name in said.idempotent if not callable(getattr(api, name, None)))
        if unknown:
            raise ConfigurationError(f"the contract of {service!r} calls {unknown} idempotent, and has no such method")
        api.__rpcq_contract__ = said  # type: ignore[attr-defined]  # read by `Client.bind`
        return api

    return mark


class Result:
    """Reads and writes values of one type."""

    def __init__(self, label: str, codec: Codec) -> None:
        self.label = label
        self._check = codec.check
        self._write = codec.write
        self._plain = codec.plain
        self._read = codec.read
        self.read: Callable[[bytes], Any] = self._read_floats if codec.floats else codec.read
        """A value from JSON. Raises pydantic's ValidationError, `bounds.NotRead` and InvalidReply."""

    def _read_floats(self, body: bytes) -> Any:
        value = self._read(body)
        if type(value) is float and math.isfinite(value):
            return value
        # The first look is here, not behind another call, as in `bodies.loads`.
        is_odd = len(body) > 200 or body.translate(MARKS, b"+").rfind(EXPONENT) >= 0
        if is_odd or body.find(b"N") >= 0 or body.find(b"I") >= 0:
            try:
                refuse_beyond_float(refuse_nan(body), value, self._read)
            except ValueError as error:
                raise InvalidReply(f"the result of {self.label} cannot be taken: {error}") from error
        return value

    def write(self, value: Any) -> bytes:
        """A value as JSON, by aliases: that is how the other side reads it."""
        valid = self._check(value)
        body = refuse_nan(self._write(valid, by_alias=True))
        if body.find(b"null") >= 0 and valid is not None:  # perhaps a model's NaN, which has a mode of its own
            bodies.dumps(self._plain(valid, mode="json", by_alias=True))
        if body.find(b"*") >= 0 or len(body) > MAX_DIGITS or OWN_SECRETS():
            refuse_changed(valid, body)
        return body


def result_adapter(label: str, returns: Any, *, written: bool = False) -> Result:
    """Reads what `label` returns, and writes it if `written`.

    Raises:
        ConfigurationError: pydantic has no schema for the type, or its secrets or bytes would arrive as something else.

    """
    try:
        return Result(label, make_codec(returns, f"{label} returns", written=written))
    except (PydanticUserError, NameError, TypeError) as error:
        msg = f"{label} returns {returns!r}, which pydantic cannot handle: {error}"
        raise ConfigurationError(msg) from error

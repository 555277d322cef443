"""What callers know of a service: a contract, which is a Protocol class, and the types of results. Pure."""

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
"""A method's name. It has no dot: `a.b.c` is method `c` of service `a.b`."""

C = TypeVar("C")


@dataclass(frozen=True, slots=True)
class Contract:
    """What `contract` attaches to a Protocol class."""

    service: str
    errors: tuple[type[DomainError], ...] = ()
    idempotent: frozenset[str] = frozenset()


def contract(
    service: str, *, errors: Iterable[type[DomainError]] = (), idempotent: Iterable[str] = ()
) -> Callable[[C], C]:
    """Mark a Protocol class as the contract of a service, for `Client.bind`.

    Args:
        service: the service's name.
        errors: domain errors that callers want to catch by their class.
        idempotent: names of methods that may be sent again after an attempt that may have run.

    Raises:
        ConfigurationError: a name or an error is not valid, or the class has no such method.

    """
    declared = Contract(check_name("the name of a service", service), check_errors(errors), frozenset(idempotent))

    def mark(api: C) -> C:
        unknown = sorted(name for name in declared.idempotent if not callable(getattr(api, name, None)))
        if unknown:
            raise ConfigurationError(f"idempotent in the contract of {service!r} must name its methods; got {unknown}")
        api.__rpcq_contract__ = declared  # type: ignore[attr-defined]  # read by `Client.bind`
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
        """Read a value from JSON. Raises pydantic's ValidationError, `bounds.NotRead` and InvalidReply."""

    def _read_floats(self, body: bytes) -> Any:
        value = self._read(body)
        if type(value) is float and math.isfinite(value):
            return value
        # Hot path: check here before calling `refuse_beyond_float`, as in `bodies.loads`.
        is_suspect = len(body) > 200 or body.translate(MARKS, b"+").rfind(EXPONENT) >= 0
        if is_suspect or body.find(b"N") >= 0 or body.find(b"I") >= 0:
            try:
                refuse_beyond_float(refuse_nan(body), value, self._read)
            except ValueError as error:
                raise InvalidReply(f"the result of {self.label} cannot be read: {error}") from error
        return value

    def write(self, value: Any) -> bytes:
        """Write a value as JSON. Fields are written by their aliases, because the other side reads those."""
        valid = self._check(value)
        body = refuse_nan(self._write(valid, by_alias=True))
        if body.find(b"null") >= 0 and valid is not None:  # may be a model's NaN: a model has its own mode
            bodies.dumps(self._plain(valid, mode="json", by_alias=True))
        if body.find(b"*") >= 0 or len(body) > MAX_DIGITS or OWN_SECRETS():
            refuse_changed(valid, body)
        return body


def result_adapter(label: str, returns: Any, *, written: bool = False) -> Result:
    """Make the `Result` of the type that `label` returns; `written` if values are written, too.

    Raises:
        ConfigurationError: pydantic has no schema for the type, or would change its secrets or bytes on the way.

    """
    try:
        return Result(label, make_codec(returns, f"{label} returns", written=written))
    except (PydanticUserError, NameError, TypeError) as error:
        msg = f"{label} returns {returns!r}, which pydantic cannot handle: {error}"
        raise ConfigurationError(msg) from error

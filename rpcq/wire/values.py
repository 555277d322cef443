"""What JSON would change or lose on its way: numbers beyond a float, integers that nobody reads, secrets. Pure.

The first look is at the body, and cheap. The value itself is looked at only where the body gives a reason to.
"""

from __future__ import annotations

import cmath
import math
import re
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Final

from pydantic import Secret, SecretBytes, SecretStr
from pydantic_core import SchemaSerializer, core_schema, from_json, to_json

MAX_DIGITS: Final = 4300
"""Digits of an integer: pydantic's core writes more, and reads no more."""


class NotCarried(ValueError):
    """JSON would carry a value as another one, or so that nobody can read it. The message does not tell the value."""


def refuse_nan(body: bytes) -> bytes:
    """The body, if it has none of the constants that pydantic writes for numbers that JSON does not have.

    Raises:
        ValueError: it has.

    """
    # A single byte is found far sooner than several; and `in` would try first whether bytes are a number.
    if (body.find(b"N") >= 0 and body.find(b"NaN") >= 0) or (body.find(b"I") >= 0 and body.find(b"Infinity") >= 0):
        try:  # perhaps inside a string: only then is it parsed
            from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise ValueError("NaN and Infinity are not JSON") from error
    return body


# Reading: a number that JSON has and a float has not is infinite in Python.


def _mark(byte: int) -> int:
    char = chr(byte)
    kinds = (("0123456789.", "0"), ("eE", "e"), ("[]{}:, \t\r\n", ","), ('"', '"'), ("-", "-"))
    return next((ord(mark) for chars, mark in kinds if char in chars), ord(" "))


MARKS: Final = bytes(map(_mark, range(256)))
"""Translates JSON so that numbers with an exponent look alike; `+` is to be left out."""

EXPONENT: Final = b"0e000"
"""What a number beyond a float has in such a translation, unless it has as many digits as `DIGITS` before its point."""

DIGITS: Final = b"0" * 200
_LARGE: Final = 2000
"""Bytes of a body whose value is worth a glance first: it may be an array of numbers, or a long text."""

_TAIL: Final = re.compile(rb'e0000*(?:[,"]|\Z)')
_NUMBER: Final = re.compile(rb"-?[0-9]+(?:\.[0-9]+)?(?:[eE]\+?[0-9]+)?")

FLOATLESS: Final = frozenset((str, int, bool, type(None), bytes))
"""Types of values that have no float in them."""


def refuse_beyond_float(body: bytes, value: Any, read: Callable[[bytes], Any] | None = None) -> None:
    """Refuse what was read from a body if a number in it is beyond the range of a float.

    Args:
        body: JSON.
        value: what was read from it.
        read: reads a body as `value` was read; None if that is just as JSON has it.

    Raises:
        NotCarried: there is such a number, and it was read as a float.

    """
    if len(body) > _LARGE and _is_finite(value, len(body) // 500):
        return
    marks = body.translate(MARKS, b"+")
    if (marks.rfind(EXPONENT) >= 0 and _has_exponent(marks)) or (len(body) > 200 and marks.find(DIGITS) >= 0):
        _look_for_infinity(body, value, read)


def _is_finite(value: Any, most: int) -> bool:
    """Whether what was read from JSON has no infinity; not after so many steps."""
    rest: list[Any] = [value]
    while rest and most > 0:
        most -= 1
        it = rest.pop()
        kind = type(it)
        if kind is dict or kind is list or kind is tuple:
            parts = it.values() if kind is dict else it
            if kind is dict and not FLOATLESS.issuperset(map(type, it)):
                return False
            with suppress(Exception):  # whatever others than numbers raise
                if math.isfinite(sum(parts)):
                    continue
            if not FLOATLESS.issuperset(map(type, parts)):
                if len(parts) > most:
                    return False
                rest += parts
        elif kind not in FLOATLESS and not (kind is float and math.isfinite(it)):
            return False
    return not rest


def _has_exponent(marks: bytes) -> bool:
    """Whether what stands where numbers do has such an exponent; in a UUID it is nothing."""
    for found in _TAIL.finditer(marks):
        before = marks[max(0, found.start() - len(DIGITS)) : found.start()]
        start = before.rstrip(b"0")
        if len(start) < len(before) and start.removesuffix(b"-")[-1:] in (b"", b",", b'"'):
            return True
    return False


def _look_for_infinity(body: bytes, value: Any, read: Callable[[bytes], Any] | None) -> None:
    found = _infinities(value if read is None else from_json(body))
    if not found and read is not None:
        found = _infinities(value)
        if found:
            # A type made a float of an integer or a string; or it is the program's own infinity, such as a default.
            with suppress(ValueError):  # where what is shorter does not fit, nothing tells the two apart
                found -= _infinities(read(_NUMBER.sub(_in_short, body)))
    if found > 0:
        raise NotCarried("a number is beyond the range of a float, about 1.8e308")


def _in_short(found: re.Match[bytes]) -> bytes:
    return b"1" if cmath.isinf(float(found[0])) else found[0]


def _infinities(value: Any) -> int:
    return sum(isinstance(it, float | complex) and cmath.isinf(it) for it in _leaves(value))


def _leaves(value: Any) -> Iterator[Any]:
    """What a value is made of, keys included, as pydantic takes it apart."""
    rest: list[Any] = [_ANYTHING.to_python(value, warnings=False)]
    while rest:
        it = rest.pop()
        if isinstance(it, dict):
            rest += it.keys()
            rest += it.values()
        elif isinstance(it, list | tuple | set | frozenset | deque):
            rest += it
        else:
            yield it


_ANYTHING: Final = SchemaSerializer(core_schema.any_schema())


# Writing: secrets are written as asterisks, and long integers as what cannot be read.


_MASK: Final = b'"**********"'
OWN_SECRETS: Final = Secret.__subclasses__
"""The classes of secrets that may be written as something else than asterisks."""


def refuse_changed(value: Any, body: bytes) -> None:
    """Refuse a body that does not carry the value that it was written from.

    There is no need to where it has no asterisk and no more than 4300 bytes, and there are no `OWN_SECRETS`.

    Raises:
        NotCarried: the value has a secret, or an integer of more than 4300 digits.

    """
    if body.find(_MASK) >= 0 or _has_own_mask(Secret):
        _look_for_secrets(value, body)
    if len(body) > MAX_DIGITS and _may_be_long(body):
        try:
            from_json(body)
        except ValueError as error:
            raise NotCarried(f"an integer of more than {MAX_DIGITS} digits can be written, and not be read") from error


_CHUNK: Final = MAX_DIGITS // 2
_HOPS: Final = re.compile(rb"(?s:[0-9]{0,%d}[^0-9].{%d})*+" % (_CHUNK - 1, _CHUNK - 1))


def _may_be_long(body: bytes) -> bool:
    """Whether there are very many digits in a row; by hops from what is no digit over less than half of them."""
    hops = _HOPS.match(body)
    at = hops.end() if hops else 0
    return at + _CHUNK <= len(body) and body[at : at + _CHUNK].isdigit()


def _look_for_secrets(value: Any, body: bytes) -> None:
    for it in _leaves(value):
        # A model may write its secret as it is, by a serializer of its own. An iterator has been used up.
        if isinstance(it, Secret | SecretStr | SecretBytes):
            masked = body.find(to_json(it)) >= 0
        else:
            masked = isinstance(it, Iterator) and body.find(_MASK) >= 0
        if masked:
            raise NotCarried("a secret would arrive as asterisks; pass secret.get_secret_value() instead")


def _has_own_mask(kind: type[Any]) -> bool:
    """Whether a class under `Secret` hides its value as something else than asterisks."""
    return any("_display" in vars(it) or _has_own_mask(it) for it in kind.__subclasses__())

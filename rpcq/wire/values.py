"""Refuse values that JSON would change: numbers beyond a float, integers too long to be read, secrets. Pure.

Each check looks at the body first, which is cheap, and at the value only if the body gives a reason.
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
"""The most digits of an integer: pydantic's core can write more, but cannot read more."""


class NotCarried(ValueError):
    """JSON would change a value, or make it unreadable. The message does not contain the value."""


def refuse_nan(body: bytes) -> bytes:
    """Return the body, unless it has NaN or Infinity, which pydantic writes and JSON does not have.

    Raises:
        ValueError: the body has one of them.

    """
    # Fast: `find` of a single byte is much faster than of several; `in` would first try bytes as an integer.
    if (body.find(b"N") >= 0 and body.find(b"NaN") >= 0) or (body.find(b"I") >= 0 and body.find(b"Infinity") >= 0):
        try:  # it may be inside a string: parse the body to know
            from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise ValueError("NaN and Infinity are not JSON") from error
    return body


# Reading: a JSON number beyond the range of a float becomes infinity in Python.


def _mark(byte: int) -> int:
    char = chr(byte)
    kinds = (("0123456789.", "0"), ("eE", "e"), ("[]{}:, \t\r\n", ","), ('"', '"'), ("-", "-"))
    return next((ord(mark) for chars, mark in kinds if char in chars), ord(" "))


MARKS: Final = bytes(map(_mark, range(256)))
"""Translates JSON so that all numbers with an exponent look alike; use it with `+` deleted."""

EXPONENT: Final = b"0e000"
"""In such a translation, each number beyond a float has this, or `DIGITS` before its point."""

DIGITS: Final = b"0" * 200
_LARGE: Final = 2000
"""Above this many bytes, look at the value first: it is often an array of numbers or a long text, which is quick."""

_TAIL: Final = re.compile(rb'e0000*(?:[,"]|\Z)')
_NUMBER: Final = re.compile(rb"-?[0-9]+(?:\.[0-9]+)?(?:[eE]\+?[0-9]+)?")

FLOATLESS: Final = frozenset((str, int, bool, type(None), bytes))
"""Types whose values contain no float."""


def refuse_beyond_float(body: bytes, value: Any, read: Callable[[bytes], Any] | None = None) -> None:
    """Refuse a value if a number in its body is beyond the range of a float.

    Args:
        body: JSON.
        value: the value that was read from it.
        read: the function that read `value`; None if it was read as plain JSON.

    Raises:
        NotCarried: there is such a number, and it was read as a float.

    """
    if len(body) > _LARGE and _is_finite(value, len(body) // 500):
        return
    marks = body.translate(MARKS, b"+")
    if (marks.rfind(EXPONENT) >= 0 and _has_exponent(marks)) or (len(body) > 200 and marks.find(DIGITS) >= 0):
        _look_for_infinity(body, value, read)


def _is_finite(value: Any, most: int) -> bool:
    """Whether a value from JSON surely has no infinity; False if `most` steps do not suffice to know."""
    rest: list[Any] = [value]
    while rest and most > 0:
        most -= 1
        it = rest.pop()
        kind = type(it)
        if kind is dict or kind is list or kind is tuple:
            parts = it.values() if kind is dict else it
            if kind is dict and not FLOATLESS.issuperset(map(type, it)):
                return False
            with suppress(Exception):  # other types than numbers raise various errors
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
    """Whether a number has `EXPONENT`: hits in the middle of a string, such as a UUID, do not count."""
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
            # The type made a float of an integer or a string, or the program has an infinity, such as a default. To
            # know which, read the body again without the large numbers, and subtract the infinities that remain.
            with suppress(ValueError):  # the changed body may not fit the type: then all of them count
                found -= _infinities(read(_NUMBER.sub(_in_short, body)))
    if found > 0:
        raise NotCarried("a number is beyond the range of a float, about 1.8e308")


def _in_short(found: re.Match[bytes]) -> bytes:
    return b"1" if cmath.isinf(float(found[0])) else found[0]


def _infinities(value: Any) -> int:
    return sum(isinstance(it, float | complex) and cmath.isinf(it) for it in _leaves(value))


def _leaves(value: Any) -> Iterator[Any]:
    """Yield the innermost parts of a value, including keys, as pydantic would write them."""
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


# Writing: pydantic writes secrets as asterisks, and long integers that cannot be read.


_MASK: Final = b'"**********"'
OWN_SECRETS: Final = Secret.__subclasses__
"""Gives the user's classes of secrets, which may be written as something else than asterisks."""


def refuse_changed(value: Any, body: bytes) -> None:
    """Refuse a body that does not carry the value from which it was written.

    The call may be skipped if the body has no asterisk and at most 4300 bytes, and there are no `OWN_SECRETS`.

    Raises:
        NotCarried: the value has a secret, or an integer of more than 4300 digits.

    """
    if body.find(_MASK) >= 0 or _has_own_mask(Secret):
        _look_for_secrets(value, body)
    if len(body) > MAX_DIGITS and _may_be_long(body):
        try:
            from_json(body)
        except ValueError as error:
            raise NotCarried(f"an integer of more than {MAX_DIGITS} digits cannot be read") from error


_CHUNK: Final = MAX_DIGITS // 2
_HOPS: Final = re.compile(rb"(?s:[0-9]{0,%d}[^0-9].{%d})*+" % (_CHUNK - 1, _CHUNK - 1))


def _may_be_long(body: bytes) -> bool:
    """Whether there may be more than `MAX_DIGITS` digits in a row.

    `_HOPS` skips the bytes after each byte that is no digit, so it looks at few bytes. More than `MAX_DIGITS` digits
    are over two chunks, and it skips less than one: where it stops, a whole chunk of them is left.
    """
    hops = _HOPS.match(body)
    at = hops.end() if hops else 0
    return at + _CHUNK <= len(body) and body[at : at + _CHUNK].isdigit()


def _look_for_secrets(value: Any, body: bytes) -> None:
    for it in _leaves(value):
        # A model may have a serializer that writes its secret in clear. An iterator is used up: only its mask is left.
        if isinstance(it, Secret | SecretStr | SecretBytes):
            masked = body.find(to_json(it)) >= 0
        else:
            masked = isinstance(it, Iterator) and body.find(_MASK) >= 0
        if masked:
            raise NotCarried("a secret would arrive as asterisks; pass secret.get_secret_value() instead")


def _has_own_mask(kind: type[Any]) -> bool:
    """Whether a subclass of `Secret` hides its value by something else than asterisks."""
    return any("_display" in vars(it) or _has_own_mask(it) for it in kind.__subclasses__())

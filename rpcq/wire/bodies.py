"""The bodies of messages: JSON (RFC 8259) <-> values. Pure.

Pydantic's core reads and writes JSON: all that pydantic serialises, integers of up to 4300 digits, and nesting up to a
limit. Bytes are base64. NaN and Infinity are not JSON: they are refused, not turned into null.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pydantic_core import from_json, to_json, to_jsonable_python

from rpcq.errors import InvalidParams, NotSerializable, TooLarge
from rpcq.wire.values import (
    EXPONENT,
    FLOATLESS,
    MARKS,
    MAX_DIGITS,
    OWN_SECRETS,
    refuse_beyond_float,
    refuse_changed,
    refuse_nan,
)

JSON: Final = b"application/json"
"""The content type."""


def dumps(value: Any) -> bytes:
    """Write a value as JSON.

    Raises:
        ValueError: JSON cannot carry it.

    """
    body = to_json(value, bytes_mode="base64", inf_nan_mode="constants")
    if body.find(b"N") >= 0 or body.find(b"I") >= 0:
        refuse_nan(body)
    if body.find(b"null") >= 0 and value is not None:  # may be a model's NaN: a model has its own mode
        plain = to_jsonable_python(value, bytes_mode="base64", inf_nan_mode="constants")
        refuse_nan(to_json(plain, inf_nan_mode="constants"))
    if body.find(b"*") >= 0 or len(body) > MAX_DIGITS or OWN_SECRETS():
        refuse_changed(value, body)
    return body


def loads(body: bytes) -> Any:
    """Read the value of a JSON text.

    Raises:
        ValueError: it is not JSON, or it is nested deeper than about 200.
        NotCarried: a number in it is beyond the range of a float; this is a ValueError too.

    """
    value = from_json(body, allow_inf_nan=False)
    # Hot path, for each untyped reply: check here before calling `refuse_beyond_float`.
    if type(value) not in FLOATLESS and (len(body) > 200 or body.translate(MARKS, b"+").rfind(EXPONENT) >= 0):
        refuse_beyond_float(body, value)
    return value


def encode_params(args: tuple[Any, ...], params: Mapping[str, Any], max_body: int) -> bytes:
    """Write the body of a request: an object by name, an array by position, or a single scalar as it is.

    Raises:
        NotSerializable: JSON cannot carry a parameter; the message names it.
        InvalidParams: some parameters are by name and some by position.
        TooLarge: the body is over `max_body` bytes.

    """
    value: Any = params
    if args:
        if params:
            msg = "parameters must be by position or by name, not both: the body is an array or an object"
            raise InvalidParams(msg)
        value = args
        if len(args) == 1 and isinstance(args[0], str | int | float | None):
            value = args[0]
    try:
        body = dumps(value)
    except (ValueError, TypeError, RecursionError) as error:
        raise _name_culprit(args, params, error) from error
    if len(body) > max_body:
        msg = f"the parameters are {len(body)} bytes of JSON; the limit is {max_body} (max_body)"
        raise TooLarge(msg)
    return body


_FIX: Final = "; a class with bytes needs ConfigDict(ser_json_bytes='base64', val_json_bytes='base64')"


def _name_culprit(args: tuple[Any, ...], params: Mapping[str, Any], error: Exception) -> NotSerializable:
    named = [(repr(name), value) for name, value in params.items()] + [(str(at), it) for at, it in enumerate(args)]
    for name, value in named:
        try:
            dumps(value)
        except (ValueError, TypeError, RecursionError) as cause:
            fix = _FIX if "invalid utf-8" in str(cause) else ""
            return NotSerializable(f"JSON cannot carry parameter {name}, a {type(value).__name__}: {cause}{fix}")
    return NotSerializable(f"JSON cannot carry the parameters: {error}")


def is_json(content_type: bytes) -> bool:
    """Whether a content type means JSON in UTF-8."""
    media, _, charset = content_type.lower().replace(b" ", b"").partition(b";")
    return media == JSON and charset in (b"", b"charset=utf-8", b'charset="utf-8"')


def text(value: bytes | None) -> str:
    """Decode a property for people: bytes that are not UTF-8 are replaced."""
    return (value or b"").decode("utf-8", "replace")

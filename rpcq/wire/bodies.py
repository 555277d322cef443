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

LINES: Final = b"application/x-ndjson"
"""The content type of a message batch; see `rpcq.wire.batches`."""


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


_READ_AS_JSON: Final = frozenset((b"", JSON, b"text/plain", b"application/octet-stream", b"application/data"))
"""Many clients send one of these whatever the body is; whether it is JSON shows when it is read."""

_UTF_8: Final = frozenset((b"", b"utf-8", b"utf8", b"us-ascii", b"ascii"))
_PLAIN: Final = _UTF_8 | {b"binary", b"identity"}
"""Content encodings that leave a body in UTF-8 as it is."""

_MARKS: Final = {
    b"\xef\xbb\xbf": "it begins with a byte order mark (U+FEFF); send UTF-8 without it",
    b"\xff\xfe": "it begins with the byte order mark of UTF-16; send UTF-8",
    b"\xfe\xff": "it begins with the byte order mark of UTF-16; send UTF-8",
    b"\x1f\x8b": "it is compressed with gzip; send it without compression",
}


def why_not_read(content_type: bytes | None, content_encoding: bytes | None) -> str:
    """Why a body with these properties is not read as JSON in UTF-8, or an empty string."""
    if content_type is not None and content_type != JSON and not is_json(content_type):
        return f"the content type must be application/json; got {text(content_type)!r}"
    if content_encoding and content_encoding.strip().lower() not in _PLAIN:
        return f"the body must have no content encoding; got {text(content_encoding)!r}"
    return ""


def is_json(content_type: bytes) -> bool:
    """Whether a body with this content type is read as JSON in UTF-8."""
    media, *parameters = content_type.lower().split(b";")
    named = (parameter.partition(b"=") for parameter in parameters)
    charsets = [value.strip(b' \t"') for name, _, value in named if name.strip() == b"charset"]
    return media.strip() in _READ_AS_JSON and _UTF_8.issuperset(charsets)


def why_not_json(body: bytes, error: ValueError) -> str:
    """Why a body is not JSON: what its first bytes show, or the error of its reader."""
    return next((why for mark, why in _MARKS.items() if body.startswith(mark)), str(error))


def text(value: bytes | None) -> str:
    """Decode a property for people: bytes that are not UTF-8 are replaced."""
    return (value or b"").decode("utf-8", "replace")

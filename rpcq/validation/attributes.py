"""The attributes of domain errors, which travel in `details`. Pure.

An attribute is a name that the class annotates in its body:

    class OutOfStock(DomainError):
        sku: str
        left: int = 0
"""

from __future__ import annotations

import functools
import typing
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Final

from pydantic import PydanticUserError, ValidationError
from pydantic_core import to_json

from rpcq.errors import CallError, ConfigurationError, DomainError
from rpcq.validation.bounds import NotRead
from rpcq.validation.schemas import Codec, make_codec

_OWN: Final = frozenset((*vars(DomainError("")), *dir(DomainError)))
"""What every domain error has: it travels in fields of its own, or not at all."""


def check_attributes(kinds: Iterable[type[CallError]]) -> None:
    """Check the attributes of domain errors.

    Raises:
        ConfigurationError: an annotation cannot be resolved, or pydantic cannot handle its type.

    """
    for kind in kinds:
        _codecs(kind)


def write_details(error: CallError) -> Any:
    """The `details` of an error to send: a domain error's attributes, and what was given as `details`.

    An attribute that has no value is left out. If `details` was given as something else than a dict, it is sent alone.

    Raises:
        Exception: an attribute has a value that does not fit its annotation.

    """
    given = error.details
    if not isinstance(error, DomainError) or not (given is None or isinstance(given, Mapping)):
        return given
    values = {
        name: codec.plain(codec.check(getattr(error, name)), mode="json", by_alias=True)
        for name, codec in _codecs(type(error)).items()
        if hasattr(error, name)
    }
    return {**(given or {}), **values} if values else given


def read_attributes(error: CallError) -> None:
    """Set a received domain error's attributes from its `details`.

    An attribute that is not there, or whose value does not fit, stays as the class has it.
    """
    if not isinstance(error, DomainError) or not isinstance(error.details, dict):
        return
    for name, codec in _codecs(type(error)).items():
        if name in error.details:
            try:
                value = codec.read(to_json(error.details[name]))
            except (ValidationError, NotRead):
                continue
            setattr(error, name, value)


def _codecs(kind: Any) -> dict[str, Codec]:
    return _codecs_of(kind)  # to mypy, a class of errors cannot be hashed; `Any` can


@functools.cache
def _codecs_of(kind: type[CallError]) -> dict[str, Codec]:
    try:
        hints = typing.get_type_hints(kind, include_extras=True)
    except (NameError, AttributeError, SyntaxError, TypeError) as error:
        msg = f"{kind.__qualname__} has an annotation that cannot be resolved in its module: {error}"
        raise ConfigurationError(msg) from error
    return {
        name: _codec(f"{kind.__qualname__}.{name}", hint)
        for name, hint in hints.items()
        if name not in _OWN and not name.startswith("_") and typing.get_origin(hint) is not ClassVar
    }


def _codec(label: str, hint: Any) -> Codec:
    try:
        return make_codec(hint, f"{label} has", written=True)
    except (PydanticUserError, NameError, TypeError) as error:
        msg = f"{label} must have a type that pydantic can handle, or ClassVar; got {hint!r}: {error}"
        raise ConfigurationError(msg) from error

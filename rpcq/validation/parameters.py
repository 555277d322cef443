"""The parameters of a function: by position -> by name, JSON -> arguments, and what is wrong with these. Pure."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Final

from pydantic import PydanticUserError, ValidationError

from rpcq.errors import ConfigurationError, InvalidParams
from rpcq.validation.bounds import MOST_ERRORS
from rpcq.validation.schemas import Codec, make_codec

_MOST_DETAILS: Final = 100
_LONGEST_DETAIL: Final = 1000
"""Characters of a message, and of the names that lead to a field: both may contain text from the body."""


def parameters_codec(label: str, signature: inspect.Signature) -> Codec:
    """Make a codec that validates a JSON object or array as a function's arguments, and returns (args, kwargs)."""

    def capture(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs

    capture.__name__ = label.rpartition(".")[2]
    capture.__signature__ = signature  # type: ignore[attr-defined]  # pydantic reads it
    capture.__annotations__ = {it.name: it.annotation for it in signature.parameters.values()}
    try:
        return make_codec(capture, f"{label} takes", written=False)
    except (PydanticUserError, NameError, TypeError) as error:
        msg = f"{label} takes a parameter that pydantic cannot handle: {error}"
        raise ConfigurationError(msg) from error


def positional_names(signature: inspect.Signature) -> list[str] | None:
    """The names of the parameters that may be given by position; None if one of these has no name for callers."""
    kinds = inspect.Parameter
    parameters = signature.parameters.values()
    if any(it.kind in (kinds.VAR_POSITIONAL, kinds.POSITIONAL_ONLY) for it in parameters):
        return None
    return [it.name for it in parameters if it.kind is kinds.POSITIONAL_OR_KEYWORD]


def by_name(
    label: str, names: list[str] | None, args: tuple[Any, ...], params: Mapping[str, Any]
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Put arguments given by position under their names, since a message has all by name or all by position.

    Args:
        label: the method's or job's name in texts of errors.
        names: what `positional_names` found; with None, nothing is changed.
        args: arguments by position.
        params: arguments by name.

    Raises:
        TypeError: there are more than names, or one is given twice.

    """
    if not args or names is None:
        return args, params
    if len(args) > len(names):
        raise TypeError(f"{label} takes {len(names)} parameters by position, {len(args)} given")
    named = dict(zip(names, args, strict=False))
    if twice := named.keys() & params.keys():
        raise TypeError(f"{label} got {sorted(twice)} twice, by position and by name")
    return (), {**named, **params}


def invalid_params(label: str, error: ValidationError, what: str = "parameters") -> InvalidParams:
    """The error for parameters, or fields, that do not fit; its details list what is wrong, field by field."""
    count = error.error_count()
    if count > MOST_ERRORS:
        return InvalidParams(f"the {what} do not fit {label}: {count} errors, too many to list")
    errors = error.errors(include_url=False, include_context=False, include_input=False)[:_MOST_DETAILS]
    details = [{"loc": _in_short(it["loc"]), "msg": it["msg"][:_LONGEST_DETAIL], "type": it["type"]} for it in errors]
    if details and details[0]["type"] == "json_invalid":
        return InvalidParams(f"the {what} of {label} are not JSON: {details[0]['msg']}", details=details)
    named = "; ".join(f"{'.'.join(str(part) for part in it['loc']) or what}: {it['msg']}" for it in details[:5])
    more = f"; and {count - 5} more" if count > 5 else ""
    return InvalidParams(f"the {what} do not fit {label}: {named}{more}", details=details)


def _in_short(loc: tuple[int | str, ...]) -> list[int | str]:
    """The names that lead to a field, cut off with "..." where they are too long."""
    found: list[int | str] = []
    left = _LONGEST_DETAIL
    for part in loc:
        if len(str(part)) > left:
            return [*found, f"{str(part)[:left]}..."]
        found.append(part)
        left -= len(str(part)) + 1
    return found

"""Problem documents in the OpenAPI of an app. Pure.

https://spec.openapis.org/oas/v3.1.0#responses-object
"""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus
from typing import Any, Final

from rpcq.errors import EXECUTED

_TEXT: Final = {"type": "string"}
_DOCUMENT: Final[dict[str, Any]] = {
    "type": "object",
    "title": "Problem",
    "description": "A problem document of RFC 9457.",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {**_TEXT, "format": "uri", "description": "Names the kind of the error; not an address to open."},
        "title": {**_TEXT, "description": "The same for each type."},
        "status": {"type": "integer", "description": "The HTTP status."},
        "detail": {**_TEXT, "description": "What is wrong with this request, for people."},
        "instance": {**_TEXT, "format": "uri", "description": "Names the call, or the job."},
        "code": {**_TEXT, "description": "The name of a gRPC status, or the code of a domain error in lower case."},
        "executed": {"enum": sorted(EXECUTED), "description": "Whether the request was executed, as far as is known."},
        "queued": {
            "enum": ["maybe", "no"],
            "description": "Whether the broker has the job or the event that was sent.",
        },
        "retryable": {"type": "boolean", "description": "Whether the same request may be sent again."},
        "reason": {**_TEXT, "description": "Why a job that the app waited for gave no result, in one word."},
        "attempts": {"type": "integer", "description": "How often that job ran, as far as is known."},
        "incident": {**_TEXT, "description": "An ID for the operators of the service."},
        "details": {"description": "What the service attached to its error."},
    },
}
_FIELDS: Final = {"type": "array", "description": "The fields that are not valid.", "items": {"type": "object"}}
_OWN_OF_FASTAPI: Final = {
    "type": "object",
    "title": "HTTPValidationError",
    "properties": {"detail": {"type": "array", "items": {"type": "object"}}},
}
"""What FastAPI says of a request that does not fit the app's own parameters. It leaves this out if 422 is described."""

_RETRY_AFTER: Final = {
    "Retry-After": {"description": "Seconds after which to try again.", "schema": {"type": "integer", "minimum": 1}}
}


def responses(described: Iterable[tuple[int | None, str, bool]]) -> dict[int | str, dict[str, Any]]:
    """The responses of an app.

    Args:
        described: of each kind of error, its status, its title, and whether its document lists fields in `errors`. The
            status None, of an error whose status is not known before, becomes "default".

    """
    titles: dict[int | str, list[str]] = {}
    with_fields: set[int | str] = set()
    for status, title, lists_fields in described:
        key = "default" if status is None else status
        if title not in titles.setdefault(key, []):
            titles[key].append(title)
        if lists_fields:
            with_fields.add(key)
    return {
        key: _response(key, "; ".join(titles[key]), lists_fields=key in with_fields) for key in sorted(titles, key=str)
    }


def _response(status: int | str, description: str, *, lists_fields: bool) -> dict[str, Any]:
    schema = _DOCUMENT
    if lists_fields:
        schema = {**_DOCUMENT, "properties": {**_DOCUMENT["properties"], "errors": _FIELDS}}
    content = {"application/problem+json": {"schema": schema}}
    if status == HTTPStatus.UNPROCESSABLE_ENTITY:
        content["application/json"] = {"schema": _OWN_OF_FASTAPI}
    found: dict[str, Any] = {"description": description, "content": content}
    return {**found, "headers": _RETRY_AFTER} if status == HTTPStatus.SERVICE_UNAVAILABLE else found

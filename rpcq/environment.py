"""Settings from the environment: every option of a client and of a worker has a variable, `RPCQ_` and its name.

An explicit argument, in code or on the command line, beats the environment, which beats the default. Only this module,
the command line and `rpcq.testing` (`RPCQ_TEST_URL`) read the environment. The meaning of each option is in the
docstrings of `rpcq.options`.
"""

from __future__ import annotations

import os
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

from rpcq.errors import ConfigurationError
from rpcq.options import ClientOptions, ConnectionOptions, WorkerOptions

Options = TypeVar("Options", bound=ConnectionOptions)

_READERS: Final[dict[str, type[ConnectionOptions]]] = {"client": ClientOptions, "worker": WorkerOptions}
_FORMS: Final[dict[Any, str]] = {int: "a whole number", float: "a number", bool: "true or false"}


URL: Final = "RPCQ_URL"
URL_FILE: Final = "RPCQ_URL_FILE"
"""The variable with the path of a file that contains the URL, such as a Docker secret. The file is read at each use."""


def broker_url(url: str | None) -> str:
    """The URL that is given, or else the URL of the environment.

    Raises:
        ConfigurationError: there is no URL, or as `url_from_environment`.

    """
    url = url or url_from_environment()
    if not url:
        msg = (
            "the broker's URL is missing: give one, such as 'amqp://localhost/' or 'memory://', or set RPCQ_URL or "
            "RPCQ_URL_FILE"
        )
        raise ConfigurationError(msg)
    return url


def url_from_environment() -> str | None:
    """The URL in `RPCQ_URL`, or in the file that `RPCQ_URL_FILE` names; None if neither is set.

    Raises:
        ConfigurationError: both are set, or the file cannot be read or does not contain one URL.

    """
    url, path = os.environ.get(URL), os.environ.get(URL_FILE)
    if not path:
        return url or None
    if url:
        raise ConfigurationError("only one of RPCQ_URL and RPCQ_URL_FILE may be set: unset the other one")
    try:
        lines = Path(path).read_text("utf-8").strip().splitlines()
    except OSError as error:
        msg = f"RPCQ_URL_FILE must name a file that can be read; got {path!r}: {error.strerror}"
        raise ConfigurationError(msg) from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"RPCQ_URL_FILE must name a file of text in UTF-8; got {path!r}") from error
    if len(lines) != 1:  # its text may be a secret, and is not shown
        msg = f"RPCQ_URL_FILE must name a file with one line, the broker's URL; got {path!r}, with {len(lines)} lines"
        raise ConfigurationError(msg)
    return lines[0]


def options_from(kind: type[Options], given: Mapping[str, Any]) -> Options:
    """The options of a client or a worker: each as given, or else from the environment, or else its default.

    Raises:
        ConfigurationError: an option or a variable has an invalid value; the message names it.

    """
    asked = [it.name for it in fields(kind) if it.name not in given and os.environ.get(variable(it.name))]
    if not asked:
        return kind(**given)
    found = _read(kind, asked)
    for name, value in found.items():
        try:
            kind(**{name: value})  # one by one, for a message that names the variable
        except ConfigurationError as error:
            raise ConfigurationError(f"{variable(name)}: {error}") from error
    return kind(**{**found, **given})


def variable(option: str) -> str:
    """The name of an option's variable."""
    return f"RPCQ_{option.upper()}"


def _read(kind: type[ConnectionOptions], names: list[str]) -> dict[str, Any]:
    """The values of variables by the names of their options, converted to the options' types."""
    # Imported here, because most programs set no variable, and need not pay for the import.
    import pydantic  # noqa: PLC0415
    from pydantic_settings import BaseSettings, NoDecode  # noqa: PLC0415

    hints = typing.get_type_hints(kind)
    wanted: dict[str, Any] = {}
    for name in names:
        hint = hints[name]
        if hint == tuple[str, ...]:  # words separated by spaces, not JSON
            hint = Annotated[hint, NoDecode, pydantic.BeforeValidator(str.split)]
        wanted[name] = hint, pydantic.Field(validation_alias=variable(name))
    try:
        read = pydantic.create_model("Environment", __base__=BaseSettings, **wanted)()
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        forms = {variable(name): _FORMS.get(hints[name], "text in UTF-8") for name in names}
        msg = f"{first['loc'][0]} must be {forms[str(first['loc'][0])]}; got {first['input']!r}"
        raise ConfigurationError(msg) from error
    return {name: getattr(read, name) for name in names}


@dataclass(frozen=True, slots=True)
class Setting:
    """An option of a client or a worker that has an environment variable.

    Attributes:
        variable: the name of the environment variable.
        option: the name of the keyword argument; only "url_file" is none.
        read_by: "client", "worker" or both.
        kind: the type as it is written in `rpcq.options`, such as "int" or "tuple[str, ...]".
        default: the value without an argument and without the variable.

    """

    variable: str
    option: str
    read_by: tuple[str, ...]
    kind: str
    default: Any


def settings() -> list[Setting]:
    """The broker's URL and all options of clients and workers, in the order of `rpcq.options`."""
    found = {
        option: Setting(name, option, ("client", "worker"), "str", None)
        for name, option in ((URL, "url"), (URL_FILE, "url_file"))
    }
    for reader, kind in _READERS.items():
        for it in fields(kind):
            read_by = (*(found[it.name].read_by if it.name in found else ()), reader)
            found[it.name] = Setting(variable(it.name), it.name, read_by, str(it.type), it.default)
    return list(found.values())

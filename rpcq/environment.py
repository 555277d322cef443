"""Settings from the environment: every option of a client and of a worker has a variable, `RPCQ_` and its name.

An explicit argument, in code or on the command line, beats the environment, which beats the default. Besides the
command line, and `rpcq.testing` with its `RPCQ_TEST_URL`, this is the one place that reads the environment.
"""

from __future__ import annotations

import inspect
import os
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Final, TypeVar

from rpcq.errors import ConfigurationError
from rpcq.options import ClientOptions, ConnectionOptions, WorkerOptions

Options = TypeVar("Options", bound=ConnectionOptions)

_READERS: Final[dict[str, type[ConnectionOptions]]] = {"client": ClientOptions, "worker": WorkerOptions}
_ATTRIBUTE: Final = re.compile(r"^ {4}(?P<name>\w+): (?P<meaning>.+(?:\n {8}.+)*)", re.MULTILINE)


def broker_url(url: str | None) -> str:
    """The URL given, or that of `RPCQ_URL`.

    Raises:
        ConfigurationError: there is neither.

    """
    url = url or os.environ.get("RPCQ_URL")
    if not url:
        msg = "no broker: give a URL such as 'amqp://localhost/' or 'memory://', or set RPCQ_URL"
        raise ConfigurationError(msg)
    return url


def options_from(kind: type[Options], given: Mapping[str, Any]) -> Options:
    """The options of a client or a worker: as given, else from the environment, else the defaults.

    Raises:
        ConfigurationError: an option or a variable cannot be used; the message names it.

    """
    asked = [it.name for it in fields(kind) if it.name not in given and os.environ.get(variable(it.name))]
    if not asked:
        return kind(**given)
    found = _read(kind, asked)
    for name, value in found.items():
        try:
            kind(**{name: value})  # what is wrong is told by its variable
        except ConfigurationError as error:
            raise ConfigurationError(f"{variable(name)}: {error}") from error
    return kind(**{**found, **given})


def variable(option: str) -> str:
    """The variable of an option."""
    return f"RPCQ_{option.upper()}"


def _read(kind: type[ConnectionOptions], names: list[str]) -> dict[str, Any]:
    """The values of variables, by the names of their options, as their types want them."""
    # Only where a variable is set: a program that sets none does not pay for the import.
    import pydantic  # noqa: PLC0415
    from pydantic_settings import BaseSettings, NoDecode  # noqa: PLC0415

    hints = typing.get_type_hints(kind)
    wanted: dict[str, Any] = {}
    for name in names:
        hint = hints[name]
        if hint == tuple[str, ...]:  # in words, not in JSON
            hint = Annotated[hint, NoDecode, pydantic.BeforeValidator(str.split)]
        wanted[name] = hint, pydantic.Field(validation_alias=variable(name))
    try:
        read = pydantic.create_model("Environment", __base__=BaseSettings, **wanted)()
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        msg = f"{first['loc'][0]} is {first['input']!r}: {first['msg']}"
        raise ConfigurationError(msg) from error
    return {name: getattr(read, name) for name in names}


@dataclass(frozen=True, slots=True)
class Setting:
    """One option, as it is documented.

    Attributes:
        variable: its environment variable.
        option: its keyword argument.
        read_by: "client", "worker" or both.
        kind: what its values are: "int", "float", "str", "tuple[str, ...]" and the like.
        default: what counts where neither an argument nor the variable is there.
        meaning: in a sentence, with its unit.

    """

    variable: str
    option: str
    read_by: tuple[str, ...]
    kind: str
    default: Any
    meaning: str


def settings() -> list[Setting]:
    """All options of clients and workers, in the order in which they stand in `rpcq.settings`."""
    url = "the broker: amqp://user:password@host:port/vhost, amqps://..., or memory://"
    found = {"url": Setting("RPCQ_URL", "url", ("client", "worker"), "str", None, url)}
    for reader, kind in _READERS.items():
        meanings = {
            match["name"]: " ".join(match["meaning"].split())
            for base in kind.__mro__
            for match in _ATTRIBUTE.finditer(inspect.cleandoc(base.__doc__ or ""))  # 3.13 removes indentation itself
        }
        for it in fields(kind):
            read_by = (*(found[it.name].read_by if it.name in found else ()), reader)
            found[it.name] = Setting(variable(it.name), it.name, read_by, str(it.type), it.default, meanings[it.name])
    return list(found.values())

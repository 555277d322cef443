"""URLs of brokers, text -> values. Pure.

    amqp://user:password@host:port/vhost            a broker
    amqps://user:password@one,two:5671,three/vhost  several nodes of one cluster, tried in turn, over TLS
    memory://                                       the in-process broker; memory://name is another one

A missing vhost is "/", as in aio-pika; elsewhere in the vhost, "/" is written %2F. `amqps` takes the query parameters
cafile, capath, certfile and keyfile; a certfile that holds its key as well needs no keyfile.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import parse_qsl, unquote

from rpcq.errors import ConfigurationError

PORTS: Final = {"amqp": 5672, "amqps": 5671}
TLS_PARAMETERS: Final = frozenset({"cafile", "capath", "certfile", "keyfile"})
_URL: Final = re.compile(
    r"(?P<scheme>[a-z]+)://(?:(?P<credentials>[^@/?#]*)@)?(?P<hosts>[^@/?#]*)(?:/(?P<vhost>[^@?#]*))?(?:\?(?P<query>[^@#]*))?\Z"
)
_HOST: Final = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%]+\]|[^\[\]:,\s]+)(?::(?P<port>[0-9]{1,5}))?\Z")


@dataclass(frozen=True, slots=True)
class BrokerURL:
    """Where a broker is, and who asks.

    Attributes:
        scheme: "amqp", "amqps" or "memory".
        hosts: pairs of host and port, to be tried in turn; for "memory" one pair of its name and 0.

    """

    scheme: str
    hosts: tuple[tuple[str, int], ...]
    user: str = "guest"
    password: str = field(default="guest", repr=False)
    vhost: str = "/"
    tls: tuple[tuple[str, str], ...] = ()


def mask(url: str) -> str:
    """The URL with its password hidden, for logs and messages: all up to the last @, for it may not be quoted."""
    if "://" not in url:  # no URL, and all the more reason not to show what may be a password
        return re.sub(r".*@", "***@", url, flags=re.DOTALL)
    return re.sub(r"(://[^:@/?#]*):.*@", r"\1:***@", url, flags=re.DOTALL)


def parse(url: str) -> BrokerURL:
    """The values in a URL.

    Raises:
        ConfigurationError: it is not one; the message names the part, and hides the password.

    """
    if not isinstance(url, str):
        msg = f"the broker's URL is {url!r}; it is a string such as 'amqp://localhost/'"
        raise ConfigurationError(msg)
    match = _URL.match(url)
    if match is None:
        form = "amqp://user:password@host:port/vhost"
        raise _refuse(url, f"it is not of the form {form}, each part with / @ : ? # quoted as %2F %40 %3A %3F %23")
    scheme = match["scheme"]
    if scheme == "memory":
        return BrokerURL(scheme, hosts=((match["hosts"], 0),))
    if scheme not in PORTS:
        raise _refuse(url, f"its scheme is {scheme!r}, and may be amqp, amqps or memory")
    query = tuple(parse_qsl(match["query"] or "", keep_blank_values=True))
    for name, _ in query:
        if name not in TLS_PARAMETERS or scheme != "amqps":
            where = "amqps takes cafile, capath, certfile and keyfile" if scheme == "amqps" else "amqp takes none"
            raise _refuse(url, f"its query has {name!r}; {where}")
    names = [name for name, _ in query]
    if twice := next((name for name in names if names.count(name) > 1), ""):
        raise _refuse(url, f"its query has {twice!r} twice; a file may hold several certificates")
    if "keyfile" in names and "certfile" not in names:
        raise _refuse(url, "its query has 'keyfile', the key of a certificate, and no 'certfile'")
    user, colon, password = (match["credentials"] or "guest:guest").partition(":")
    return BrokerURL(
        scheme,
        hosts=tuple(_host(url, host, PORTS[scheme]) for host in match["hosts"].split(",")),
        user=unquote(user),
        password=unquote(password) if colon else "guest",
        vhost=unquote(match["vhost"] or "/"),
        tls=query,
    )


def _host(url: str, text: str, default_port: int) -> tuple[str, int]:
    match = _HOST.match(text)
    if match is None:
        raise _refuse(url, f"its host is {text!r}" if text else "it names no host")
    port = int(match["port"] or default_port)
    if not 0 < port < 65536:
        raise _refuse(url, f"its port is {port}, and may be 1 to 65535")
    return match["host"].strip("[]"), port


def _refuse(url: str, why: str) -> ConfigurationError:
    return ConfigurationError(f"the broker's URL {mask(url)!r} cannot be used: {why}")

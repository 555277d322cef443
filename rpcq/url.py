"""URLs of brokers, text -> values. Pure.

    amqp://user:password@host:port/vhost            a broker
    amqps://user:password@one,two:5671,three/vhost  several nodes of one cluster, tried in turn, over TLS
    memory://                                       the in-process broker; memory://name is another one

The default vhost is "/", as in aio-pika; a "/" in the name of another vhost is written %2F. `amqps` takes the query
parameters cafile, capath, certfile and keyfile; keyfile is not necessary if certfile contains the key.
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

_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_IN_TEXT: Final = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]{0,30})://\S*")
_PUNCTUATION: Final = "'\"`)]}>,;:.!?"
_COLON: Final = re.compile(r"(?:\A|(?<=,))(?P<ipv6>\[[0-9A-Fa-f:.%]+\])|:(?!\Z)(?P<port>[0-9]{1,5}(?=[,/?]|\Z))?")


@dataclass(frozen=True, slots=True)
class BrokerURL:
    """The address of a broker, and the user who connects.

    Attributes:
        scheme: "amqp", "amqps" or "memory".
        hosts: pairs of host and port, to be tried in turn; for "memory", one pair of its name and 0.

    """

    scheme: str
    hosts: tuple[tuple[str, int], ...]
    user: str = "guest"
    password: str = field(default="guest", repr=False)
    vhost: str = "/"
    tls: tuple[tuple[str, str], ...] = ()


def mask(url: str) -> str:
    """The URL with its password hidden, for logs and messages. The whole string is one URL, well-formed or not.

    Everything between the first colon of the user's part and the last @ is hidden, because the password may contain
    these characters without quoting. Text after any other colon is shown only if it is a port number: it may be the
    password of a URL without a host.
    """
    scheme = _SCHEME.match(url)
    before, at, hosts = url[scheme.end() if scheme else 0 :].rpartition("@")
    if at and scheme is None:
        before = "***"  # not a URL: all of it may be the password
    user, colon, _ = before.partition(":")
    return f"{scheme[0] if scheme else ''}{user}{':***' if colon else ''}{at}{_mask_hosts(hosts)}"


def mask_urls(text: str) -> str:
    """The text with the passwords of all its URLs hidden.

    A URL in a text ends at white space: if a password contains white space that is not quoted, the rest of it is shown.
    A URL without an @ is changed only if its scheme is AMQP's: in the path of another URL, a colon means no password.
    """
    return _IN_TEXT.sub(_mask_word, text)


def _mask_word(found: re.Match[str]) -> str:
    word = found[0]
    if "@" not in word and not found["scheme"].lower().endswith(("amqp", "amqps")):
        return word
    url = word.rstrip(_PUNCTUATION)
    return mask(url) + word[len(url) :]


def _mask_hosts(text: str) -> str:
    for found in _COLON.finditer(text):
        if found["ipv6"] is None and not _is_port(found["port"] or ""):
            return f"{text[: found.start()]}:***"
    return text


def _is_port(digits: str) -> bool:
    return digits != "" and 0 < int(digits) < 65536


def parse(url: str) -> BrokerURL:
    """Read the values in a URL.

    Raises:
        ConfigurationError: it is not valid; the message names the part, and hides the password.

    """
    if not isinstance(url, str):
        msg = f"the broker's URL must be a string such as 'amqp://localhost/'; got {type(url).__name__}"
        raise ConfigurationError(msg)
    match = _URL.match(url)
    if match is None:
        form = "amqp://user:password@host:port/vhost"
        raise _invalid(url, f"be of the form {form}, with / @ : ? # in each part quoted as %2F %40 %3A %3F %23")
    scheme = match["scheme"]
    if scheme == "memory":
        return BrokerURL(scheme, hosts=((match["hosts"], 0),))
    if scheme not in PORTS:
        raise _invalid(url, "have the scheme amqp, amqps or memory")
    hosts = tuple(_host(url, host, PORTS[scheme]) for host in match["hosts"].split(","))  # checked before the query
    query = tuple(parse_qsl(match["query"] or "", keep_blank_values=True))
    for name, _ in query:
        if name not in TLS_PARAMETERS or scheme != "amqps":
            takes = "amqps takes cafile, capath, certfile and keyfile" if scheme == "amqps" else "amqp takes none"
            raise _invalid(url, f"not have the query parameter {name!r}: {takes}")
    names = [name for name, _ in query]
    if twice := next((name for name in names if names.count(name) > 1), ""):
        raise _invalid(url, f"have the query parameter {twice!r} only once: a file may contain several certificates")
    if "keyfile" in names and "certfile" not in names:
        raise _invalid(url, "have the query parameter 'certfile' if it has 'keyfile'")
    user, colon, password = (match["credentials"] or "guest:guest").partition(":")
    return BrokerURL(
        scheme,
        hosts=hosts,
        user=unquote(user),
        password=unquote(password) if colon else "guest",
        vhost=unquote(match["vhost"] or "/"),
        tls=query,
    )


def _host(url: str, text: str, default_port: int) -> tuple[str, int]:
    match = _HOST.match(text)
    if match is None:
        hint = ", with a number as the port, and an IPv6 address in [ ]" if ":" in text else ""
        raise _invalid(url, f"have a valid host in place of {_mask_hosts(text)!r}{hint}" if text else "name a host")
    if match["port"] and not _is_port(match["port"]):
        raise _invalid(url, "have a port from 1 to 65535")
    return match["host"].strip("[]"), int(match["port"] or default_port)


def _invalid(url: str, must: str) -> ConfigurationError:
    return ConfigurationError(f"the broker's URL must {must}; got {mask(url)!r}")


def checked_user(url: str) -> str:
    """The broker's user of a client that identifies itself.

    Raises:
        ConfigurationError: its name is too long for the property.

    """
    user = parse(url).user
    if len(user.encode()) > 255:
        raise ConfigurationError(f"a user who identifies must have a name of at most 255 bytes; got {user!r:.50}")
    return user

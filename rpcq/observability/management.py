"""Asks RabbitMQ's management API about queues and bindings: https://www.rabbitmq.com/docs/management#http-api."""

from __future__ import annotations

import base64
import http.client
import re
from collections.abc import Sequence
from typing import Any, Final
from urllib.parse import quote, unquote, urlsplit

import orjson

from rpcq.errors import ConfigurationError
from rpcq.transport.rabbitmq.tls import tls_context
from rpcq.url import PORTS, BrokerURL

TIMEOUT: Final = 5.0
"""Seconds that the API has to answer."""

PAGE_SIZE: Final = 500
"""Queues in one response; the API allows no more."""

UNANSWERED: Final = (OSError, http.client.HTTPException, ValueError, KeyError, TypeError)
"""Exceptions that `Management.queue` raises if there is no such API, or its response is not what it should be."""

NO_URL: Final = "management must be a URL such as 'http://localhost:15672'"

_PORTS: Final = {"amqp": ("http", 15672), "amqps": ("https", 15671)}


def management_of(broker: BrokerURL, url: str | None) -> Management | None:
    """Return the management API of a broker, or None if it should not be asked.

    Args:
        broker: the broker.
        url: URL of the API. None: the broker's first host and the default port of the API, but only if the broker has
            its default port too. An empty string: do not ask it.

    Raises:
        ConfigurationError: the URL cannot be used.

    """
    if url is not None:
        return Management(broker, url) if url else None
    host, port = broker.hosts[0]
    if port != PORTS[broker.scheme]:
        return None  # the API at port 15672 may belong to another broker
    scheme, port = _PORTS[broker.scheme]
    return Management(broker, f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}")


class Management:
    """The management API of one node. Its methods block.

    Args:
        broker: its vhost; also its user and password if the URL has none.
        url: URL of the API.

    Raises:
        ConfigurationError: the URL cannot be used.

    """

    def __init__(self, broker: BrokerURL, url: str) -> None:
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:  # the port is not a number; do not show the text, it may be a part of a password
            raise ConfigurationError(NO_URL) from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigurationError(NO_URL)
        self._scheme = parts.scheme
        self._host, self._port = parts.hostname, port
        self._path, self._vhost = f"{parts.path.rstrip('/')}/api", quote(broker.vhost, safe="")
        user = broker.user if parts.username is None else unquote(parts.username)
        password = broker.password if parts.password is None else unquote(parts.password)
        self._authorization = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
        self._broker = broker

    def queue(self, name: str, columns: Sequence[str]) -> dict[str, Any] | None:
        """Return these columns of a queue, or None if there is no such queue.

        Raises:
            One of `UNANSWERED`: its response is not what it should be.
            ConfigurationError: a file that the broker's URL names for TLS cannot be used.

        """
        found: dict[str, Any] | None = self._get(
            f"/queues/{self._vhost}/{quote(name, safe='')}?columns={','.join(columns)}"
        )
        return found

    def queues(self, prefix: str) -> list[str]:
        """Return the names of all queues that begin with a prefix, in order.

        Raises:
            One of `UNANSWERED`: its response is not what it should be.
            ConfigurationError: a file that the broker's URL names for TLS cannot be used.

        """
        return sorted(it["name"] for it in self.states(prefix, ("name",)))

    def states(self, prefix: str, columns: Sequence[str]) -> list[dict[str, Any]]:
        """Return these columns of all queues whose names begin with a prefix.

        Raises:
            One of `UNANSWERED`: its response is not what it should be.
            ConfigurationError: a file that the broker's URL names for TLS cannot be used.

        """
        states: list[dict[str, Any]] = []
        page, pages = 1, 1
        pattern = quote(f"^{re.escape(prefix)}", safe="")
        while page <= pages:
            query = f"?columns={','.join(columns)}&use_regex=true&name={pattern}&page={page}&page_size={PAGE_SIZE}"
            found = self._get(f"/queues/{self._vhost}{query}") or {}
            states += found.get("items", ())
            page, pages = page + 1, found.get("page_count", 0)
        return states

    def bindings(self, exchange: str) -> list[tuple[str, str]]:
        """Return the queues that are bound to an exchange, each with its binding key; none without the exchange.

        Raises:
            One of `UNANSWERED`: its response is not what it should be.
            ConfigurationError: a file that the broker's URL names for TLS cannot be used.

        """
        found = self._get(f"/exchanges/{self._vhost}/{quote(exchange, safe='')}/bindings/source") or ()
        return [(it["destination"], it["routing_key"]) for it in found if it["destination_type"] == "queue"]

    def _get(self, path: str) -> Any:
        """Return the value of a resource of the API, or None if there is none."""
        connection = self._connection()
        try:
            connection.request("GET", f"{self._path}{path}", headers={"Authorization": self._authorization})
            response = connection.getresponse()
            body = response.read()
        finally:
            connection.close()
        if response.status == http.client.NOT_FOUND:
            return None
        if response.status != http.client.OK:
            msg = f"the response is {response.status} {response.reason}"
            raise OSError(msg)
        return orjson.loads(body)

    def _connection(self) -> http.client.HTTPConnection:
        if self._scheme == "http":
            return http.client.HTTPConnection(self._host, self._port, timeout=TIMEOUT)
        context = tls_context(self._broker)
        return http.client.HTTPSConnection(self._host, self._port, timeout=TIMEOUT, context=context)

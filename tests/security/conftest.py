"""A place whose users have the permissions of the page on security."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator
from urllib.parse import quote, urlsplit, urlunsplit

import pytest

from rpcq.wire.topology import Topology
from security.realm import SERVED, Place, patterns, topic_patterns
from support.broker import Broker


@pytest.fixture(scope="module")
def place(broker: Broker) -> Iterator[Place]:
    if not broker.can_ctl:
        pytest.skip("no users can be made: RPCQ_TEST_URL names a broker whose rabbitmqctl is not at hand")
    namespace = f"t{secrets.token_hex(8)}"
    parts = urlsplit(broker.url)
    vhost = parts.path.removeprefix("/") or "/"
    users: dict[str, str] = {}
    found = Place(broker, Topology(namespace), users)
    asyncio.run(found.declare())  # RabbitMQ 4.3 knows topic permissions only for an exchange that is there
    for role in ("client", "other client", *SERVED):
        user, password = f"{namespace}-{role.replace(' ', '-')}", secrets.token_hex(8)
        broker.ctl("add_user", user, password)
        said = role.split()[-1], namespace, user, SERVED.get(role, "")
        broker.ctl("set_permissions", "-p", vhost, user, *patterns(*said))
        for topic in topic_patterns(*said):
            broker.ctl("set_topic_permissions", "-p", vhost, user, *topic)
        at = f"{quote(user)}:{password}@{parts.hostname}:{parts.port or 5672}"
        users[role] = urlunsplit(("amqp", at, parts.path, "", ""))
    yield found
    asyncio.run(found.delete())
    for url in users.values():
        broker.ctl("delete_user", urlsplit(url).username or "")

"""A place whose users have the permissions of the page on security."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from rpcq.wire.topology import Topology
from security.realm import SERVED, Place, add_user
from support.broker import Broker


@pytest.fixture(scope="module")
def place(broker: Broker) -> Iterator[Place]:
    if not broker.can_ctl:
        pytest.skip("no users can be made: RPCQ_TEST_URL names a broker whose rabbitmqctl is not at hand")
    namespace = f"t{secrets.token_hex(8)}"
    users: dict[str, str] = {}
    found = Place(broker, Topology(namespace), users)
    asyncio.run(found.declare())  # RabbitMQ 4.3 knows topic permissions only for an exchange that is there
    for role in ("client", "other client", *SERVED):
        users[role] = add_user(broker, namespace, role, role.split()[-1], SERVED.get(role, ""))
    yield found
    asyncio.run(found.delete())
    for url in users.values():
        broker.ctl("delete_user", urlsplit(url).username or "")

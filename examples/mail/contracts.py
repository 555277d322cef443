"""What the web app and the services know of each other: an event, and a job. None imports the code of another one."""

from __future__ import annotations

from typing import Protocol

from rpcq import Event, contract


class UserCreated(Event, name="user.created", version=1):
    """Somebody has signed up. E-mail, billing and analytics hear of it, and the web app does not know them."""

    user_id: str
    name: str
    address: str


@contract("emails", jobs=["welcome"])
class EmailsApi(Protocol):
    """Sends e-mails."""

    async def welcome(self, user_id: str, name: str, address: str) -> None:
        """Welcome somebody who has confirmed the address."""
        ...

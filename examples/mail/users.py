"""Writes users, and what is to be sent for them, in one transaction."""

from __future__ import annotations

import time
from uuid import uuid4

from sqlalchemy import Engine, update
from sqlalchemy.orm import Session

from examples.mail.contracts import EmailsApi, UserCreated
from examples.mail.tables import User
from rpcq import Client
from rpcq.outbox import Outbox


class Users:
    """Those who have signed up.

    Args:
        engine: the database. Who opens `outbox` has a relay, which sends what is written; until then, it waits there.

    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.outbox = Outbox(engine)
        self._emails = Client().bind(EmailsApi)  # names the job, and knows its parameters; it is never opened

    def sign_up(self, name: str, address: str) -> str:
        """Write a user, and the event; returns the ID of the user."""
        user = User(id=uuid4().hex, name=name, address=address, created=time.time())
        with Session(self.engine) as db, db.begin():
            db.add(user)
            self.outbox.publish(db, UserCreated(user_id=user.id, name=name, address=address))
            return user.id

    def confirm(self, user_id: str) -> bool:
        """Note that a user has confirmed the address, and have the welcome sent, once; returns whether there is one.

        The ID is the code: only who has got the e-mail knows it.
        """
        with Session(self.engine) as db, db.begin():
            mark = update(User).where(User.id == user_id, User.confirmed.is_(False)).values(confirmed=True)
            user = db.scalars(mark.returning(User)).one_or_none()
            if user is None:  # there is none, or it is confirmed
                return db.get(User, user_id) is not None
            self.outbox.send(db, self._emails.welcome, user_id=user.id, name=user.name, address=user.address)
            return True

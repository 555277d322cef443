"""A mail server with one postbox for everybody. It speaks SMTP, and has the moods of real servers.

| it answers | to |
|---|---|
| 550 no such user | `nobody...@`, until somebody gives it an account |
| 450 greylisted | `busy...@`, the first two times |
| 451 too many messages | whoever sends more than 12 in a second |

What it has answered with 250 is in the database of `MAIL_POSTBOX`, whatever becomes of the server.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sqlite3
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from email import message_from_bytes
from email.policy import default
from pathlib import Path

from aiosmtpd.smtp import SMTP, Envelope, Session

MOST = 12
"""Messages that the server takes in a second."""

GREYLISTED = 2
"""Times that it asks a sender to come again, for an address that begins with `busy`."""

TABLES = """
create table if not exists messages
  (number integer primary key, id text not null, address text not null, subject text not null, at real not null);
create table if not exists accounts (address text primary key);
"""


@dataclass(frozen=True)
class Mail:
    """An e-mail in the postbox. What has the same Message-ID is one e-mail, as most mailboxes see it."""

    id: str
    address: str
    subject: str
    times: int


class Postbox:
    """What the mail server has taken.

    Args:
        path: the file of its database; None for the one of `MAIL_POSTBOX`.

    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or Path(os.environ.get("MAIL_POSTBOX", "postbox.sqlite"))
        with closing(self._connect()) as db:
            db.execute("pragma journal_mode = wal")
            db.executescript(TABLES)

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=20, isolation_level=None)

    def add(self, message_id: str, address: str, subject: str) -> None:
        """Keep a message. It is on disk when this returns."""
        with closing(self._connect()) as db:
            row = (message_id, address, subject, time.time())
            db.execute("insert into messages (id, address, subject, at) values (?, ?, ?, ?)", row)

    def mails(self) -> Sequence[Mail]:
        """All e-mails, the oldest first."""
        with closing(self._connect()) as db:
            rows = db.execute(
                "select id, address, subject, count(*) from messages group by id, address order by min(number)"
            )
            return [Mail(*row) for row in rows]

    def most_in_a_second(self) -> int:
        """The most messages that came within one second."""
        with closing(self._connect()) as db:
            times = [at for (at,) in db.execute("select at from messages order by at")]
        return max((sum(1 for at in times[number:] if at < since + 1) for number, since in enumerate(times)), default=0)

    def give_account(self, address: str) -> None:
        """Give an address that does not exist an account."""
        with closing(self._connect()) as db:
            db.execute("insert or ignore into accounts values (?)", (address,))

    def knows(self, address: str) -> bool:
        """Whether there is an account for an address."""
        if not address.startswith("nobody"):
            return True
        with closing(self._connect()) as db:
            return db.execute("select 1 from accounts where address = ?", (address,)).fetchone() is not None


class Moods:
    """Answers to SMTP's commands, as aiosmtpd asks for them."""

    def __init__(self, postbox: Postbox) -> None:
        self.postbox = postbox
        self._tries: Counter[str] = Counter()
        self._recent: deque[float] = deque(maxlen=MOST)

    async def handle_RCPT(  # noqa: N802 - aiosmtpd's name
        self, _server: SMTP, _session: Session, envelope: Envelope, address: str, _options: list[str]
    ) -> str:
        """Take or refuse a recipient."""
        if not self.postbox.knows(address):
            return "550 no such user"
        if address.startswith("busy") and self._tries[address] < GREYLISTED:
            self._tries[address] += 1
            return "450 greylisted, come again"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, _server: SMTP, _session: Session, envelope: Envelope) -> str:  # noqa: N802 - the same
        """Take a message."""
        now = time.monotonic()
        if len(self._recent) == MOST and now < self._recent[0] + 1:
            return "451 too many messages"
        self._recent.append(now)
        assert isinstance(envelope.content, bytes)  # noqa: S101 - it is, unless one asks aiosmtpd to decode it
        message = message_from_bytes(envelope.content, policy=default)
        for address in envelope.rcpt_tos:
            self.postbox.add(str(message["Message-ID"]).strip("<>"), address, str(message["Subject"]))
        return "250 OK"


async def serve(postbox: Postbox, host: str, port: int) -> asyncio.Server:
    """Begin to serve; 0 is any free port."""
    loop = asyncio.get_running_loop()
    moods = Moods(postbox)
    return await loop.create_server(lambda: SMTP(moods, loop=loop, hostname="postbox.example"), host, port)


async def _run(host: str, port: int) -> None:
    async with await serve(Postbox(), host, port) as server:
        await server.serve_forever()


def main() -> int:
    """Run the command, until SIGTERM or Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m examples.mail.postbox")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8025, help="port to listen on (default: 8025)")
    asked = parser.parse_args()
    try:
        asyncio.run(_run(asked.host, asked.port))
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())

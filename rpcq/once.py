"""Effects that happen once: the interface between what runs jobs and what has their keys in a database. Pure.

A handler with `once` runs inside a transaction that also has the key of its job. If the transaction is committed, the
job is done; if it is not, nothing has happened. A worker that gets the same job again
finds the key, and does not run it.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, AbstractContextManager
from enum import Enum, auto
from typing import Any, NamedTuple, Protocol, runtime_checkable


class GivenSession(Protocol):
    """What an inbox gives to a handler, as type checkers see it: senders leave that parameter out.

    It has what a `Session` and an `AsyncSession` of SQLAlchemy have, and few other types.
    """

    def expunge_all(self) -> None:
        """See SQLAlchemy."""

    def in_nested_transaction(self) -> bool:
        """See SQLAlchemy."""


class OnceKey(NamedTuple):
    """Under which key something is done once.

    Attributes:
        consumer: who does it, such as the job `emails.welcome`.
        key: its idempotency key.
        fingerprint: hash of the name and the parameters, to tell apart different jobs with one key.

    """

    consumer: str
    key: str
    fingerprint: bytes


class Found(Enum):
    """Why a handler does not begin."""

    DONE = auto()
    """Its key is there: it is done."""
    OTHER = auto()
    """Its key is there, of something else that is done."""
    HELD = auto()
    """Another transaction is about to do it, or its worker was lost and the database does not know that yet."""
    FAILED = auto()
    """The database could not say."""


class NotBegun(Exception):
    """The handler did not begin, and nothing has happened."""

    def __init__(self, found: Found) -> None:
        super().__init__(found.name.lower())
        self.found = found


class NotCommitted(Exception):
    """The handler returned, and the commit failed: it is not known whether it is done."""


@runtime_checkable
class Once(Protocol):
    """Gives handlers a transaction that has the key of their job."""

    def gives(self, label: str, annotation: Any, *, is_async: bool) -> bool:
        """Whether a parameter with this annotation gets the session.

        Args:
            label: the job's name in texts of errors.
            annotation: the parameter's.
            is_async: whether the handler is an `async def`.

        """

    def missing(self, *, is_async: bool) -> str:
        """What is wrong with a handler that has no such parameter, as the rest of a sentence."""

    def open(self, key: OnceKey) -> AbstractAsyncContextManager[Any]:
        """Begin a transaction that has the key; commit it at the end of the block, unless that raises.

        It gives the session. Raises `NotBegun` before the block, and `NotCommitted` after it.
        """

    def open_blocking(self, key: OnceKey) -> AbstractContextManager[Any]:
        """The same for a `def` handler, in its thread."""

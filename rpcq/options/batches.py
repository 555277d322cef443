"""How calls are gathered for a handler that takes a list."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from rpcq.errors import ConfigurationError
from rpcq.options.checks import check_count

LONGEST_WAIT: Final = 60.0
"""Seconds that a call may wait for others, at most."""


@dataclass(frozen=True, slots=True)
class Batch:
    """How a worker gathers calls of one method for a handler that takes lists: a handler batch.

    A batch begins as soon as there are `max_size` calls, or when the first of them has waited for `max_wait`; but not
    while `max_concurrency` batches of the method run: then the calls wait, and the next batch is larger.

    Attributes:
        max_size: the most calls in one batch. It cannot be larger than the worker's `prefetch`, which limits the calls
            of a service that a worker holds.
        max_wait: seconds that a call waits for others, from 0 to 60. With 0, calls go together that a worker begins in
            the same iteration of its event loop.
        max_concurrency: the most batches of the method that one worker runs at once.

    Raises:
        ConfigurationError: a value is not valid; the message names it.

    """

    max_size: int = 32
    max_wait: float = 0.005
    max_concurrency: int = 1

    def __post_init__(self) -> None:
        check_count("max_size", self.max_size, 1, 65_535)
        wait = self.max_wait
        if isinstance(wait, bool) or not isinstance(wait, int | float) or not 0 <= wait <= LONGEST_WAIT:
            msg = f"max_wait must be a number of seconds from 0 to {LONGEST_WAIT:g}; got {wait!r}"
            raise ConfigurationError(msg)
        check_count("max_concurrency", self.max_concurrency, 1, 65_535)

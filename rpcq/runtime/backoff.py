"""Pauses between tries: the more tries, the longer, up to a limit."""

from __future__ import annotations

import random


class Backoff:
    """The pauses before one try after another, in seconds.

    Args:
        first: the first pause.
        longest: what none of them exceeds.
        factor: how many times longer each is than the one before.

    """

    def __init__(self, first: float, longest: float, factor: float = 2.0) -> None:
        self._first = self._next = first
        self._longest = longest
        self._factor = factor

    def pause(self) -> float:
        """The next pause."""
        pause = self._next
        self._next = min(pause * self._factor, self._longest)
        return pause

    def jittered(self) -> float:
        """The next pause with full jitter: a random part of it, so that programs which fail together retry apart."""
        return full_jitter(self.pause())

    def reset(self) -> None:
        """Begin with the first pause again."""
        self._next = self._first


class OutageBackoff:
    """The pauses of many tries at once of one thing that is out, such as a database, with full jitter, in seconds.

    Tries that fail while the pause of an earlier failure lasts say nothing new: they do not make the next pause longer.

    Args:
        first: the longest pause after the first failure.
        longest: what none of them exceeds.

    """

    def __init__(self, first: float, longest: float) -> None:
        self._backoff = Backoff(first, longest)
        self._pause = 0.0
        self._until = -float("inf")

    def jittered(self, now: float) -> float:
        """The pause after a failure at this time, of a clock that never goes back."""
        if now >= self._until:
            self._pause = self._backoff.pause()
            self._until = now + self._pause
        return full_jitter(self._pause)

    def reset(self) -> None:
        """A try succeeded: begin with the first pause again."""
        self._backoff.reset()
        self._until = -float("inf")


def full_jitter(longest: float) -> float:
    """A random pause of at most `longest` seconds."""
    return random.uniform(0, longest)  # noqa: S311 - spread, not secrecy

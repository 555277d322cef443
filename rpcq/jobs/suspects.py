"""Suspects: jobs that came back too often. Each runs with no other job beside it, and the others wait meanwhile.

Those of ordered lanes stay where they are, so whatever else the worker holds comes back with them when one kills it. So
their turns are in another order each time (`outcomes.turn_of`): who comes after the culprit once, comes before it next.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from rpcq.jobs.outcomes import turn_of

if TYPE_CHECKING:
    from rpcq.jobs.run import JobRun


class Suspects:
    """The suspects of a worker that run or wait, and the jobs that wait for them.

    While there are any (`bool`), no other job may begin.

    Args:
        running: the jobs whose handlers run.
        begin: begins a job. It may be settled at once, without a run.
        none_left: called when other jobs may begin.

    """

    def __init__(
        self, running: Collection[JobRun], begin: Callable[[JobRun], None], none_left: Callable[[], None]
    ) -> None:
        self._running = running
        self._begin = begin
        self._none_left = none_left
        self._suspects: deque[JobRun] = deque()  # each waits until nothing runs, and nothing begins before it
        self._held: deque[JobRun] = deque()

    def __bool__(self) -> bool:
        return bool(self._suspects)

    def add(self, run: JobRun) -> None:
        """Take a suspect, and begin it if nothing runs."""
        at = 1 if self._suspects and self._suspects[0] in self._running else 0
        turn = turn_of(run.job)
        while at < len(self._suspects) and turn_of(self._suspects[at].job) <= turn:
            at += 1
        self._suspects.insert(at, run)
        self.go_on()

    def hold(self, run: JobRun) -> None:
        """Take a job that waits for the suspects."""
        run.since = time.monotonic()
        self._held.append(run)

    def go_on(self) -> None:
        """Begin the next suspect if nothing runs; without suspects, begin what they held up."""
        if self._suspects:
            if not self._running:
                run = self._suspects[0]
                self._begin(run)
                if run not in self._running:  # it was settled without a run, or has ended
                    self.ended(run)
            return
        while self._held and not self._suspects:
            self._begin(self._held.popleft())
        self._none_left()

    def ended(self, run: JobRun) -> None:
        """Begin all that one suspect held up before the next one: RabbitMQ bounds how long a delivery may be held."""
        if self._suspects and self._suspects[0] is run:
            self._suspects.popleft()
            held, self._held = self._held, deque()
            for each in held:
                self._begin(each)
            self.go_on()

    def take_held(self, since: float) -> list[JobRun]:
        """Take out the jobs that have waited for suspects since then, or longer."""
        found = [run for run in self._held if run.since <= since]
        for run in found:
            self._held.remove(run)
        return found

    def take_waiting(self) -> list[JobRun]:
        """Take out all jobs that wait to begin."""
        waiting = [run for run in (*self._suspects, *self._held) if run not in self._running]
        self._suspects = deque(run for run in self._suspects if run in self._running)
        self._held.clear()
        return waiting

"""How many worker processes run, by how many jobs wait. Pure: `rpcq.cli.supervising` starts and stops them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from rpcq.errors import ConfigurationError
from rpcq.options import check_seconds

MOST: Final = 1000
"""The most processes of one supervisor."""

LOOKS: Final = 6
"""Looks in a row that find too few jobs for all processes, before one of them is stopped."""

_PROCESSES: Final = re.compile(r"(\d{1,4})(?::(\d{1,4}))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Processes:
    """The option `--processes`.

    Attributes:
        least: the processes that always run.
        most: the most processes that run.

    """

    least: int
    most: int

    @property
    def is_range(self) -> bool:
        """Whether the number of processes may change."""
        return self.least < self.most


def read_processes(text: str) -> Processes:
    """Read `--processes`: a number, or a range, such as "1:8".

    Raises:
        ConfigurationError: it is neither.

    """
    if (found := _PROCESSES.fullmatch(text)) is not None:
        processes = Processes(int(found[1]), int(found[2] or found[1]))
        if 1 <= processes.least <= processes.most <= MOST and (found[2] is None or processes.is_range):
            return processes
    msg = (
        f"--processes must be a number from 1 to {MOST}, or a range MIN:MAX of them with MIN below MAX, such as 1:8; "
        f"got {text!r}"
    )
    raise ConfigurationError(msg)


def check_scaling(processes: Processes, depth: int | None, every: float, *, reload: bool) -> None:
    """Check the options of scaling against each other.

    Raises:
        ConfigurationError: one is missing, not valid, or cannot be used with another one.

    """
    if depth is not None and depth < 1:
        raise ConfigurationError(f"--scale-on-depth must be a number of jobs, at least 1; got {depth}")
    if depth is not None and not processes.is_range:
        msg = f"--scale-on-depth needs a range of processes: --processes 1:8; got --processes {processes.least}"
        raise ConfigurationError(msg)
    if processes.is_range and depth is None:
        msg = (
            "a range of processes needs the number of waiting jobs for each of them: --scale-on-depth 100; "
            f"got --processes {processes.least}:{processes.most} alone"
        )
        raise ConfigurationError(msg)
    if processes.is_range and reload:
        raise ConfigurationError("--reload cannot be used with a range of processes: give one number to --processes")
    check_seconds("--scale-every", every)


@dataclass(frozen=True, slots=True)
class Change:
    """A change of the number of processes.

    Attributes:
        before: how many processes there were to be.
        after: how many there are to be now.
        waiting: how many jobs wait.
        reason: why, for the log.

    """

    before: int
    after: int
    waiting: int
    reason: str


class Scaling:
    """Decides how many processes are to run.

    There are more at once when more than `depth` jobs wait for each process: as many as it takes for `depth` jobs each.
    There is one less after `LOOKS` looks in a row that find no more jobs than one process less is to have. Between the
    two is a gap of `depth` jobs, so a small change of the depth changes nothing.

    Args:
        processes: the bounds. The least is the first number.
        depth: the number of waiting jobs for each process.

    """

    def __init__(self, processes: Processes, depth: int) -> None:
        self.bounds = processes
        self.processes = processes.least
        self._depth = depth
        self._fewer = 0

    def look(self, waiting: int | None) -> Change | None:
        """Decide after one look at the queues; None for no change.

        Args:
            waiting: how many jobs wait; None if that is not known, which changes nothing.

        """
        now = self.processes
        wanted = now if waiting is None else min(-(-waiting // self._depth), self.bounds.most)
        if waiting is None or wanted >= now or now == self.bounds.least:
            self._fewer = 0
        if waiting is None:
            return None
        if wanted > now:
            return self._change(wanted, waiting, f"{waiting} jobs wait: more than {self._depth} for each process")
        if wanted < now and now > self.bounds.least:
            self._fewer += 1
            if self._fewer == LOOKS:
                self._fewer = 0
                most = self._depth * (now - 1)
                return self._change(now - 1, waiting, f"at {LOOKS} looks in a row, no more than {most} jobs waited")
        return None

    def _change(self, after: int, waiting: int, reason: str) -> Change:
        change = Change(self.processes, after, waiting, reason)
        self.processes = after
        return change

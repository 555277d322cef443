"""What one generator of load is to do, and when its calls are due. Pure."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import pydantic


@dataclass(frozen=True, slots=True)
class Phase:
    """A span of time in which the rate goes from one value to another, in a straight line.

    Attributes:
        first: calls a second at its beginning.
        last: calls a second at its end.
        seconds: how long it is.

    """

    first: float
    last: float
    seconds: float

    @property
    def calls(self) -> float:
        """How many are due in it."""
        return (self.first + self.last) / 2 * self.seconds

    def due(self, number: float) -> float:
        """Seconds from its beginning until so many calls have come due."""
        slope = (self.last - self.first) / self.seconds
        if number <= 0:
            return 0.0
        if abs(slope) < 1e-9:
            return number / self.first
        # first * t + slope * t**2 / 2 = number; the root that does not cancel where the slope is small.
        root = math.sqrt(max(0.0, self.first**2 + 2 * slope * number))
        return 2 * number / (self.first + root)


@dataclass(frozen=True, slots=True)
class Plan:
    """What one of several generators does.

    Attributes:
        target: `service.method`.
        number: which it is, from 0.
        processes: how many there are; each makes its share.
        url: the broker's, where it runs in a process of its own; so is the next.
        namespace: of the service.
        checks: the target is the built-in echo, which is called with a nonce.
        args: parameters by position.
        params: parameters by name.
        lines: parameters by name of each call in turn, instead; from a file.
        payload: bytes of text that each call of the built-in echo carries.
        timeout: seconds that each call has.
        idempotent: whether the calls say so.
        warm_up: seconds of load before it counts.
        phases: the rates of the open model, for all processes together; empty for the closed one.
        arrivals: whether calls are due at even distances, or at random ones as of independent callers.
        seed: of the random ones.
        concurrency: callers of the closed model, for all processes together.
        calls: how many the closed model makes after warm-up, for all processes together; None for as many as there is
            time for.
        seconds: how long the closed model lasts; None for until `calls` are made.
        in_flight: calls that may be under way at once in this process; the open model drops what would be more.

    """

    target: str
    number: int = 0
    processes: int = 1
    url: str = ""
    namespace: str = "rpcq"
    checks: bool = False
    args: tuple[Any, ...] = ()
    params: dict[str, Any] = field(default_factory=dict)
    lines: tuple[dict[str, Any], ...] = ()
    payload: int = 0
    timeout: float = 30.0
    idempotent: bool = False
    warm_up: float = 1.0
    phases: tuple[Phase, ...] = ()
    arrivals: Literal["constant", "poisson"] = "constant"
    seed: int = 0
    concurrency: int = 0
    calls: int | None = None
    seconds: float | None = None
    in_flight: int = 100_000

    @property
    def own_concurrency(self) -> int:
        """Callers of this process."""
        return _share(self.concurrency, self.number, self.processes)

    @property
    def own_calls(self) -> float:
        """Calls that this process makes after warm-up, in the closed model."""
        return math.inf if self.calls is None else _share(self.calls, self.number, self.processes)

    @property
    def own_seconds(self) -> float:
        """How long it measures, in the closed model."""
        return math.inf if self.seconds is None else self.seconds

    def due(self) -> Iterator[float]:
        """When the calls of this process are due: seconds from the beginning of warm-up, which has the first rate."""
        phases = self.phases
        if self.warm_up:
            first = phases[0].first or phases[0].last
            phases = (Phase(first, first, self.warm_up), *phases)
        chance = random.Random(f"{self.seed}/{self.number}")  # noqa: S311 - no secret, and to be had again
        at, begins, before = self.number + 0.5, 0.0, 0.0
        if self.arrivals == "poisson":
            at = chance.expovariate(1.0 / self.processes)
        for phase in phases:
            while at < before + phase.calls:
                yield begins + phase.due(at - before)
                # One unit is one call of all processes; constant ones take turns.
                at += 1.0 * self.processes if self.arrivals == "constant" else chance.expovariate(1.0 / self.processes)
            before += phase.calls
            begins += phase.seconds

    def to_json(self) -> bytes:
        """For `read_plan` in another process."""
        return pydantic.TypeAdapter(Plan).dump_json(self)


def read_plan(text: bytes) -> Plan:
    """A plan from its JSON."""
    return pydantic.TypeAdapter(Plan).validate_json(text)


def _share(whole: int, number: int, processes: int) -> int:
    return whole // processes + (number < whole % processes)

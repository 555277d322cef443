"""The plan of one load generator, and when its calls are due. Pure."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import pydantic


@dataclass(frozen=True, slots=True)
class Phase:
    """A span of time in which the rate changes linearly from one value to another.

    Attributes:
        first: calls a second at the beginning.
        last: calls a second at the end.
        seconds: length of the phase.

    """

    first: float
    last: float
    seconds: float

    @property
    def calls(self) -> float:
        """The number of calls that are due in this phase."""
        return (self.first + self.last) / 2 * self.seconds

    def due(self, number: float) -> float:
        """Seconds from the beginning of the phase until `number` calls are due."""
        slope = (self.last - self.first) / self.seconds
        if number <= 0:
            return 0.0
        if abs(slope) < 1e-9:
            return number / self.first
        # first * t + slope * t**2 / 2 = number. This form of the root keeps its precision when the slope is small.
        root = math.sqrt(max(0.0, self.first**2 + 2 * slope * number))
        return 2 * number / (self.first + root)


@dataclass(frozen=True, slots=True)
class Plan:
    """What one of several generators does.

    It has more than 15 fields because a user sets each of them on its own.

    Attributes:
        target: the method to call, as `service.method`, or the job to send.
        url: URL of the broker. It is only read when the generator is a process of its own, as `namespace` is.
        namespace: namespace of the service.
        args: parameters by position.
        params: parameters by name.
        lines: parameters by name of each call in turn, from a file; used instead of `args` and `params`.
        payload: bytes of text that each call of the built-in echo carries.
        timeout: seconds that each call may take, or each job until it is done.
        idempotent: whether the calls are marked as idempotent.
        warm_up: seconds of load before measuring begins.
        phases: rates of the open model, for all generators together; empty in the closed model.
        arrivals: "constant" for calls at even distances, "poisson" for random ones, as independent callers make them.
        seed: seed of the random arrivals.
        concurrency: callers of the closed model, for all generators together.
        calls: calls that the closed model makes after warm-up, for all generators together; None for no limit.
        seconds: how long the closed model runs; None for until `calls` are made.
        in_flight: calls that may be under way at once in this generator; the open model drops the calls above it.
        processes: number of generators; each makes its share of the calls.
        number: number of this generator, from 0.
        checks: whether the target is the built-in echo, which gets a nonce.
        is_job: whether the target is a job, which is sent and watched; the fields say "call" for either.

    """

    target: str
    url: str = ""
    namespace: str = "rpcq"
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
    processes: int = 1
    number: int = 0
    checks: bool = False
    is_job: bool = False

    @property
    def own_concurrency(self) -> int:
        """Callers of this generator."""
        return _share(self.concurrency, self.number, self.processes)

    @property
    def own_calls(self) -> float:
        """Calls that this generator makes after warm-up, in the closed model."""
        return math.inf if self.calls is None else _share(self.calls, self.number, self.processes)

    @property
    def own_seconds(self) -> float:
        """Seconds that this generator measures, in the closed model."""
        return math.inf if self.seconds is None else self.seconds

    def due(self) -> Iterator[float]:
        """When each call of this generator is due, in seconds since warm-up began. Warm-up has the first rate."""
        phases = self.phases
        if self.warm_up:
            first = phases[0].first or phases[0].last
            phases = (Phase(first, first, self.warm_up), *phases)
        chance = random.Random(f"{self.seed}/{self.number}")  # noqa: S311 - not a secret; has to be reproducible
        at, begins, before = self.number + 0.5, 0.0, 0.0
        if self.arrivals == "poisson":
            at = chance.expovariate(1.0 / self.processes)
        for phase in phases:
            while at < before + phase.calls:
                yield begins + phase.due(at - before)
                # The unit of `at` is one call of all generators; with constant arrivals, generators take turns.
                at += 1.0 * self.processes if self.arrivals == "constant" else chance.expovariate(1.0 / self.processes)
            before += phase.calls
            begins += phase.seconds

    def to_json(self) -> bytes:
        """The plan as JSON, for `read_plan` in another process."""
        return pydantic.TypeAdapter(Plan).dump_json(self)


def read_plan(text: bytes) -> Plan:
    """A plan from its JSON."""
    return pydantic.TypeAdapter(Plan).validate_json(text)


def _share(whole: int, number: int, processes: int) -> int:
    return whole // processes + (number < whole % processes)

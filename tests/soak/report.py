"""What a run comes to, for people: what struck, what callers were told, what was held, what broke the oracle."""

from __future__ import annotations

import asyncio
import gc
import platform
from collections import Counter
from dataclasses import dataclass, field

import psutil

from soak.faults import Strikes
from soak.stage import Stage
from support.load import Ledger, WorkerProcess

EXPLAINED = 10
"""Violations that are told with all that is known of them."""


@dataclass
class Held:
    """What a process holds."""

    memory: float
    files: int
    tasks: int | None = None
    pending: int | None = None

    @classmethod
    def by(cls, process: WorkerProcess) -> Held:
        found = psutil.Process(process.pid)
        return cls(found.memory_info().rss / 1e6, found.num_fds())

    @classmethod
    def here(cls, stages: list[Stage]) -> Held:
        gc.collect()
        found = psutil.Process()
        pending = sum(stage.client.in_flight for stage in stages)
        return cls(found.memory_info().rss / 1e6, found.num_fds(), len(asyncio.all_tasks()), pending)

    def __str__(self) -> str:
        more = "" if self.tasks is None else f", {self.tasks} tasks, {self.pending} calls pending"
        return f"{self.memory:.1f} MB, {self.files} file descriptors{more}"


@dataclass
class Report:
    """What came of a run."""

    head: str
    strikes: Strikes
    held: dict[str, list[Held]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    told: Counter[str] = field(default_factory=Counter)
    taken: int = 0
    seconds: float = 0.0

    def note(self, who: str, held: Held) -> Held:
        self.held.setdefault(who, []).append(held)
        return held

    def say(self) -> None:
        say(f"\n{self.head}, Python {platform.python_version()}\n")
        struck = self.strikes.counts
        say(
            f"{self.told.total()} calls in {self.seconds:.0f} s, {self.told.total() / self.seconds:.0f} a second; "
            f"{struck.total()} faults; {len(self.problems)} violations of the oracle\n"
        )
        say(f"{self.taken} requests or copies of them were taken by consumers that are not rpcq's\n")
        say("| what callers were told | calls |\n|---|---|")
        for kind, count in self.told.most_common():
            say(f"| {kind.replace('/', ', executed ')} | {count} |")
        say("\n| fault | times |\n|---|---|")
        for kind, count in sorted(struck.items()):
            say(f"| {kind.replace('_', ' ')} | {count} |")
        say("\n| holds | at the start | ... | at the end |\n|---|---|---|---|")
        for who, held in self.held.items():
            say(f"| {who} | {held[0]} | {held[1] if len(held) > 2 else ''} | {held[-1]} |")
        for problem in self.problems:
            say(f"\nVIOLATION: {problem}")


def explained(stage: Stage, ledger: Ledger, violations: list[str], strikes: Strikes) -> list[str]:
    """Violations, with what is known of the calls: what was told and when, when and where it ran, what struck then."""
    times = stage.scene.folder / "times"
    ran = times.read_text("ascii").splitlines() if times.exists() else []
    found = []
    for violation in violations[:EXPLAINED]:
        nonce = violation.split()[0]
        key = nonce.rpartition(".")[0] or nonce  # of a call that has a key, all calls of that
        told = [line for line in ledger.lines() if line[0] == nonce or line[0].rpartition(".")[0] == key]
        lines = [f"{stage.scene.queue_type}: {violation}", *(f"told: {' '.join(line)}" for line in told)]
        lines += [f"ran: {line}" for line in ran if line.split()[0] in {line[0] for line in told}]
        if told:
            began, ended = min(float(line[3]) for line in told), max(float(line[4]) for line in told)
            struck = strikes.between(began - 1, ended + 1, stage.scene.queue_type)
            lines += [f"struck: {one.name} from {one.began:.3f} to {one.ended:.3f}" for one in struck]
        found.append("\n    ".join(lines))
    return found + [f"{stage.scene.queue_type}: {violation}" for violation in violations[EXPLAINED:]]


def say(text: str) -> None:
    print(text, flush=True)

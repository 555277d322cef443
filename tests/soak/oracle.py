"""What calls of one idempotency key are held to, where the workers share a store of answers.

Of all requests of a key, one runs to its end, and all results are that of this one. The key of a run that failed, which
its handler writes down as such, is free again; that of a run whose worker was lost is not. Besides, each call is held
to what every call is held to: of a call that was told `no`, no request of its own has run.
"""

from __future__ import annotations

from collections import Counter, defaultdict

from support.load import Ledger


class KeyLedger(Ledger):
    """What callers were told who call several times under one key; the key and the result are the last columns."""

    def verdict(self, ran: Counter[str]) -> list[str]:
        violations = list(self.violations)
        if self.ended != self.begun:
            violations.append(f"{self.begun - self.ended} calls have not ended")
        entered, failed = _by_key(ran)
        results: dict[str, set[str]] = defaultdict(set)
        keys = set()
        for call, _, told, _, _, key, result in self.lines():
            keys.add(key)
            own = entered[key].count(call)
            executed = "yes" if told == "result" else told.partition("/")[2]
            if own > 1:
                violations.append(f"{call} ran {own} times; it ended as {told}")
            if executed == "no" and own:
                violations.append(f"{call} ended as {told}, and ran")
            if executed == "yes" and not entered[key]:
                violations.append(f"{call} ended as {told}, and no call of its key ran")
            if told == "result":
                results[key].add(result)
                if result not in entered[key]:
                    violations.append(f"{call} got the result of {result}, which did not run")
        for key in keys:
            runs = entered[key]
            if len(runs) - len(failed[key]) > 1:
                violations.append(f"{runs[-1]} ran though its key had: {runs}, of which failed: {failed[key]}")
            if len(results[key]) > 1:
                violations.append(f"{runs[-1]} and others of its key got different results: {sorted(results[key])}")
        return violations


def _by_key(ran: Counter[str]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The calls of each key that were entered, and those that failed then, from the lines that handlers wrote."""
    entered: dict[str, list[str]] = defaultdict(list)
    failed: dict[str, list[str]] = defaultdict(list)
    for line, times in ran.items():
        what, _, which = line.partition(" ")
        if what in {"key", "failed"}:
            key, call = which.split()
            (entered if what == "key" else failed)[key].extend([call] * times)
    return entered, failed

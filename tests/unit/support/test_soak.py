"""The soak's own parts: its oracle sees what is wrong, and its store of answers keeps the rules of one."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

from rpcq.results import Claim, StoredResult
from soak.oracle import KeyLedger
from soak.store import Server, SharedAnswers, Trouble
from support.load import Ledger


def told(ledger: Ledger, *calls: tuple[str, str, str], idempotent: bool = False) -> None:
    """Enter calls: each with its nonce, what was told, and more."""
    for nonce, what, more in calls:
        ledger.begun += 1
        ledger.wrote(nonce, idempotent=idempotent, told=what, began=0.0, more=more)


def keyed(tmp_path: Path, ran: list[str], *calls: tuple[str, str]) -> list[str]:
    """The verdict on calls of the key `k`: each with its number, and what was told or whose result that was."""
    with closing(KeyLedger(tmp_path / "told")) as ledger:
        for number, what in calls:
            kind, result = ("result", what) if what.startswith("k.") else (what, "-")
            told(ledger, (number, kind, f"k {result}"))
        return ledger.verdict(Counter(ran))


def test_calls_of_a_key_of_which_one_ran_and_all_have_its_result_are_right(tmp_path: Path) -> None:
    assert keyed(tmp_path, ["k.0", "key k k.0"], ("k.0", "k.0"), ("k.1", "k.0"), ("k.2", "OutcomeUnknown/maybe")) == []


def test_a_key_whose_run_failed_is_free_again(tmp_path: Path) -> None:
    ran = ["key k k.0", "failed k k.0", "key k k.1"]
    assert keyed(tmp_path, ran, ("k.0", "RemoteError/yes"), ("k.1", "k.1")) == []


@pytest.mark.parametrize(
    ("ran", "calls"),
    [
        (["key k k.0", "key k k.1"], [("k.0", "k.0"), ("k.1", "OutcomeUnknown/maybe")]),
        (["key k k.0", "failed k k.0", "key k k.1", "key k k.2"], [("k.1", "k.1")]),
        (["key k k.0", "key k k.0"], [("k.0", "k.0")]),
        (["key k k.0"], [("k.0", "ServiceUnavailable/no")]),
        ([], [("k.0", "CallTimeout/yes")]),
        ([], [("k.0", "k.0")]),
        (["key k k.0"], [("k.0", "k.0"), ("k.1", "k.1")]),
    ],
    ids=[
        "two ran",
        "two ran after one that failed",
        "one ran twice",
        "a no ran",
        "a yes did not run",
        "a result of nothing",
        "results differ",
    ],
)
def test_calls_of_a_key_that_break_a_rule_are_violations(
    tmp_path: Path, ran: list[str], calls: list[tuple[str, str]]
) -> None:
    assert keyed(tmp_path, ran, *calls)


@pytest.mark.parametrize(
    ("what", "idempotent", "times", "wrong"),
    [
        ("result", False, 1, False),
        ("result", False, 0, True),
        ("result", False, 2, True),
        ("result", True, 3, False),
        ("result", True, 4, True),
        ("MethodNotFound/no", False, 0, False),
        ("MethodNotFound/no", False, 1, True),
        ("CallTimeout/yes", False, 0, True),
        ("OutcomeUnknown/maybe", False, 0, False),
        ("OutcomeUnknown/maybe", False, 1, False),
        ("OutcomeUnknown/maybe", False, 2, True),
    ],
)
def test_each_call_is_held_to_what_ran(tmp_path: Path, what: str, idempotent: bool, times: int, wrong: bool) -> None:
    with closing(Ledger(tmp_path / "told")) as ledger:
        told(ledger, ("n", what, ""), idempotent=idempotent)
        assert bool(ledger.verdict(Counter(["n"] * times))) is wrong


def test_a_call_that_does_not_end_is_a_violation(tmp_path: Path) -> None:
    with closing(Ledger(tmp_path / "told")) as ledger:
        ledger.begun += 1
        assert ledger.verdict(Counter()) == ["1 calls have not ended"]


async def test_of_many_who_claim_a_key_at_once_one_gets_it(tmp_path: Path) -> None:
    server = Server(random.Random(1))
    path = str(tmp_path / "store")
    async with await asyncio.start_unix_server(server.serve, path):
        workers = [SharedAnswers(path) for _ in range(3)]
        found = await asyncio.gather(*(workers[n % 3].claim("k", f"owner-{n}", 9.0) for n in range(30)))
        assert Counter(found) == {Claim.TAKEN: 1, Claim.HELD: 29}
        answer = StoredResult(b"\x00\xff", '"ü"'.encode())
        await workers[0].put("k", answer)
        assert [await one.claim("k", "another", 9.0) for one in workers] == [answer] * 3
        for one in workers:
            one.close()


@pytest.mark.parametrize(
    ("trouble", "error", "was_done"),
    [
        (Trouble(refuses=1.0), OSError, False),
        (Trouble(refuses=1.0, error="CancelledError"), asyncio.CancelledError, False),
        (Trouble(hangs_up=1.0), EOFError, False),
        (Trouble(forgets_to_say=1.0), EOFError, True),
    ],
)
async def test_a_store_in_trouble_does_what_it_is_told(
    tmp_path: Path, trouble: Trouble, error: type[BaseException], was_done: bool
) -> None:
    server = Server(random.Random(1))
    path = str(tmp_path / "store")
    async with await asyncio.start_unix_server(server.serve, path):
        worker = SharedAnswers(path)
        server.trouble = trouble
        with pytest.raises(error):
            await worker.claim("k", "one", 9.0)
        server.trouble = Trouble()
        assert await worker.claim("k", "other", 9.0) is (Claim.HELD if was_done else Claim.TAKEN)
        worker.close()

"""Keys of jobs: none is that of another job or of a call, and a worker remembers the last ones."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpcq.calls.admission import key_of as key_of_call
from rpcq.jobs.keys import ENTRY, Remembered, key_of
from rpcq.jobs.outcomes import Again, Dead, of_done, of_key
from rpcq.results import Claim, StoredResult
from rpcq.wire.jobs import JobMessage
from rpcq.wire.requests import Request

services = st.from_regex(r"[A-Za-z0-9_.-]{1,5}", fullmatch=True)
names = st.from_regex(r"[A-Za-z0-9_-]{1,5}", fullmatch=True)
users = st.sampled_from(["", "a", "a/b", "@", "job:work", "=a"]) | st.text(max_size=5)
texts = st.sampled_from(["k", "/k", "job:work/k", "@a/k", "s/job:work/k"]) | st.text(min_size=1, max_size=8)


def job(**fields: Any) -> JobMessage:
    return JobMessage(**{"id": "7", "name": "work", "body": b"{}", "key": "k", **fields})


one = st.tuples(services, names, users, texts)


@given(one, one)
def test_only_the_same_job_of_the_same_user_has_the_same_key(first: Any, second: Any) -> None:
    keys = [key_of(service, job(name=name, user=user, key=key)) for service, name, user, key in (first, second)]
    assert (keys[0] == keys[1]) is (first == second)


@given(one, services, users, st.none() | users, texts)
def test_no_call_has_the_key_of_a_job(sent: Any, service: str, user: str, scope: str | None, key: str) -> None:
    own, name, whose, job_key = sent
    request = Request(correlation_id=b"c", reply_to=b"r", method="work", idempotency_key=key, user=user)
    assert key_of(own, job(name=name, user=whose, key=job_key)) != key_of_call(request, service, scope)


def test_a_worker_remembers_the_last_keys_and_whether_the_parameters_were_the_same() -> None:
    remembered = Remembered(100 * ENTRY)
    for number in range(1000):
        remembered.put(f"k{number}", b"%d" % number)
    assert all(remembered.get(f"k{number}", b"%d" % number) is True for number in range(950, 1000))
    assert remembered.get("k999", b"other") is False
    assert remembered.get("k0", b"0") is None
    assert sum(remembered.get(f"k{number}", b"%d" % number) is not None for number in range(1000)) <= 100


@pytest.mark.parametrize("size", [1, ENTRY, 2 * ENTRY])
def test_a_small_memory_remembers_little_and_grows_no_more(size: int) -> None:
    remembered = Remembered(size)
    for number in range(10):
        remembered.put(f"k{number}", b"")
    assert sum(remembered.get(f"k{number}", b"") is not None for number in range(10)) <= max(0, size // ENTRY)


@pytest.mark.parametrize("found", [Claim.TAKEN, Claim.LAPSED])
def test_a_job_whose_key_is_free_or_that_of_a_lost_worker_runs(found: Claim) -> None:
    assert of_key(job(), found, b"f") is None


def test_what_a_store_has_says_what_becomes_of_a_job() -> None:
    held = of_key(job(attempt=2), Claim.HELD, b"f")
    assert held is not None
    assert isinstance(held.fate, Again)
    assert (held.fate.attempts, held.fate.unknown, held.fate.steps > 0) == (0, 0, True)
    done = of_key(job(), StoredResult(b"f", b"null"), b"f")
    assert done is not None
    assert done.fate is None
    other = of_key(job(attempt=2), StoredResult(b"g", b"null"), b"f")
    assert other is not None
    assert isinstance(other.fate, Dead)
    assert (other.fate.reason, other.fate.executed) == ("invalid", "yes")


def test_other_parameters_under_a_key_that_is_done_are_not_lost() -> None:
    assert of_done(job(), same=True) is None
    assert of_done(job(), same=False) == Dead(
        "invalid", "no", "its idempotency key is that of a job that is done, with other parameters"
    )

"""What is remembered, and what is forgotten first."""

from __future__ import annotations

from rpcq.results import OVERHEAD, MemoryResults, StoredResult, fingerprint


def answer(size: int = 0) -> StoredResult:
    return StoredResult(b"f", b"x" * size)


async def test_what_is_put_is_remembered_under_its_key() -> None:
    answers = MemoryResults(10_000)
    await answers.put("a", answer(1))
    await answers.put("b", answer(2))
    assert (await answers.get("a"), await answers.get("b"), await answers.get("c")) == (answer(1), answer(2), None)


async def test_what_was_not_asked_for_longest_is_forgotten_first() -> None:
    answers = MemoryResults(3 * (OVERHEAD + 1))  # a key of one character each
    for key in "abc":
        await answers.put(key, answer())
    await answers.get("a")
    await answers.put("d", answer())
    assert [key for key in "abcd" if await answers.get(key)] == ["a", "c", "d"]


async def test_large_answers_take_the_room_of_several_small_ones() -> None:
    answers = MemoryResults(10 * OVERHEAD + 10)
    for key in "abcdefgh":
        await answers.put(key, answer())
    await answers.put("large", answer(8 * OVERHEAD))
    assert [key for key in "abcdefgh" if await answers.get(key)] == ["h"]
    assert await answers.get("large")


async def test_a_long_key_takes_its_room() -> None:
    answers = MemoryResults(3 * OVERHEAD)
    for letter in "ab":
        await answers.put(letter * OVERHEAD, answer())
    assert [letter for letter in "ab" if await answers.get(letter * OVERHEAD)] == ["b"]


async def test_one_that_is_larger_than_all_the_room_is_not_kept() -> None:
    answers = MemoryResults(10 * OVERHEAD)
    await answers.put("large", answer(10 * OVERHEAD))
    assert len(answers) == 0
    await answers.put("small", answer())
    assert await answers.get("small")


async def test_a_key_that_is_put_again_takes_room_once() -> None:
    answers = MemoryResults(2 * (OVERHEAD + 1) + 5)
    for size in range(6):
        await answers.put("a", answer(size))
    await answers.put("b", answer())
    assert (await answers.get("a"), await answers.get("b")) == (answer(5), answer())


async def test_no_room_remembers_nothing() -> None:
    answers = MemoryResults(0)
    await answers.put("a", answer())
    assert await answers.get("a") is None


def test_calls_differ_by_method_and_parameters() -> None:
    assert fingerprint("add", b"[1]") == fingerprint("add", b"[1]")
    assert len({fingerprint("add", b"[1]"), fingerprint("add", b"[2]"), fingerprint("sub", b"[1]")}) == 3

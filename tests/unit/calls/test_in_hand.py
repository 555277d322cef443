"""Requests in hand."""

from __future__ import annotations

from typing import Any

import pytest

from rpcq.calls.admission import MayHaveRun
from rpcq.calls.in_hand import CallRun
from rpcq.calls.slots import Slots

ANY: Any = None
LOST = MayHaveRun("the worker that held the call was lost")


@pytest.mark.parametrize(
    ("reads_batches", "may_have_run", "has_ended", "may_go"),
    [
        (True, None, False, True),
        (False, None, False, False),  # its client might not send it again
        (True, LOST, False, False),  # its result may be stored
        (True, None, True, False),  # its place is in use until its turn
    ],
)
def test_what_may_be_refused_although_it_could_begin_later(
    reads_batches: bool, may_have_run: MayHaveRun | None, has_ended: bool, may_go: bool
) -> None:
    run = CallRun(ANY, Slots(10, batching=True), ANY, (b"reply", b"id"), may_have_run)
    run.reads_batches = reads_batches
    run.invocation = None if has_ended else object()  # type: ignore[assignment]
    assert run.may_go_elsewhere is may_go

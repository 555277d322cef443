"""The soak of outbox and inbox, for a minute: that it runs, and finds nothing. `make soak-outbox` has the whole one."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from soak.stage import environment

SECONDS = 300
"""On a machine that does much else meanwhile."""


@pytest.mark.long
@pytest.mark.timeout(SECONDS + 10)
def test_kills_of_all_parts_lose_no_order_double_none_and_send_nothing_that_was_rolled_back() -> None:
    soak = subprocess.run(
        [sys.executable, "-m", "soak.outbox", "--orders", "1500", "--kills", "8", "--minutes", "4"],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        env=environment(),
    )
    told = soak.stdout + soak.stderr  # with its seed, by which it strikes the same way again
    assert soak.returncode == 0, told
    assert re.search(r"\n\d+ orders in .*; 8 kills .* 0 violations of the oracle\n", told), told

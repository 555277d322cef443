"""The soak, for less than a minute in all: that it runs, and finds nothing. `make soak` gives it the time it wants."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from soak.stage import environment

MINUTES = "0.2"
"""Of faults; besides, its broker has to start, and what was lost to come back."""
SECONDS = 180
"""On a machine that does much else meanwhile."""


@pytest.mark.long
@pytest.mark.timeout(SECONDS + 10)
def test_a_while_of_faults_under_load_leaves_no_violation() -> None:
    soak = subprocess.run(
        [sys.executable, "-m", "soak", "--minutes", MINUTES],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        env=environment(),
    )
    told = soak.stdout + soak.stderr  # with its seed, by which it strikes the same way again
    assert soak.returncode == 0, told
    assert re.search(r"\n[0-9]{4,} calls in .* [1-9][0-9]* faults; 0 violations of the oracle\n", told), told

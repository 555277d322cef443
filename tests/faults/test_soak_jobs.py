"""The soak of jobs, for less than a minute: that it runs, and finds nothing. `make soak-jobs` has the whole one."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from soak.stage import environment

SECONDS = 480
"""On a machine that does much else meanwhile; doubles may wait for half of it (`soak.jobs.DOUBLES`)."""


@pytest.mark.long
@pytest.mark.timeout(SECONDS + 10)
def test_kills_poison_and_a_restart_lose_no_job_and_bury_no_innocent() -> None:
    arguments = ("--jobs", "3000", "--kills", "3", "--poison", "1", "--hang", "1", "--minutes", "3")
    soak = subprocess.run(
        [sys.executable, "-m", "soak.jobs", *arguments],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        env=environment(),
    )
    told = soak.stdout + soak.stderr  # with its seed, by which it strikes the same way again
    assert soak.returncode == 0, told
    assert re.search(r"\n3000 jobs in .* 3 random kills, .* 1 restart .* 0 violations of the oracle\n", told), told
    assert re.search(r"\ndead: 2 jobs in ", told), told

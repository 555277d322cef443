"""The soak, for half a minute: that it runs, and finds nothing. `make soak` gives it the time that it wants."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).resolve().parents[1] / "soak.py"
SECONDS = 180
"""Its broker has to start, and what was lost to come back; half a minute is that of the faults."""


@pytest.mark.long
@pytest.mark.timeout(SECONDS + 10)
def test_half_a_minute_of_faults_under_load_leaves_no_violation() -> None:
    soak = subprocess.run(
        [sys.executable, SOAK, "--minutes", "0.5"], capture_output=True, text=True, timeout=SECONDS, check=False
    )
    told = soak.stdout + soak.stderr  # with its seed, by which it strikes the same way again
    assert soak.returncode == 0, told
    assert re.search(r"\n[0-9]{4,} calls in .* [1-9][0-9]* faults; 0 violations of the oracle\n", told), told

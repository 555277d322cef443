"""The soak, for half a minute: that it runs, and finds nothing. `make soak` gives it the time that it wants."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).resolve().parents[1] / "soak.py"
SECONDS = 180.0
"""Its broker has to start, and what was lost to come back; half a minute is that of the faults."""


@pytest.mark.long
async def test_half_a_minute_of_faults_under_load_leaves_no_violation() -> None:
    soak = await asyncio.create_subprocess_exec(
        sys.executable, SOAK, "--minutes", "0.5", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    async with asyncio.timeout(SECONDS):
        told = (await soak.communicate())[0].decode()
    assert soak.returncode == 0, told  # with its seed, by which it strikes the same way again
    assert re.search(r"\n[0-9]{4,} calls in .* [1-9][0-9]* faults; 0 violations of the oracle\n", told), told

"""A crowd at the shop, as `make example-black-friday` sends it; a worker of payment is killed in the middle of it.

The oracle: orders that customers were told are taken = orders in the books = orders settled, none is charged twice.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.producers import ROOT, environment

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

ORDERS = 150


def test_a_crowd_is_served_and_the_books_add_up_though_a_worker_is_killed(
    vhost: str, namespace: str, database_url: str, tmp_path: Path
) -> None:
    database = database_url.replace("postgresql://", "postgresql+asyncpg://", 1)
    report = tmp_path / "report.html"
    asked = (
        *("--orders", str(ORDERS), "--seconds", "5", "--takes", "0.5", "--processes", "1:3", "--others", "1:2"),
        *("--depth", "20", "--prefetch", "4", "--webs", "2", "--kill", "4", "--patience", "600"),
    )
    ran = subprocess.run(
        [sys.executable, "-m", "examples.black_friday", *asked, "--report", str(report)],
        cwd=ROOT,
        env=environment(vhost) | {"SHOP_DATABASE": database, "RPCQ_NAMESPACE": namespace},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    taken = re.search(r"(\d+) orders taken, as many settled: none is lost, and no card was charged twice", ran.stdout)
    lost = re.search(r"(\d+) lost their connection", ran.stdout)
    assert taken is not None
    assert lost is not None
    assert ORDERS - int(lost[1]) <= int(taken[1]) <= ORDERS, ran.stdout
    assert "killed worker" in ran.stdout
    numbers = [int(it) for it in re.findall(r"processes: (\d+) of payment", ran.stdout)]
    assert max(numbers) == 3, ran.stdout  # the backlog called for more workers
    text = report.read_text("utf-8")
    assert "1 worker killed" in text
    assert "nothing was measured" not in text

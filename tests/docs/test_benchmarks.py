"""The benchmark of jobs runs, finds figures, and leaves nothing at the broker. Tests do not have its peers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.broker import Broker, vhost_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.long
def test_the_benchmark_of_jobs_measures_the_floor_and_rpcq(broker: Broker, tmp_path: Path) -> None:
    url, file = broker.vhost(), tmp_path / "found.json"
    arguments = ("--only", "floor,rpcq,rpcq-each", "--rounds", "1", "--seconds", "0.05", "--jobs", "300")
    try:
        ran = subprocess.run(
            [sys.executable, "-m", "benchmarks.jobs", *arguments, "--json", file],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            env=os.environ | {"RPCQ_URL": url},
        )
        assert ran.returncode == 0, ran.stderr
        assert "empty jobs, run by one worker" in ran.stdout
        results = json.loads(file.read_text())["results"]
        assert [*results] == ["floor", "rpcq", "rpcq-each"]
        for found in results.values():
            rates = [*found["rate"].values(), found["run_rate"]]
            assert all(rate > 0 for (rate,) in rates)
        if broker.can_ctl:
            vhost = vhost_of(url)
            for kind in ("queues", "exchanges"):
                assert "rpcq-bench-" not in broker.ctl(f"list_{kind}", "--vhost", vhost, "name")
    finally:
        broker.drop_vhost(url)

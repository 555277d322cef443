"""The benchmarks of calls and of jobs run, find figures, and leave nothing at the broker. Tests have no peers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import foreign
from benchmarks.processes import BenchmarkError
from support import programs
from support.broker import Broker, vhost_of
from support.foreign import unavailable

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


@pytest.mark.long
def test_the_benchmark_of_peers_measures_rpcq_and_a_program_in_c(broker: Broker, tmp_path: Path) -> None:
    url, file = broker.vhost(), tmp_path / "found.json"
    arguments = ("--only", "rpcq,rpcq-single,rabbitmq-c", "--in-flight", "1,50", "--rounds", "1", "--seconds", "0.05")
    try:
        ran = subprocess.run(
            [sys.executable, "-m", "benchmarks.peers", *arguments, "--prefetch", "100", "--json", file],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            env=os.environ | {"RPCQ_URL": url},
        )
        assert ran.returncode == 0, ran.stderr
        report = json.loads(file.read_text())
        if why := report["about"]["missing"].get("rabbitmq-c"):
            unavailable(why)
        found = {(it["in_flight"], it["contender"]): it["rounds"] for it in report["results"]}
        assert [*found] == [(count, name) for count in (1, 50) for name in ("rpcq", "rpcq-single", "rabbitmq-c")]
        assert all(only["calls_per_second"] > 0 and only["p50_ms"] > 0 for (only,) in found.values())
        assert report["about"]["prefetch"] == 100
        assert "rabbitmq-c" in report["about"]["packages"]
        if broker.can_ctl:
            for kind in ("queues", "exchanges"):
                assert "rpcq-bench-" not in broker.ctl(f"list_{kind}", "--vhost", vhost_of(url), "name")
    finally:
        broker.drop_vhost(url)


async def test_contenders_that_cannot_be_had_are_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "can_apt_install", lambda: False)
    monkeypatch.setattr(foreign, "NATS_SERVER", programs.Program(("rpcq-nonesuch",), "nonesuch"))
    monkeypatch.setattr(foreign, "PACKAGES", {"grpc.aio": ("rpcq_nonesuch.aio",)})
    url = "amqps://guest:guest@localhost/"
    async with foreign.all_grounds(("rpcq", "nats-py", "grpc.aio", "rabbitmq-c"), url) as (grounds, missing):
        assert [*grounds] == ["rpcq"]
    assert missing["nats-py"] == "none of rpcq-nonesuch is on the PATH: install nonesuch (of Debian and Ubuntu)"
    assert "rpcq_nonesuch.aio is not installed: pip install '.[peers]'" in missing["grpc.aio"]
    assert "measured over amqp://, not amqps://" in missing["rabbitmq-c"]


async def test_a_benchmark_without_any_contender_says_why() -> None:
    with pytest.raises(BenchmarkError, match=r"no contender to measure\nwithout rabbitmq-c: the program has no TLS"):
        async with foreign.all_grounds(("rabbitmq-c",), "amqps://localhost/"):
            pass


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("amqp://localhost", "amqp://guest:guest@localhost:5672/%2F"),
        ("amqp://a%40b:c%2Fd@one:5673,two/some%2Fvhost", "amqp://a%40b:c%2Fd@one:5673/some%2Fvhost"),
    ],
)
def test_a_program_gets_the_url_with_all_its_parts(given: str, wanted: str) -> None:
    assert foreign.url_for_programs(given) == wanted

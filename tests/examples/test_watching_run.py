"""The shop under a real Prometheus, as `make example-watching` runs it: all of its processes are watched."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from examples.shop.setup import NAMES
from examples.watching.__main__ import STOP_SECONDS
from support.dashboards import Prometheus
from support.ports import free_ports
from support.producers import ROOT, SECONDS, environment

pytestmark = [pytest.mark.long, pytest.mark.timeout(400)]


def until(condition: Callable[[], bool]) -> None:
    while True:
        try:
            if condition():
                return
        except OSError:  # Prometheus is starting
            pass
        time.sleep(0.5)


@contextmanager
def run(*arguments: str, url: str, **more: str) -> Iterator[subprocess.Popen[bytes]]:
    """The example, which stops its ten processes at the end, and takes its time for that on a busy machine."""
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment(url) | more)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS + SECONDS)
        finally:
            process.kill()


def neighbours(number: int) -> int:
    """The first of so many ports in a row that are free, by all that is known."""
    while True:
        (first,) = free_ports(1)
        if first + number < 65_000:
            return first


def test_each_process_of_the_shop_is_watched_and_its_dead_letters_are_seen(
    vhost: str, namespace: str, prometheus: str, tmp_path: Path
) -> None:
    shop, port, metrics = *free_ports(2), neighbours(len(NAMES) + 2)
    command = ("-m", "examples.watching", "--port", str(shop), "--prometheus", str(port), "--metrics", str(metrics))
    asked = Prometheus(f"http://127.0.0.1:{port}")
    path = str(Path(prometheus).parent)

    def jobs(query: str) -> set[str]:
        return {it["metric"]["job"] for it in asked.now(query)}

    with run(*command, "--every", "1", "--rate", "8", url=vhost, RPCQ_NAMESPACE=namespace, PATH=path) as running:
        everybody = {*NAMES, "desk", "customers", "web"}
        until(lambda: jobs("up == 1") == everybody)
        until(lambda: jobs("rpcq_worker_jobs_ended_total > 0") == {*NAMES, "desk"})
        until(lambda: {"web", "payment"} <= jobs("rpcq_outbox_sent_total > 0"))
        until(lambda: bool(asked.now('rpcq_queue_messages{kind="dead", service="desk"} > 0')))
        until(lambda: bool(asked.now('rpcq_queue_consumers{kind="events", service="payment"} > 0')))
        assert {it["name"] for group in asked.ask("rules")["groups"] for it in group["rules"]} >= {"RpcqSubscriberLost"}
        assert running.poll() is None
    assert running.returncode == 0  # all ended in time, none was killed

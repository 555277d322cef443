"""`rpcq outbox` as a real process, and the metrics."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from sqlalchemy import text

from rpcq import ConfigurationError
from rpcq.outbox import Outbox, relay
from rpcq.outbox.databases import engine_from
from rpcq.outbox.tables import dead as dead_table
from rpcq.outbox.tables import outbox as rows_table
from rpcq.outbox.watching import OutboxMetrics
from support.load import until
from support.places import Place
from support.ports import free_ports
from support.stores import Store

pytestmark = pytest.mark.parametrize(
    "driver", [pytest.param("psycopg", marks=pytest.mark.long), "sqlite3"], indirect=True
)


def rpcq(store: Store, *arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "rpcq", "outbox", *arguments],
        env={**os.environ, "RPCQ_DATABASE": store.url.render_as_string(hide_password=False), "COLUMNS": "300"},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.long
async def test_setup_makes_the_tables_and_status_counts_the_rows(store: Store, outbox: Outbox) -> None:
    for table in ("rpcq_outbox", "rpcq_outbox_dead", "rpcq_inbox"):
        store.do(lambda connection, table=table: connection.execute(text(f"drop table {table}")))
    assert "run `rpcq outbox setup`" in rpcq(store, "status", code=1)
    rpcq(store, "setup")
    rpcq(store, "setup")  # again does nothing
    assert json.loads(rpcq(store, "status", "--json")) == {
        "waiting": 0, "oldest": None, "retried": 0, "later": 0, "dead": 0
    }  # fmt: skip
    later = outbox.with_options(delay=3600)
    await store.write(lambda db: [outbox.send(db, "a.b"), outbox.send(db, "a.b"), later.send(db, "a.b")])
    found = json.loads(rpcq(store, "status", "--json"))
    assert 0 <= found.pop("oldest") < 60
    assert found == {"waiting": 2, "retried": 0, "later": 1, "dead": 0}
    assert "waiting" in rpcq(store, "status")


@pytest.mark.long
async def test_dead_rows_are_listed_retried_and_deleted(
    store: Store, outbox: Outbox, home: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "UNROUTABLE_PAUSES", ())
    async with outbox:
        await store.write(lambda db: [outbox.send(db, f"nobody.work{number}", number) for number in range(3)])
        await until(lambda: store.count(dead_table) == 3)
    lines = [json.loads(line) for line in rpcq(store, "dead", "--json").splitlines()]
    assert [line["label"] for line in lines] == ["nobody.work0", "nobody.work1", "nobody.work2"]
    assert [line["body"] for line in lines] == ["0", "1", "2"]
    assert {line["reason"] for line in lines} == {"unroutable"}
    assert "no queue takes jobs of service" in rpcq(store, "dead")
    assert "1 rows go back" in rpcq(store, "dead", "--retry", "--yes", "--id", str(lines[1]["id"]))
    assert [row[2] for row in store.asked(rows_table.select())] == ["nobody.work1"]
    assert "2 rows are deleted" in rpcq(store, "dead", "--delete", "--yes")
    assert store.count(dead_table) == 0
    assert "must not be given both" in rpcq(store, "dead", "--retry", "--delete", code=2)


async def test_the_metrics_have_the_rows_and_the_age_of_the_oldest(store: Store, outbox: Outbox, home: Place) -> None:
    registry = CollectorRegistry()
    await store.write(lambda db: [outbox.send(db, "a.b"), outbox.send(db, "a.b")])
    async with OutboxMetrics(outbox, registry, every=0.05):
        await until(lambda: b'rpcq_outbox_rows{state="waiting"} 2.0' in generate_latest(registry))
        text_ = generate_latest(registry).decode()
        assert 'rpcq_outbox_rows{state="dead"} 0.0' in text_
        age = next(line for line in text_.splitlines() if line.startswith("rpcq_outbox_oldest_seconds "))
        assert 0 <= float(age.split()[1]) < 60
        store.do(lambda connection: connection.execute(text("alter table rpcq_outbox rename to away")))
        await until(lambda: b"rpcq_outbox_rows{" not in generate_latest(registry))  # no old numbers
        store.do(lambda connection: connection.execute(text("alter table away rename to rpcq_outbox")))
    assert not generate_latest(registry)


async def test_a_relay_as_a_program_sends_serves_its_metrics_and_ends_on_sigterm(
    store: Store, rabbitmq_url: str, namespace: str
) -> None:
    (port,) = free_ports(1)
    box = Outbox(store.engine, rabbitmq_url, namespace=namespace)
    await store.write(lambda db: box.send(db, "nobody.work"))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "rpcq", "outbox", "relay", "--http", f"127.0.0.1:{port}"),
        env={
            **os.environ,
            "RPCQ_DATABASE": store.url.render_as_string(hide_password=False),
            "RPCQ_URL": rabbitmq_url,
            "RPCQ_NAMESPACE": namespace,
        },
    )

    def scraped(path: str = "metrics") -> str:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=5) as answer:
                return answer.read().decode()
        except OSError:
            return ""

    try:
        await until(lambda: "rpcq_outbox_retried_total 1.0" in scraped(), seconds=40)
        assert scraped("readyz") == "ok\n"
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 20) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def test_bad_urls_of_databases_are_refused(driver: Any, tmp_path: Path) -> None:
    for url, match in (
        ("nonsense", "a URL such as postgresql://"),
        ("mysql+nothere://x", "cannot be used"),
        ("sqlite://", "in a file"),
    ):
        with pytest.raises(ConfigurationError, match=match):
            engine_from(url)
    assert engine_from("postgres://h/d").dialect.driver == "psycopg"
    assert engine_from("postgresql+asyncpg://h/d").dialect.driver == "psycopg"
    assert engine_from(f"sqlite+aiosqlite:///{tmp_path}/a.db").dialect.driver == "pysqlite"

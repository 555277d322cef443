"""The dashboard for Grafana: what its file says, and what its queries give of a real run in a real Prometheus."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from rpcq import Client, DomainError, Event, GiveUp, RemoteError, Retry, Service, Worker, outbox
from rpcq.observability.metrics import Metrics
from rpcq.observability.queues import QueueWatch
from rpcq.observer import Observer
from rpcq.outbox import Outbox
from rpcq.outbox.watching import OutboxMetrics
from support.dashboards import DASHBOARD, Prometheus, draw, expanded, queries, read
from support.ports import free_ports

ROOT = Path(__file__).parents[3]
OBSERVE = ROOT / "docker/observe"
UNITS = {"bytes", "none", "ops", "percentunit", "reqps", "s", "short"}
"""Units of Grafana's that the dashboard may use: https://github.com/grafana/grafana, valueFormats/categories.ts."""

NOTHING_WENT_WRONG = {"Sessions that went down", "Workers that were lost: jobs and events"}
"""Queries that give nothing in a run in which no connection and no worker is lost."""


def panels() -> list[dict[str, Any]]:
    return [it for it in read()["panels"] if it["type"] != "row"]


# What the file says.


def test_each_panel_has_what_grafana_needs() -> None:
    dashboard = read()
    assert dashboard["schemaVersion"] >= 39
    assert dashboard["id"] is None  # Grafana gives it one
    assert len({it["id"] for it in dashboard["panels"]}) == len(dashboard["panels"])
    for panel in panels():
        assert panel["type"] in ("stat", "timeseries"), panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
        refs = [it["refId"] for it in panel["targets"]]
        assert refs == sorted(set(refs))
        assert all(it["datasource"] == panel["datasource"] and it["legendFormat"] for it in panel["targets"])


def test_panels_do_not_overlap() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in read()["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        for place in ((x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])):
            assert place not in taken, (panel["title"], taken[place])
            taken[place] = panel["title"]


def test_the_variables_are_those_that_the_queries_use() -> None:
    dashboard = read()
    names = {it["name"] for it in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z]\w*)", json.dumps(dashboard)))
    assert used == names == {"datasource", "service"}


def test_each_legend_names_labels_that_its_query_keeps() -> None:
    for query in queries(read()):
        labels = set(re.findall(r"\{\{(\w+)\}\}", query.legend))
        kept = {it.strip() for by in re.findall(r"by \(([^)]*)\)", query.expression) for it in by.split(",")}
        # Without an aggregation, a series keeps all its labels.
        assert labels <= (kept or labels), query


def test_promtool_can_read_every_query(promtool: str, tmp_path: Path) -> None:
    rules = [{"record": f"q{at}", "expr": expanded(it.expression)} for at, it in enumerate(queries(read()))]
    path = tmp_path / "queries.yml"
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    ran = subprocess.run([promtool, "check", "rules", str(path)], text=True, capture_output=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_promtool_finds_no_fault_with_the_configuration_of_compose(promtool: str) -> None:
    command = [promtool, "check", "config", "--syntax-only", str(OBSERVE / "prometheus.yml")]
    ran = subprocess.run(command, text=True, capture_output=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_compose_gives_grafana_and_prometheus_their_files_and_their_addresses() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))["services"]
    for name in ("prometheus", "grafana"):
        mounts = [it.split(":") for it in services[name]["volumes"]]
        assert all((ROOT / source).exists() and mode == "ro" for source, _, mode in mounts)
    inside = dict(it.split(":")[1::-1] for it in services["prometheus"]["volumes"])
    config = yaml.safe_load((OBSERVE / "prometheus.yml").read_text("utf-8"))
    assert set(config["rule_files"]) <= set(inside)
    jobs = {it["job_name"]: it for it in config["scrape_configs"]}
    assert jobs["consumer"]["dns_sd_configs"][0]["names"] == ["consumer"]
    assert services["consumer"]["environment"]["RPCQ_HTTP"] == "${RPCQ_HTTP-:9464}"
    assert jobs["consumer"]["dns_sd_configs"][0]["port"] == 9464
    assert jobs["web"]["static_configs"] == [{"targets": ["web:8000"]}]

    (mount,) = services["grafana"]["volumes"]
    assert mount.split(":")[:2] == ["./docker/observe/grafana", "/etc/grafana/provisioning"]
    provider = yaml.safe_load((DASHBOARD.parent / "rpcq.yml").read_text("utf-8"))["providers"][0]
    assert provider["options"]["path"] == "/etc/grafana/provisioning/dashboards"
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/{DASHBOARD.name}"
    source = yaml.safe_load((OBSERVE / "grafana/datasources/prometheus.yml").read_text("utf-8"))["datasources"][0]
    assert source["url"] == "$PROMETHEUS_URL"
    assert services["grafana"]["environment"]["PROMETHEUS_URL"] == "http://prometheus:9090"
    assert source["jsonData"]["timeInterval"].startswith(config["global"]["scrape_interval"])


# What the queries give.


class OutOfTea(DomainError):
    """No more."""


class TeaSold(Event, name="tea.sold"):
    """Somebody has tea now."""

    count: int


def shop() -> Service:
    service = Service("shop", errors=[OutOfTea])

    @service.method(idempotent=True)
    async def sell(count: int) -> int:
        if count > 5:
            raise OutOfTea
        return count

    @service.job(retry=Retry(max_attempts=2, initial_backoff=0.1))
    async def pack(count: int) -> None:
        if count == 3:
            raise GiveUp("no box")
        if count == 2:
            raise OSError("no paper")

    @service.on(TeaSold)
    async def note(_event: TeaSold) -> None: ...

    return service


@contextmanager
def running(program: str, folder: Path, targets: dict[str, int]) -> Iterator[Prometheus]:
    """A Prometheus that looks at these ports every second."""
    (port,) = free_ports(1)
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(ROOT / "docker/alerts.yml")],
        "scrape_configs": [
            {"job_name": name, "static_configs": [{"targets": [f"127.0.0.1:{at}"]}]} for name, at in targets.items()
        ],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config))
    command = [program, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    log = folder / "prometheus.log"
    with (
        log.open("w") as output,
        subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stderr=output) as process,
    ):
        try:
            yield Prometheus(f"http://127.0.0.1:{port}")
        finally:
            process.terminate()
            process.wait(20)


@asynccontextmanager
async def a_database(path: Path) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(f"sqlite+aiosqlite:///{path}")
    async with engine.begin() as connection:
        await connection.run_sync(outbox.metadata.create_all)
    yield engine
    await engine.dispose()


async def use(client: Client, engine: AsyncEngine, box: Outbox) -> None:
    """All that the dashboard shows, once: calls, jobs, events, and rows; some of them fail."""
    for count in (1, 2):
        assert await client.call("shop.sell", count=count) == count
    with pytest.raises(RemoteError, match="out_of_tea"):
        await client.call("shop.sell", count=7)
    for count in (1, 2, 3):
        await client.send("shop.pack", count=count)
    await client.send("away.do")  # nobody does it
    await client.publish(TeaSold(count=1))
    async with AsyncSession(engine) as db, db.begin():
        box.send(db, "shop.pack", count=1)
        box.with_options(delay=3600).send(db, "shop.pack", count=1)


async def scraped(prometheus: Prometheus, wanted: str) -> None:
    """Wait until a query gives something."""
    while True:
        try:
            if await asyncio.to_thread(prometheus.now, wanted):
                return
        except OSError:  # it is starting
            pass
        await asyncio.sleep(0.2)


@pytest.mark.long
@pytest.mark.timeout(180)
async def test_every_query_of_the_dashboard_gives_data_of_a_real_run(
    prometheus: str, rabbitmq_url: str, namespace: str, tmp_path: Path
) -> None:
    registry, service, away = CollectorRegistry(), shop(), Service("away")
    away.job(name="do")(nothing)
    ProcessCollector(registry=registry)
    metrics = Metrics(registry)
    observers: list[Observer] = [metrics]
    server, thread = start_http_server(0, "127.0.0.1", registry)
    try:
        async with Worker(away, url=rabbitmq_url, namespace=namespace):
            pass  # its queue is there now, and nobody takes from it
        async with (
            a_database(tmp_path / "outbox.sqlite") as engine,
            Worker(service, url=rabbitmq_url, namespace=namespace, observers=observers),
            Client(rabbitmq_url, namespace=namespace, observers=observers) as client,
            Outbox(engine, rabbitmq_url, namespace=namespace) as box,
            OutboxMetrics(box, registry, every=1.0),
        ):
            watch = QueueWatch(
                [service, away],
                rabbitmq_url,
                every=1.0,
                management="",
                namespace=namespace,
                on_depth=metrics.on_depth,
            )
            watching = asyncio.create_task(watch.run())
            with running(prometheus, tmp_path, {"shop": server.server_port}) as asked:
                await scraped(asked, "rpcq_build_info")
                began = time.time()
                for _ in range(4):
                    await use(client, engine, box)
                    await asyncio.sleep(1)
                await scraped(asked, 'rpcq_queue_messages{kind="dead"} >= 8')
                await scraped(asked, 'rpcq_outbox_rows{state="later"} >= 4')
                await use(client, engine, box)
                await asyncio.sleep(2.5)
                found = {it: asked.now(expanded(it.expression, "15s")) for it in queries(read())}
                drawn = draw(read(), asked, began, time.time())
            watching.cancel()
    finally:
        await asyncio.to_thread(server.shutdown)
        server.server_close()
        thread.join()

    for query, series in found.items():
        is_expected = not {query.panel, f"{query.panel}: {query.legend}"} & NOTHING_WENT_WRONG
        assert bool(series) == is_expected, query
    values = {
        (query.panel, tuple(sorted(it["metric"].items()))): float(it["value"][1])
        for query, series in found.items()
        for it in series
    }
    assert values["Dead letters", ()] >= 8
    assert values["Dead letters", (("service", "shop"),)] >= 8
    assert values["Messages that wait", (("queue", f"{namespace}.job.away"),)] == 5
    assert values["Consumers", (("queue", f"{namespace}.job.away"),)] == 0
    assert values["Calls by outcome", (("code", "out_of_tea"),)] > 0
    assert values["Calls that fail", ()] == 0  # it is a regular reply
    assert values["Sessions that are down", ()] == 0
    assert values["Rows by state", (("job", "shop"), ("state", "later"))] == 5
    assert values["Events published", (("event", "tea.sold"), ("heard", "yes"))] > 0
    outcomes = {labels[0][1] for (panel, labels) in values if panel == "Attempts by outcome"}
    assert outcomes == {"done", "retried", "dead"}
    assert drawn.count("no data") == 1  # one plot, of sessions that went down


async def nothing() -> None: ...

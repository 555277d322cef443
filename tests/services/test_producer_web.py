"""The web form of the producer as the program that a user starts, over HTTP."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from support.producers import SECONDS, out, program, run, serving, told, worker


@pytest.fixture(scope="module")
def memory() -> Iterator[httpx.Client]:
    """The producer with no broker, which serves itself."""
    with serving(None, "web") as base, httpx.Client(base_url=base, timeout=SECONDS) as client:
        until_ready(client)
        yield client


def until_ready(client: httpx.Client) -> None:
    deadline = time.monotonic() + SECONDS
    while client.get("/readyz").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def events(response: httpx.Response) -> Iterator[tuple[str, Any]]:
    """The events of a stream: their names and data."""
    name = ""
    for line in response.iter_lines():
        if line.startswith("event:"):
            name = line[6:].strip()
        elif line.startswith("data:"):
            yield name, json.loads(line[5:])


def ran(client: httpx.Client, **asked: Any) -> list[tuple[str, Any]]:
    with client.stream("GET", "/stream", params=asked) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-store"
        return list(events(response))


# For programs.


def test_messages_are_answered_in_their_order(memory: httpx.Client) -> None:
    messages = [f"message {number}" for number in range(300)]
    response = memory.post("/process", json={"messages": messages})
    assert response.status_code == 200
    answers = response.json()["answers"]
    assert [it["message"] for it in answers] == messages
    assert [it["answer"] for it in answers] == [f"Consumer processed: {it}" for it in messages]
    assert all(it["error"] is None and it["latency_ms"] > 0 for it in answers)


def test_a_message_that_takes_too_long_is_an_error_of_its_own(memory: httpx.Client) -> None:
    response = memory.post("/process", json={"messages": ["a"], "delay": 5, "timeout": 0.05})
    assert response.status_code == 200
    (answer,) = response.json()["answers"]
    assert (answer["answer"], answer["error"]["code"]) == (None, "DEADLINE_EXCEEDED")
    assert answer["error"]["title"] == "Timed out"
    assert answer["error"]["executed"] in ("maybe", "yes")  # who was first to notice: this side, or the worker


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({}, ["body", "messages"]),
        ({"messages": []}, ["body", "messages"]),
        ({"messages": ["x"] * 10_001}, ["body", "messages"]),
        ({"messages": ["x" * 1001]}, ["body", "messages", 0]),
        ({"messages": ["x"], "delay": -1}, ["body", "delay"]),
        ({"messages": ["x"], "timeout": 0}, ["body", "timeout"]),
    ],
    ids=["none", "empty", "too-many", "too-long", "delay", "timeout"],
)
def test_what_does_not_fit_is_a_422_that_says_where(memory: httpx.Client, body: Any, where: list[Any]) -> None:
    response = memory.post("/process", json=body)
    assert response.status_code == 422
    assert response.headers["content-type"] == "application/problem+json"
    assert [it["loc"] for it in response.json()["errors"]] == [where]
    assert "xxx" not in response.text


def test_more_bytes_than_all_messages_may_have_are_refused(memory: httpx.Client) -> None:
    response = memory.post("/process", content=b" " * (16 * 1024 * 1024 + 1), headers={"content-type": "text/json"})
    assert response.status_code == 413
    assert response.json()["status"] == 413


def test_one_failed_call_does_not_fail_the_others(url: str, namespace: str) -> None:
    with (
        worker(url, namespace),
        serving(url, namespace) as base,
        httpx.Client(base_url=base, timeout=SECONDS) as client,
    ):
        until_ready(client)
        response = client.post("/process", json={"messages": ["one", "break", "three"]})
        assert response.status_code == 200
        one, broken, three = response.json()["answers"]
        assert (one["answer"], three["answer"]) == ("Consumer processed: one", "Consumer processed: three")
        assert broken["error"] == {"code": "UNKNOWN", "title": "Service failed", "executed": "yes"}
        assert "secret" not in response.text
        found = ran(client, requests=3, message="other")[-1]
        assert found[0] == "done"
        assert (found[1]["mismatched"], found[1]["matched"]) == (3, 0)


def test_where_nobody_serves_it_is_a_503_and_a_failed_stream(url: str, namespace: str) -> None:
    with serving(url, namespace) as base, httpx.Client(base_url=base, timeout=SECONDS) as client:
        until_ready(client)
        response = client.post("/process", json={"messages": ["one", "two"], "timeout": 1})
        assert (response.status_code, response.json()["code"]) == (503, "UNAVAILABLE")
        assert response.headers["content-type"] == "application/problem+json"
        assert "retry-after" in response.headers
        name, why = ran(client, requests=2, timeout=1)[-1]
        assert (name, why["title"]) == ("failed", "No worker took the requests")
        assert why["summary"]["errors"] == {"UNAVAILABLE": 2}
        assert namespace not in response.text + json.dumps(why)


def test_users_who_leave_cancel_their_handlers(url: str, namespace: str) -> None:
    with worker(url, namespace) as lines, serving(url, namespace) as base:
        with httpx.Client(base_url=base, timeout=SECONDS) as client:
            until_ready(client)
            with client.stream(
                "GET", "/stream", params={"requests": 9, "concurrency": 3, "delay": 60, "message": "s"}
            ) as response:
                names = events(response)
                assert next(names)[0] == "begun"
                assert [lines.readline().split()[0] for _ in range(3)] == ["began"] * 3
        assert sorted(told(lines, cancelled=3)) == ["cancelled s 1", "cancelled s 2", "cancelled s 3"]
        with (
            httpx.Client(base_url=base, timeout=httpx.Timeout(SECONDS, read=0.5)) as client,
            pytest.raises(httpx.ReadTimeout),
        ):
            client.post("/process", json={"messages": ["p", "q"], "delay": 60, "timeout": 100})
        found = told(lines, cancelled=2)
        assert {it for it in found if it.startswith("cancelled")} == {"cancelled p", "cancelled q"}


def test_the_worker_can_run_beside_the_app_on_rabbitmq_too(url: str, namespace: str) -> None:
    with (
        serving(url, namespace, "--with-worker") as base,
        httpx.Client(base_url=base, timeout=SECONDS) as client,
    ):
        until_ready(client)
        assert client.post("/process", json={"messages": ["x"]}).json()["answers"][0]["answer"] is not None
        assert client.get("/status").json()["worker"] == "in this process"


# For the page.


def test_a_stream_begins_has_every_answer_once_and_ends_with_the_summary(memory: httpx.Client) -> None:
    found = ran(memory, requests=10_000, concurrency=1000)
    names = [name for name, _ in found]
    assert (names[0], names[-1], set(names[1:-1])) == ("begun", "done", {"answers"})
    ended = [it for _, batch in found[1:-1] for it in batch["ended"]]
    assert sorted(it[0] for it in ended) == list(range(10_000))
    assert {it[3] for it in ended} == {"matched"}
    assert all(len(batch["shown"]) <= 6 for _, batch in found[1:-1])
    summary = found[-1][1]
    assert (summary["sent"], summary["matched"], summary["mismatched"], summary["errors"]) == (10_000, 10_000, 0, {})
    times = summary["latency_ms"]
    assert 0 < times["p50"] <= times["p90"] <= times["p99"] <= times["max"]


@pytest.mark.parametrize("name", ["requests", "concurrency", "delay", "timeout", "message"])
def test_a_stream_that_cannot_be_is_a_422_that_names_the_field(memory: httpx.Client, name: str) -> None:
    response = memory.get("/stream", params={name: "" if name == "message" else "-1"})
    assert response.status_code == 422
    assert [it["loc"] for it in response.json()["errors"]] == [["query", name]]


def test_another_site_cannot_start_a_run(memory: httpx.Client) -> None:
    response = memory.get("/stream", headers={"sec-fetch-site": "cross-site"})
    assert response.status_code == 403
    assert response.headers["content-type"] == "application/problem+json"


def test_the_page_comes_from_here_alone_and_is_asked_for_again(memory: httpx.Client) -> None:
    for path, kind in {
        "/": "text/html",
        "/static/app.js": "text/javascript",
        "/static/plot.js": "text/javascript",
        "/static/app.css": "text/css",
        "/static/icon.svg": "image/svg+xml",
    }.items():
        response = memory.get(path)
        assert response.status_code == 200
        assert response.headers["content-type"].startswith(kind)
        assert response.headers["cache-control"] == "no-cache"
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        assert "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        tag = {"if-none-match": response.headers["etag"]}
        assert memory.get(path, headers=tag).status_code == 304
        assert memory.head(path).status_code == 200
    assert " style=" not in memory.get("/").text
    assert memory.get("/docs").status_code == 404
    assert {"/process", "/stream"} <= memory.get("/openapi.json").json()["paths"].keys()


# For operators.


def test_the_app_has_metrics_of_its_calls_and_of_its_process(memory: httpx.Client) -> None:
    assert memory.post("/process", json={"messages": ["x", "y"]}).status_code == 200
    response = memory.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    lines = response.text.splitlines()
    counted = 'rpcq_client_calls_finished_total{code="OK",method="process",service="echo"} '
    assert sum(float(line.removeprefix(counted)) for line in lines if line.startswith(counted)) >= 2
    assert any(line.startswith("process_cpu_seconds_total ") for line in lines)


def test_an_app_without_its_broker_is_alive_and_not_ready_and_names_no_host() -> None:
    with (
        serving("amqp://me:s3cr3t@127.0.0.1:1/", "away") as base,
        httpx.Client(base_url=base, timeout=SECONDS) as client,
    ):
        assert client.get("/livez").status_code == 200
        ready = client.get("/readyz")
        assert ready.status_code == 503
        assert "broker cannot be reached" in ready.text
        told = client.post("/process", json={"messages": ["x"]})
        assert told.status_code == 503
        name, why = ran(client, requests=5)[0]
        assert (name, why["title"]) == ("failed", "The broker is away")
        for text in (ready.text, told.text, json.dumps(why)):
            assert "127.0.0.1" not in text
            assert "s3cr3t" not in text


def test_sigterm_ends_it_cleanly_also_amid_a_stream() -> None:
    with program("-m", "producer_service", "serve", "--port", "0") as process:
        base = out(process).readline().split()[1]
        with httpx.Client(base_url=base, timeout=SECONDS) as client:
            until_ready(client)
            with client.stream("GET", "/stream", params={"requests": 5, "delay": 60}) as response:
                assert next(events(response))[0] == "begun"
                process.send_signal(signal.SIGTERM)
                assert process.wait(SECONDS) == 0


def test_what_it_cannot_serve_with_is_one_message() -> None:
    for arguments in (("--url", "http://nowhere/"), ("--port", "65536"), ("--prefetch", "0")):
        ran = run("-m", "producer_service", "serve", *arguments, url=None)
        assert (ran.returncode, ran.stdout) == (2, "")
        assert "Traceback" not in ran.stderr
        assert ran.stderr.strip()

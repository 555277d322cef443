"""The wire contract and the code, each held to the other: a change of one alone fails here."""

from __future__ import annotations

import base64
import json
import re
import time
import zlib
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pydantic
import pytest

from rpcq import Client
from rpcq.calls.outcomes import CallEvent, event_of_notice
from rpcq.calls.targets import make_target
from rpcq.contracts import METHOD_NAME
from rpcq.control import JobInfo, MethodInfo, ServiceInfo, SubscriptionInfo, WorkerInfo, WorkerStats
from rpcq.errors import (
    BY_CODE,
    CallError,
    ConfigurationError,
    DomainError,
    InvalidParams,
    RemoteError,
    TooLarge,
    from_wire,
    to_wire,
)
from rpcq.events import subscriptions
from rpcq.jobs import outcomes
from rpcq.options import MAX_HEADERS, NAME, CallOptions, ClientOptions, ConnectionOptions
from rpcq.validation.schemas import make_codec
from rpcq.wire import batches, bodies, control, events, jobs, replies, requests
from rpcq.wire.events import EventTopology
from rpcq.wire.job_queues import JobTopology
from rpcq.wire.properties import Properties, decode, encode
from rpcq.wire.replies import Notice, Reply
from rpcq.wire.topology import EVERY_SERVICE, Exchange, Queue, Topology
from rpcq.wire.values import MAX_DIGITS, NotCarried

DOCS: Final = Path(__file__).parents[2] / "docs"
PAGE: Final = (DOCS / "wire.md").read_text()
NAMES: Final = Topology()


# Reading pages.


def section(page: str, heading: str) -> str:
    """The text under a heading of the second level, up to the next one."""
    text = (DOCS / page).read_text()
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    assert found, f"{page} has no part {heading!r}"
    return found[1]


def rows(text: str, *head: str) -> list[list[str]]:
    """The cells of the table with this head, row by row."""
    lines = text.splitlines()
    at = next((at for at, line in enumerate(lines) if cells(line) == [*head]), None)
    assert at is not None, f"there is no table with the head {head}"
    found = []
    for line in lines[at + 2 :]:
        if not line.startswith("|"):
            break
        found.append(cells(line))
    return found


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def quoted(text: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", text)


# Several replies in one message.


def test_the_example_of_a_message_batch_is_one() -> None:
    part = section("wire.md", "Reply").partition("### Several replies in one message")[2]
    example, _ = re.findall(r"```text\n(.*?)\n```", part, re.DOTALL)
    batch = replies.read_reply(batches.write_properties(b"1"), example.encode(), b"")
    assert isinstance(batch, Reply)
    first, second = batches.read_replies(batch)
    assert (first.correlation_id, first.kind, first.body, first.times) == (b"id-1", b"result", b"3", (0.412, 0.051))
    assert (second.correlation_id, second.kind) == (b"id-2", b"error")
    assert {*json.loads(second.body or b"")} == {"code", "message", "executed", "retryable", "details", "incident"}
    again = [batches.Entry(it.correlation_id, it.kind, *(it.times or ()), it.body or b"") for it in (first, second)]
    assert batches.write_replies(again) == example.encode()


def test_the_example_of_a_message_with_requests_is_one() -> None:
    part = section("wire.md", "Reply").partition("### Several requests in one message")[2]
    (example,) = re.findall(r"```text\n(.*?)\n```", part, re.DOTALL)
    encoder = requests.RequestEncoder("amq.gen-1", "app", batches=True, content_type=b"application/x-ndjson")
    sent = encoder.encode(b"1", requests.REQUESTS, 29_990, 1_700_000_029_990, b"", notify=True)
    found = batches.read_requests(requests.read_request(sent), example.encode())
    assert [(it.correlation_id, it.method, it.timeout_ms, it.deadline_ms, it.idempotency_key) for it, _ in found] == [
        (b"id-1", "add", 30_000, 1_700_000_030_000, None),
        (b"id-2", "add", 29_990, 1_700_000_029_990, "k-7"),
    ]
    assert [json.loads(body) for _, body in found] == [{"x": 1, "y": 2}, {"x": 3, "y": 4}]
    heads = [
        batches.write_head(it.correlation_id, b"add", it.timeout_ms or 0, {key: it.headers[key] for key in own})
        for (it, _), own in zip(found, ([], ["rpcq-idempotency-key"]), strict=True)
    ]
    assert batches.write_requests(heads, [body for _, body in found]) == example.encode()
    said = decode(sent)
    assert f"| `type` | `{(said.type or b'').decode()}` |" in part
    assert f"| `content_type` | `{(said.content_type or b'').decode()}`" in part
    assert f"at most {batches.MAX_BATCH // 1024} KiB" in part
    assert f"over {batches.MAX_ENTRY // 1024} KiB" in part


def test_the_limits_of_a_message_batch_are_those_of_the_contract() -> None:
    part = section("wire.md", "Reply").partition("### Several replies in one message")[2]
    assert re.findall(r"(\d+) KiB", part)[:2] == [str(batches.MAX_BATCH // 1024), str(batches.MAX_ENTRY // 1024)]
    sent = decode(batches.write_properties(b"1"))
    assert (sent.type, sent.content_type) == (b"replies", b"application/x-ndjson")
    assert "| `type` | `replies` |" in part
    assert "| `content_type` | `application/x-ndjson` |" in part


# Requests.


def request(*, method: bytes = b"add", key: str | None = "k", attempt: int = 2, notify: bool = True) -> bytes:
    more = requests.encode_headers(key=key, attempt=attempt, metadata={"x-user": "ada"})
    return requests.RequestEncoder("amq.gen-1", "app", batches=True).encode(
        b"id-1", method, 5000, 1_700_000_005_000, more, notify=notify
    )


def fields_of(text: str) -> tuple[set[str], set[str]]:
    """The properties and the headers that the first column of a table of fields names."""
    properties, headers = set(), set()
    for field, *_ in rows(text, *next(table_heads(text))):
        (headers if field.startswith("header") else properties).update(quoted(field))
    return properties, headers


def table_heads(text: str) -> Any:
    return (tuple(cell.strip() for cell in line.strip("|").split("|")) for line in text.splitlines() if "field" in line)


def test_a_client_sends_no_field_that_the_contract_does_not_have() -> None:
    properties, headers = fields_of(section("wire.md", "Request"))
    sent = decode(request())
    set_here = {it.name for it in fields(Properties) if getattr(sent, it.name) is not None} - {"headers"}
    assert set_here <= properties
    assert {name for name in sent.headers or {} if not name.startswith("x-")} <= headers


def test_every_header_of_rpcq_in_the_contract_is_one_that_is_sent_and_the_other_way_round() -> None:
    request_part, reply_part = section("wire.md", "Request"), section("wire.md", "Reply")
    sent = decode(request()).headers or {}
    replied = decode(replies.ReplyEncoder().encode(replies.RESULT, b"id-1", 1.0, 2.0, 12)).headers or {}
    assert requests.METHOD not in sent  # for other clients
    assert {name for name in fields_of(request_part)[1] if name.startswith("rpcq-")} == {
        name for name in {*sent, requests.METHOD} if name.startswith("rpcq-")
    }
    assert fields_of(reply_part)[1] == set(replied)
    of_jobs = set(re.findall(r"`(rpcq-[a-z-]+)`", section("wire.md", "Jobs") + section("wire.md", "Events")))
    everywhere = set(re.findall(r"`(rpcq-[a-z-]+)`", PAGE))
    assert (
        everywhere - of_jobs
        == {name for name in {*sent, *replied, requests.METHOD} if name.startswith("rpcq-")} - of_jobs
    )


def test_every_header_of_a_job_in_the_contract_is_one_that_is_sent_and_the_other_way_round() -> None:
    said = set(re.findall(r"`(rpcq-[a-z-]+)`", section("wire.md", "Jobs")))
    job = jobs.JobMessage(
        id="7", name="work", body=b"", key="k", attempt=2, first_sent_ms=1, expires_ms=2, due_ms=1, unknown=1, earlier=1
    )
    job.priority = "high"
    job.order_key = "a"
    dead = {jobs.REASON, jobs.EXECUTED, jobs.ERROR, jobs.INCIDENT, jobs.FROM, jobs.DIED_AT}
    assert said == {*(decode(jobs.encode_job(job, 1)).headers or {}), *dead}


def test_every_header_of_an_event_in_the_contract_is_one_that_is_sent_and_the_other_way_round() -> None:
    rows_of = rows(section("wire.md", "Events"), "property", "meaning", "needed")
    said = {name for field, *_ in rows_of if field.startswith("header `") for name in quoted(field)}
    event = jobs.JobMessage(id="7", name="order.created", body=b"", key="k", version=2)
    encoded = events.encode_event(EventTopology("rpcq"), event, 1)
    assert said == {*(decode(encoded.properties).headers or {})}
    assert (encoded.exchange, encoded.routing_key) == (b"rpcq.events", b"order.created")
    properties = {name for field, *_ in rows_of if field.startswith("`") for name in quoted(field)}
    assert properties <= {it.name for it in fields(Properties)}


def test_the_queues_of_a_subscription_are_those_of_the_contract() -> None:
    part, topology = section("wire.md", "Events"), EventTopology("rpcq")
    exchanges = {quoted(name)[0]: kind for name, kind in rows(part, "exchange", "type, arguments")}
    assert {it.name: [it.type, *([it.alternate] if it.alternate else [])] for it in topology.exchanges()} == {
        name: [kind.split(",")[0], *(each for each in quoted(kind) if each.startswith("rpcq."))]
        for name, kind in exchanges.items()
    }
    found = [topology.queue("s", "n", ["order.*"]), topology.suspects("s", "n")]
    for queue, (name, limit, letters, bound) in zip(
        found, rows(part, "queue", "`x-delivery-limit`", "dead-letters to", "bound to"), strict=True
    ):
        assert quoted(name)[0].replace("<service>", "s").replace("<subscription>", "n") == queue.name
        assert queue.arguments["x-delivery-limit"] == int(limit)
        assert {each for each, _ in queue.bindings} == {*quoted(bound)}
        assert letters == "the same" or quoted(letters) == ["rpcq.dead", "sub.<service>:<subscription>"]
        assert queue.arguments["x-dead-letter-routing-key"] == "sub.s:n"
    own = topology.instance_queue(["#"])
    assert (own.arguments["x-max-length"], own.arguments["x-overflow"]) == (100_000, "drop-head")
    assert "`x-max-length` 100000 and `x-overflow` `drop-head`" in part


def test_the_lanes_of_order_keys_are_those_of_the_contract() -> None:
    said = re.findall(r"`([\w-]+)`\s(?:is\s)?in\s`(k[0-9]{2})`", section("wire.md", "Jobs"))
    assert len(said) == 3
    assert {key: f"k{zlib.crc32(key.encode()) % 16:02}" for key, _ in said} == dict(said)
    assert {key: jobs.lane_of(key) for key, _ in said} == dict(said)


def test_every_reason_of_a_dead_letter_is_in_the_contract() -> None:
    (text,) = re.findall(r"\| `rpcq-dead-reason` \| (.+?) \|$", PAGE, re.MULTILINE)
    source = "".join(Path(it.__file__).read_text("utf-8") for it in (outcomes, subscriptions))
    assert {*re.findall(r"`(\w+)`", text)} == {*re.findall(r'Dead\(\s*"(\w+)"', source)}


def test_a_request_asks_for_a_notice_in_the_way_of_the_contract() -> None:
    assert (decode(request()).headers or {})["CC"] == ["amq.gen-1"]
    assert "CC" not in (decode(request(notify=False)).headers or {})


def test_what_the_contract_calls_optional_may_be_left_out() -> None:
    optional = {name for row in rows(section("wire.md", "Request"), "AMQP field", "value", "needed") for name in
                quoted(row[0]) if row[2] == "no"}  # fmt: skip
    assert {"content_type", "expiration", "app_id", requests.DEADLINE, requests.TIMEOUT} <= optional
    found = requests.read_request(encode(Properties(correlation_id=b"id-1", reply_to=b"amq.gen-1", type=b"add")))
    assert not found.problem
    assert (found.deadline_ms, found.timeout_ms, found.attempt, found.idempotency_key) == (None, None, 1, None)


def test_another_content_type_is_refused() -> None:
    assert "a worker refuses any other type, unless it has a codec for it" in PAGE
    assert not requests.read_request(encode(Properties(content_type=b"application/json"))).problem
    assert requests.read_request(encode(Properties(content_type=b"application/msgpack"))).problem
    table = rows(section("wire.md", "Content types"), "property", "read as JSON", "sent by")
    for name, read, _ in table:
        for value in quoted(read):
            kind = b"application/json; charset=" + value.encode() if name.startswith("its") else value.encode()
            field = "content_encoding" if "encoding" in name else "content_type"
            assert not requests.read_request(encode(Properties(**{field: kind}))).problem
    assert {value for name, read, _ in table for value in quoted(read) if name == "`content_type`"} == {
        kind.decode() for kind in bodies._READ_AS_JSON if kind
    }
    refused = section("wire.md", "Content types").partition("With any other type")[2]
    assert quoted(refused)[:3] == ["application/x-python-serialize", "latin-1", "gzip"]
    for properties in (
        Properties(content_type=b"application/x-python-serialize"),
        Properties(content_type=b"application/json; charset=latin-1"),
        Properties(content_encoding=b"gzip"),
    ):
        assert requests.read_request(encode(properties)).problem


def test_headers_have_the_types_of_the_contract() -> None:
    said = {row[0]: row[1] for row in rows(section("wire.md", "Types of headers"), "where", "types")}
    through, direct = (said[key] for key in said if key.startswith("request"))
    for text, notify in ((through, True), (direct, False)):
        kinds = types_of(request(notify=notify))
        assert {*kinds.values()} == {quoted(part)[0] for part in re.split("; ", text)}
        for part in re.split("; ", text):
            kind, *names = quoted(part)
            assert [kinds[name] for name in names if name in kinds] == [kind] * (
                len(names) - (notify and kind == "A")  # its items are `S`
            )
    encoder = replies.ReplyEncoder()
    assert {*types_of(encoder.encode(replies.RESULT, b"1", 1.0, 2.0)).values()} == {"d"}
    assert types_of(encoder.encode(replies.RESULT, b"1", 1.0, 2.0, 12))["rpcq-takes"] == "I"
    assert types_of(batches.write_properties(b"1", 12)) == {"rpcq-takes": "I"}
    assert "`d` (float64); `I`: `rpcq-takes`" in section("wire.md", "Types of headers")
    assert said["any other reply"] == "no headers"
    assert decode(encoder.encode(replies.ERROR, b"1", None, 2.0)).headers is None


def types_of(data: bytes) -> dict[str, str]:
    """The types of the headers, by name, read by hand."""
    at = 3 + data[2]
    end = at + 4 + int.from_bytes(data[at : at + 4], "big")
    at += 4
    found = {}
    while at < end:
        name_end = at + 1 + data[at]
        kind = chr(data[name_end])
        found[data[at + 1 : name_end].decode()] = kind
        at = name_end + 1
        at += (
            {"I": 4, "l": 8, "d": 8, "t": 1}[kind] if kind not in "SA" else 4 + int.from_bytes(data[at : at + 4], "big")
        )
    assert at == end
    return found


def test_values_stand_in_json_as_the_contract_says() -> None:
    said = {row[0]: row for row in rows(section("wire.md", "Values"), "value", "in JSON", "read")}
    everything = bytes(range(256))
    written = bodies.loads(bodies.dumps(everything))
    assert quoted(said["bytes"][1]) == ["-", "_"]
    assert base64.urlsafe_b64decode(written) == everything
    assert set("-_=") < set(written)
    read = make_codec(bytes, "s.m takes", written=False).read
    standard = base64.b64encode(everything).decode()
    assert quoted(said["bytes"][2]) == ["+", "/"]
    for text in (written, standard, written.rstrip("="), standard.rstrip("=")):
        assert read(bodies.dumps(text)) == everything
    for text in ("-/8=", "+_8="):
        with pytest.raises(pydantic.ValidationError):
            read(bodies.dumps(text))
    assert said["integer"][1] == f"its digits, up to {MAX_DIGITS}"
    beyond, within = quoted(said["float"][2])
    with pytest.raises(NotCarried):
        bodies.loads(beyond.encode())
    assert bodies.loads(within.encode()) == 0
    for name in ("SecretStr", "SecretBytes"):
        assert name in quoted(next(it for it in said if it.startswith("secret")))
        with pytest.raises(ConfigurationError, match="a secret"):
            make_codec(getattr(pydantic, name), "s.m returns", written=True)


def test_headers_that_the_contract_gives_to_rabbitmq_are_refused_and_not_shown() -> None:
    (owned,) = re.findall(r"Names that RabbitMQ owns \(([^)]+)\)", PAGE)
    for name in quoted(owned):
        header = name.replace("*", "something")
        with pytest.raises(ConfigurationError, match="metadata"):
            CallOptions(metadata={header: "mine"})
        seen = requests.read_request(encode(Properties(headers={header: "its", "x-user": "ada"})))
        assert seen.metadata == {"x-user": "ada"}


# Limits.


def test_the_limits_are_those_of_the_contract() -> None:
    (body,) = re.findall(r"body (\d+) MiB by default", PAGE)
    (headers,) = re.findall(r"all headers together (\d+) KiB", PAGE)
    assert ConnectionOptions().max_body == int(body) * 1024 * 1024
    assert int(headers) * 1024 == MAX_HEADERS
    with pytest.raises(TooLarge):
        requests.encode_headers(key=None, attempt=1, metadata={"x-a": "a" * MAX_HEADERS})
    with pytest.raises(TooLarge):
        bodies.encode_params((), {"x": "a" * 100}, 100)


def test_names_are_those_of_the_contract() -> None:
    least, most, characters = re.findall(r"Names are (\d+) to (\d+) of `([^`]+)`", PAGE)[0]
    assert NAME.pattern == rf"[{characters}]{{{least},{most}}}\Z"
    assert "a method's name has no dot" in PAGE
    assert METHOD_NAME.pattern == NAME.pattern.replace(".", "")


@pytest.mark.parametrize("size", [0, 1, 255, 256])
def test_an_idempotency_key_has_the_size_of_the_contract(size: int) -> None:
    (row,) = (
        row for row in rows(section("wire.md", "Request"), "AMQP field", "value", "needed") if requests.KEY in row[0]
    )
    least, most = map(int, re.findall(r"(\d+) to (\d+) bytes", row[1])[0])
    found = requests.read_request(encode(Properties(headers={requests.KEY: "k" * size})))
    assert (not found.problem) == (least <= size <= most)


# Replies and errors.


def test_the_types_of_a_reply_are_those_of_the_contract() -> None:
    (row,) = (row for row in rows(section("wire.md", "Reply"), "AMQP field", "value") if row[0] == "`type`")
    assert quoted(row[1].partition("(later")[0]) == [replies.RESULT.decode(), replies.ERROR.decode()]
    for kind in quoted(row[1].partition("(later")[2]):
        with pytest.raises(CallError, match="must be 'result' or 'error'"):
            replies.read_body(Reply(b"id-1", kind.encode(), b"1"))


def test_the_body_of_an_error_has_the_fields_of_the_contract() -> None:
    (row,) = (row for row in rows(section("wire.md", "Reply"), "AMQP field", "value") if "error" in row[0])
    assert re.findall(r'"(\w+)": ', row[1]) == list(to_wire(InvalidParams(incident="1")))


CODES: Final = rows(section("wire.md", "Reply"), "code", "exception", "executed", "retryable", "raised by")


def test_the_table_of_codes_is_complete() -> None:
    assert [quoted(row[0])[0] for row in CODES if row[0].startswith("`")] == [*BY_CODE, "UNKNOWN"]
    assert [row[0] for row in CODES if not row[0].startswith("`")] == ["lower case", "any other"]


@pytest.mark.parametrize("row", [row for row in CODES if row[0].startswith("`")], ids=lambda row: row[0])
def test_a_code_means_what_the_contract_says(row: list[str]) -> None:
    (code,), (name,) = quoted(row[0]), quoted(row[1])
    for executed in re.findall(r"no|maybe|yes", row[2]):
        retryable = executed == "no" if row[3] == "if no" else row[3] == "yes"
        kind = BY_CODE.get(code, RemoteError)
        made = kind("", executed=executed) if "or" in row[2] else kind("")
        assert (made.executed, made.retryable) == (executed, retryable)
        said = json.loads(json.dumps(to_wire(made)))
        assert said["code"] == code
        read = from_wire(said)
        assert (type(read).__name__, read.executed, read.retryable) == (name, executed, retryable)


def test_a_code_in_lower_case_is_a_domain_error_and_any_other_code_is_kept() -> None:
    class Gone(DomainError):
        pass

    lower, other = CODES[-2:]
    assert quoted(lower[1]) == ["DomainError", "RemoteError"]
    assert (lower[2], lower[3]) == ("yes", "no")
    said = to_wire(Gone("it is gone"))
    assert (said["code"], said["executed"], said["retryable"]) == ("gone", "yes", False)
    assert type(from_wire(said, (Gone,))) is Gone
    assert type(from_wire(said)) is RemoteError
    assert quoted(other[1]) == ["RemoteError"]
    read = from_wire({"code": "DATA_LOSS", "message": "", "executed": "maybe", "retryable": True})
    assert (type(read), read.code, read.executed, read.retryable) == (RemoteError, "DATA_LOSS", "maybe", True)


def test_a_notice_means_what_the_contract_says() -> None:
    (said,) = re.findall(r"Reason `expired`: `CallTimeout`. It is (.+?)Reason `delivery_limit`", PAGE, re.DOTALL)
    no, once, option, maybe = quoted(said)
    assert (no, once, option, maybe) == ("no", "rpcq.once.", "disconnected_timeout", "maybe")
    assert f"`{option}` ({ClientOptions.disconnected_timeout:g} s) less two heartbeats" in said
    options = ClientOptions()
    client = Client("memory://")
    sender = client._sender
    target = make_target(NAMES, "x", "work", None)
    soon, late = 0.0, options.disconnected_timeout - 2 * options.heartbeat
    for is_once, queue, ago, event in (
        (True, f"{once}x", soon, CallEvent.EXPIRED_UNRUN),
        (True, f"{once}x", late, CallEvent.EXPIRED),
        (True, f"{once}y", soon, CallEvent.EXPIRED),
        (False, f"{once}x", soon, CallEvent.EXPIRED),
        (False, "rpcq.req.x", soon, CallEvent.EXPIRED),
    ):
        call: Any = SimpleNamespace(target=target, is_once=is_once, written=time.monotonic() - ago)
        notice = Notice(b"", "expired", queue)
        assert event_of_notice(notice, is_unrun=sender.is_unrun(call, notice))[0] is event


# Names of queues and exchanges, and their arguments.


def test_the_exchanges_are_those_of_the_contract() -> None:
    said = set(re.findall(r"`(rpcq\.[a-z]+)`", PAGE))
    further = [*JobTopology(NAMES.namespace).exchanges(), *EventTopology(NAMES.namespace).exchanges()]
    of_others = {exchange.name for exchange in further if ".delay." not in exchange.name}
    assert said == {exchange.name for exchange in NAMES.exchanges()} | of_others


def test_the_picture_of_the_design_has_the_exchanges_of_the_contract() -> None:
    (picture,) = re.findall(r"^```mermaid\n(.*?)^```$", (DOCS / "design.md").read_text(), re.DOTALL | re.MULTILINE)
    assert set(re.findall(r"exchange<br>([\w.]+)", picture)) == {exchange.name for exchange in NAMES.exchanges()}


def test_a_worker_replies_where_the_contract_says() -> None:
    (text,) = re.findall(r"\*\*Where a worker replies\*\*: (.+?)\n\n", PAGE, re.DOTALL)
    assert {name for name in quoted(text) if name.endswith("*")} == {f"{it.decode()}*" for it in NAMES.reply_prefixes()}


def test_control_messages_are_those_of_the_contract() -> None:
    text = section("wire.md", "Control")
    kinds = {quoted(kind)[0]: effect for kind, _, effect in rows(text, "`type`", "body", "effect")}
    known = (control.CANCEL, control.PING, control.DESCRIBE, control.STATS)
    assert [*kinds] == [kind.decode() for kind in known]
    assert f"under `{EVERY_SERVICE}`" in text
    words = {kind: set(re.findall(r'"(\w+)"', effect)) for kind, effect in kinds.items()}
    described = (WorkerInfo, ServiceInfo, MethodInfo, JobInfo, SubscriptionInfo)
    assert words["describe"] == {it.name for kind in described for it in fields(kind)}
    assert words["stats"] == {it.name for it in fields(WorkerStats)}


QUEUES: Final = rows(
    section("explanations/queues.md", "Names and arguments"),
    *("", "name", "durable", "exclusive", "arguments", "bound to"),
)


@pytest.mark.parametrize(
    ("what", "queue"),
    [
        ("request queue, classic", NAMES.request_queue("x", "classic")),
        ("request queue, quorum", NAMES.request_queue("x", "quorum")),
        ("a client's replies", NAMES.reply_queue()),
        ("the same, with a reply exchange", NAMES.reply_queue("replies")),
        ("a worker's control messages", NAMES.control_queue(("x",))),
    ],
    ids=lambda it: it if isinstance(it, str) else "",
)
def test_queues_are_declared_as_the_page_on_queues_says(what: str, queue: Queue) -> None:
    (row,) = (row for row in QUEUES if row[0] == what)
    _, name, durable, exclusive, arguments, bound = row
    assert "".join(quoted(name)) == (queue.name or queue.prefix)
    assert (durable, exclusive) == tuple("yes" if it else "no" for it in (queue.durable, queue.exclusive))
    said = quoted(arguments)
    if "the same" in arguments:
        said = [*quoted(next(row for row in QUEUES if row[0] == "request queue, classic")[4]), *said]
    assert dict(each.split(": ") for each in said) == {
        key: '""' if value == "" else str(value) for key, value in queue.arguments.items()
    }
    bindings = [tuple(quoted(each)) for each in bound.split(";") if quoted(each)]
    assert bindings == [*queue.bindings]
    assert ("key: its name" in bound) == bool(queue.bound_by_name)


def test_the_exchanges_of_the_page_on_queues_are_all_there_are() -> None:
    text = section("explanations/queues.md", "Names and arguments")
    found = re.findall(r"`(\S+)` is a (direct|topic) exchange(, and internal)?", text)
    assert [Exchange(name, kind, bool(internal)) for name, kind, internal in found] == NAMES.exchanges()

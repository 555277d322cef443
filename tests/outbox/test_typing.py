"""What type checkers accept and refuse of outbox and inbox. Long: they read all of SQLAlchemy."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SAMPLE = """\
from typing import Protocol, assert_type

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from rpcq import Client, Context, Job, Service
from rpcq import contract, sync
from rpcq.outbox import Outbox

emails = Service("emails")


@contract("letters", jobs=["write"])
class Letters(Protocol):
    async def write(self, to: str) -> None: ...


@emails.job
async def plain(to: str) -> None: ...
@emails.job
async def first(db: AsyncSession, to: str) -> None: ...
@emails.job
def both(context: Context, db: Session, to: str) -> None: ...


async def sends(client: Client, blocking: sync.Client, outbox: Outbox, db: AsyncSession, session: Session) -> None:
    assert_type(await client.send(first, to="ada"), Job)
    assert_type(await client.send(plain, to="ada"), Job)
    assert_type(await client.with_options(delay=1).send(both, to="ada"), Job)
    assert_type(blocking.send(first, "ada"), Job)
    assert_type(blocking.with_options(delay=1).send(both, "ada"), Job)
    assert_type(outbox.send(db, first, to="ada"), Job)
    assert_type(outbox.send(session, both, to="ada"), Job)
    assert_type(outbox.with_options(order_key="a").send(db, plain, "ada"), Job)
    assert_type(outbox.send(db, "emails.plain", to="ada"), Job)
    assert_type(outbox.send(db, outbox.bind(Letters).write, to="ada"), Job)
    outbox.send(db, outbox.bind(Letters).write, to=5)  # error
    assert_type(await outbox.cancel(db, "id"), bool)
    assert_type(outbox.cancel(session, "id"), bool)
    await client.send(first, to=5)  # error
    await client.send(first)  # error
    await client.send(both, name="ada")  # error
    blocking.send(first, to=5)  # error
    outbox.send(db, first, name="ada")  # error
    outbox.send("db", plain, to="ada")  # error
    outbox.send(db, plain)  # error
    outbox.with_options(order_keys="a")  # error
"""

WRONG = {number for number, line in enumerate(SAMPLE.splitlines(), 1) if line.endswith("# error")}


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    path = tmp_path / "sample.py"
    path.write_text(SAMPLE)
    return path


def said(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout


@pytest.mark.long
@pytest.mark.timeout(300)
def test_mypy_leaves_out_the_session_for_senders(sample: Path, tmp_path: Path) -> None:
    options = ("--strict", "--config-file=", "--no-error-summary", "--python-version", "3.11")
    told = said("mypy", *options, "--cache-dir", str(tmp_path / "cache"), str(sample))
    lines = {int(found) for found in re.findall(r"sample\.py:(\d+): error", told)}
    assert lines == WRONG, told


@pytest.mark.long
@pytest.mark.timeout(300)
def test_pyright_leaves_out_the_session_for_senders(sample: Path) -> None:
    told = said("basedpyright", "--outputjson", "--level", "error", str(sample))
    found = [it for it in json.loads(told)["generalDiagnostics"] if it["severity"] == "error"]
    assert {it["range"]["start"]["line"] + 1 for it in found} == WRONG, told

"""What the foreign programs need: a queue of their own, and the clients of npm."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import aio_pika
import pytest

from support.foreign import INSTALLING, PROGRAMS, unavailable


@pytest.fixture
async def own_queue(rabbitmq_url: str, namespace: str) -> AsyncIterator[str]:
    """A name for a queue outside the namespace, as foreign programs choose them; deleted afterwards."""
    name = f"rpc_queue-{namespace}"
    yield name
    async with await aio_pika.connect(rabbitmq_url) as connection:
        await (await connection.channel()).queue_delete(name)


@pytest.fixture(scope="session")
def node_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the programs for Node, and amqplib installed beside them."""
    npm = shutil.which("npm")
    for name in ("node", "npm"):
        if shutil.which(name) is None:
            unavailable(f"{name} is not on PATH: nothing to run the programs for Node with")
    folder = tmp_path_factory.mktemp("node")
    for name in ("package.json", "node_client.js", "foreign.js"):
        shutil.copy(PROGRAMS / name, folder)
    command = [str(npm), "install", "--no-audit", "--no-fund"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=INSTALLING, check=False)
    if done.returncode != 0:
        pytest.fail(f"npm install failed in {folder}\n{done.stdout}\n{done.stderr}")
    return folder


@pytest.fixture(scope="session")
def node_client(node_folder: Path) -> list[str | Path]:
    """The command of the Node client."""
    return ["node", node_folder / "node_client.js"]

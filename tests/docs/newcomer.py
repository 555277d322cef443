"""The way of a newcomer, with times: clone, then the tutorial as pasted, up to the first typed call between two files.

    python tests/docs/newcomer.py                                    # on this machine
    python tests/docs/newcomer.py python:3.13-slim --network host    # in a container, with options of `docker run`

It prints each command with the seconds since the start. The broker is that of RPCQ_URL, or else amqp://localhost/; the
time to start it is not counted. Where git is missing, as in a slim image, git is installed first, and that is counted.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from shlex import quote
from typing import Final

if __name__ == "__main__":  # run by its path: the folder above has the package that it is part of
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from docs.test_docs import CLONE, ROOT, blocks_of

TYPED_CALL: Final = "python buyer.py"
PRINTS: Final = "only 3 there; executed: yes"

HEAD: Final = """
set -e
docker() { :; }  # the broker is there already
say() { echo "[${SECONDS} s] $1"; }
"""
BEFORE: Final = (
    "command -v git >/dev/null || { apt-get update -qq; apt-get install -qq git >/dev/null; }",
    "git clone --quiet origin.git rpcq",
    "mkdir shop && cd shop",
)
TAIL: Final = """
echo "typed call after ${SECONDS} s"
kill $(jobs -p)
wait
"""


def commands(files: Path) -> Iterator[tuple[str, str]]:
    """What a newcomer does, and the commands for it; the files of the tutorial are written to a folder."""
    yield from ((each, each) for each in BEFORE)
    for at, block in enumerate(blocks_of((ROOT / "docs" / "tutorial.md").read_text("utf-8"))):
        if block.name:
            (files / str(at)).write_text(block.text)
            yield f"paste {block.name}", f"cp ../files/{at} {block.name}"
        elif block.language == "sh":
            yield from ((each, each) for each in block.text.splitlines())
        elif block.language == "console":
            for each in (line.removeprefix("$ ") for line in block.text.splitlines() if line.startswith("$ ")):
                if each == TYPED_CALL:
                    yield each, f"{each} | grep -x {quote(PRINTS)}"
                    return
                yield each, f"{each} || :"  # some of them show errors


def write_script(folder: Path, url: str) -> None:
    """Write the script for Bash, and the files that it copies."""
    (folder / "files").mkdir()
    lines = [f"say {quote(shown)}\n{command}" for shown, command in commands(folder / "files")]
    script = "\n".join([HEAD, *lines, TAIL])
    (folder / "script").write_text(script.replace(CLONE, "../rpcq").replace("amqp://localhost/", url))


def main(*docker: str) -> int:
    """Do it in a new folder; return the exit code of the script."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_script(folder, os.environ.get("RPCQ_URL", "amqp://localhost/"))
        subprocess.run(["git", "clone", "--quiet", "--bare", ROOT, folder / "origin.git"], check=True)
        command = ["bash", "script"]
        if docker:
            image, *options = docker
            # It works on a copy: files of the container's root would stay in the folder.
            inside = "cp -r /given /home/new && cd /home/new && exec bash script"
            volume = f"{folder}:/given:ro"
            command = ["docker", "run", "--rm", "--volume", volume, *options, image, "bash", "-c", inside]
        return subprocess.run(command, cwd=folder, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""The way of a newcomer, with times: clone, then the tutorial as pasted, up to the first typed call between two files.

    python tests/docs/newcomer.py                                    # on this machine
    python tests/docs/newcomer.py python:3.13-slim --network host    # in a container: further words are for `docker run`

It prints each command with the seconds since the start. The broker is that of RPCQ_URL, or else amqp://localhost/; to start
one is not part of the time. Without git, as in a slim image, git is installed first, and that is part of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

if __name__ == "__main__":  # run by its path: the folder above has the package that it is part of
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from docs.test_docs import CLONE, ROOT, blocks_of, commands_of

TYPED_CALL: Final = "python buyer.py"
PRINTS: Final = "only 3 there; executed: yes"

HEAD: Final = """
docker() { :; }  # the broker is there already
PS4='[${SECONDS} s] '
set -ex
command -v git >/dev/null || { apt-get update -qq; apt-get install -qq --no-install-recommends git >/dev/null; }
git clone --quiet origin.git rpcq
mkdir shop
cd shop
"""
TAIL: Final = """
{ set +x; } 2>/dev/null
echo "typed call after ${SECONDS} s"
kill $(jobs -p)
wait
"""


def write_script(folder: Path, url: str) -> None:
    """Write the script for Bash, and the files of the tutorial that it copies."""
    blocks = blocks_of((ROOT / "docs" / "tutorial.md").read_text("utf-8"))
    (last,) = (at for at, block in enumerate(blocks) if TYPED_CALL in block.text)
    lines = []
    (folder / ".blocks").mkdir()
    for at, block in enumerate(blocks[: last + 1]):
        if block.runs:
            (folder / ".blocks" / str(at)).write_text(block.text)
            lines += [it.replace(".blocks", "../.blocks") for it in commands_of(block, at, pasted=True)]
    lines[-1] = f"{TYPED_CALL} | grep -x '{PRINTS}'"  # the call that counts
    script = "\n".join([HEAD, *lines, TAIL]).replace(CLONE, "../rpcq").replace("amqp://localhost/", url)
    (folder / "script").write_text(script)


def main(*docker: str) -> int:
    """Do it in a new folder; return the exit code of the script."""
    url = os.environ.get("RPCQ_URL", "amqp://localhost/")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_script(folder, url)
        subprocess.run(["git", "clone", "--quiet", "--bare", ROOT, folder / "origin.git"], check=True)
        command = ["bash", "script"]
        if docker:
            image, *options = docker
            inside = (
                "cp -r /given /home/new && cd /home/new && exec bash script"  # nobody else's files stay in `folder`
            )
            command = [
                "docker",
                "run",
                "--rm",
                "--volume",
                f"{folder}:/given:ro",
                *options,
                image,
                "bash",
                "-c",
                inside,
            ]
        return subprocess.run(command, cwd=folder, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

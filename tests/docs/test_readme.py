"""The README, as a new user takes it: its files are written, its programs run, on a real broker."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)


def test_the_quickstart_does_what_it_says(rabbitmq_url: str, tmp_path: Path) -> None:
    service, caller = blocks("python")
    (tmp_path / "things.py").write_text(service)
    (tmp_path / "caller.py").write_text(caller)
    commands = [line for line in blocks("sh")[0].splitlines() if line.startswith("rpcq ")]
    assert commands == ["rpcq worker things:calculator &", "rpcq call calculator.add x=1 y=2"]
    environment = {
        **os.environ,
        "RPCQ_URL": rabbitmq_url,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    script = f"""
        {commands[0]}
        worker=$!
        trap 'kill $worker' EXIT
        until {commands[1]} --timeout 1 2>/dev/null; do sleep 0.1; done
        {sys.executable} caller.py
    """
    done = subprocess.run(
        ["sh", "-ec", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=50, check=False
    )
    assert done.stdout == "3\n10000 sums\nInvalidParams no False\n", done.stderr


def test_its_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target

"""Prometheus, with the alerts of the repository, over the processes of this example."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

ALERTS = Path(__file__).parents[2] / "docker" / "alerts.yml"

MISSING = (
    "there is no prometheus on the PATH: install it, as with `apt-get install prometheus`, or from "
    "https://prometheus.io/download"
)


def found() -> str | None:
    """The path of the program; None if it is not installed."""
    return shutil.which("prometheus")


def configuration(ports: Mapping[str, int], every: float) -> str:
    """What Prometheus is to read. It is JSON, which is YAML, too.

    Args:
        ports: the job of each process, and the port of this machine where it serves its metrics.
        every: seconds between two looks at each process, and at the alerts.

    """
    seconds = f"{round(1000 * every)}ms"
    return json.dumps(
        {
            "global": {"scrape_interval": seconds, "scrape_timeout": seconds, "evaluation_interval": seconds},
            "rule_files": [str(ALERTS)],
            "scrape_configs": [
                {
                    "job_name": job,
                    "metrics_path": "/metrics/" if job == "web" else "/metrics",
                    "static_configs": [{"targets": [f"127.0.0.1:{port}"]}],
                }
                for job, port in ports.items()
            ],
        },
        indent=1,
    )


def command(program: str, folder: Path, port: int) -> list[str]:
    """The command that runs it, with its data in a folder that has its `prometheus.yml`."""
    return [
        program,
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]

"""A real pgbouncer in transaction mode, in front of a PostgreSQL: installed if need be, in the way of `postgres.py`."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psycopg

from support import installing
from support.harness import Unavailable
from support.ports import free_ports

SECONDS = 20.0


def program() -> str:
    """The path of the program. There is no skipping."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin"
    if shutil.which("pgbouncer", path=path) is None and installing.can_apt_install():
        installing.apt_install("pgbouncer")
    found = shutil.which("pgbouncer", path=path)
    if found is None:
        raise Unavailable("there is no pgbouncer: install it (Debian, Ubuntu: apt-get install pgbouncer)")
    return found


@contextlib.contextmanager
def pgbouncer(url: str) -> Iterator[str]:
    """Start one for the server of a URL; gives the URL of the same database through it. Few connections serve many."""
    server = urlsplit(url)
    (port,) = free_ports(1)
    with tempfile.TemporaryDirectory(prefix="rpcq-test-") as name:
        folder = Path(name)
        config = folder / "pgbouncer.ini"
        target = f"host={server.hostname} port={server.port} user={server.username} password={server.password}"
        config.write_text(
            f"[databases]\n* = {target}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\n"
            "auth_type = any\npool_mode = transaction\ndefault_pool_size = 4\nmax_client_conn = 100\n"
            "unix_socket_dir =\nignore_startup_parameters = extra_float_digits\n"
        )
        command = [program(), str(config)]
        if os.geteuid() == 0:  # it refuses to run as root
            account = pwd.getpwnam("postgres" if "postgres" in {it.pw_name for it in pwd.getpwall()} else "nobody")
            for path in (folder, config):
                os.chown(path, account.pw_uid, account.pw_gid)
            command[1:1] = ["-u", account.pw_name]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        through = server._replace(netloc=f"any:any@127.0.0.1:{port}").geturl()
        try:
            _wait_for(through, process)
            yield through
        finally:
            process.kill()
            process.wait()


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            psycopg.connect(url, connect_timeout=2, prepare_threshold=None).close()
        except psycopg.OperationalError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise Unavailable(f"pgbouncer does not answer: {error}") from error
            time.sleep(0.05)
        else:
            return

"""Serve the page of the e-mails, with a mail server and three services of its own, on the broker of RPCQ_URL.

Open the address that is printed. Ctrl-C ends all.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from pathlib import Path

from examples.mail.app import create_app
from examples.mail.postbox import Postbox
from examples.mail.tables import open_database
from examples.stage import pages
from examples.stage.workers import Programs, Workers

SERVICES = ("emails", "billing", "analytics")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port


def main() -> int:
    """Run the command."""
    parser = pages.parser("python -m examples.mail", __doc__)
    parser.add_argument("--folder", type=Path, help="where the databases are (default: a new folder, for this run)")
    parser.add_argument("--alone", action="store_true", help="the mail server and the services run elsewhere")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mail-") as made:
        folder = (asked.folder or Path(made)).resolve()
        database, postbox = folder / "mail.sqlite", folder / "postbox.sqlite"
        programs: dict[str, Programs] = {}
        if not asked.alone:
            port = _free_port()  # the same one each time that the mail server is started
            os.environ |= {"MAIL_DATABASE": str(database), "MAIL_POSTBOX": str(postbox)}  # the programs inherit it
            os.environ["MAIL_SMTP"] = f"127.0.0.1:{port}"
            programs["mail server"] = Programs("examples.mail.postbox", "--port", str(port))
            programs |= {name: Workers(f"examples.mail.{name}:{name}", most=1) for name in SERVICES}
        try:
            app = create_app(open_database(database), Postbox(postbox), programs)
            for program in programs.values():
                program.start()
            return pages.serve(app, asked.host, asked.port)
        finally:
            for program in programs.values():
                program.stop()


if __name__ == "__main__":
    sys.exit(main())

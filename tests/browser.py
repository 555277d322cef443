"""A real browser for the tests of pages: Chromium as it is installed, or installed first, as `broker.py` does."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, sync_playwright

from broker import Unavailable, apt_install, can_apt_install

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find(say: Callable[[str], None]) -> str:
    """The path of a browser; `Unavailable`, saying what to install, where there is none and none can be had."""
    if (path := _installed()) is None and can_apt_install():
        say("installing chromium with apt-get, which takes a minute (root on Debian or Ubuntu)")
        apt_install("chromium")
        path = _installed()
    if path is None:
        raise Unavailable(
            f"none of {', '.join(NAMES)} is on the PATH: install chromium (a package of Debian and Ubuntu), or Chrome"
        )
    return path


@contextmanager
def launched(path: str) -> Iterator[Browser]:
    """The browser of that path, running."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path,
            args=["--no-sandbox"] if os.geteuid() == 0 else [],  # the sandbox refuses to run as root
        )
        yield browser
        browser.close()


def _installed() -> str | None:
    return next((found for name in NAMES if (found := shutil.which(name))), None)

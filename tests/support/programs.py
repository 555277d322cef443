"""Programs that tests and benchmarks need besides RabbitMQ: as installed, or installed first, as `broker.py` does."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from support.harness import Unavailable
from support.installing import apt_install, can_apt_install

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@dataclass(frozen=True)
class Program:
    """A program, under any of its names, and the package of Debian and Ubuntu that has it."""

    names: tuple[str, ...]
    package: str

    def find(self, say: Callable[[str], None]) -> str:
        """Its path; `Unavailable`, saying what to install, where there is none and none can be had."""
        if (path := self._installed()) is None and can_apt_install():
            say(f"installing {self.package} with apt-get, which takes a minute (root on Debian or Ubuntu)")
            apt_install(self.package)
            path = self._installed()
        if path is None:
            names = ", ".join(self.names)
            raise Unavailable(f"none of {names} is on the PATH: install {self.package} (of Debian and Ubuntu)")
        return path

    def _installed(self) -> str | None:
        return next((found for name in self.names if (found := shutil.which(name))), None)


CHROMIUM = Program(("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"), "chromium")
FFMPEG = Program(("ffmpeg",), "ffmpeg")
NATS_SERVER = Program(("nats-server",), "nats-server")
PROMTOOL = Program(("promtool",), "prometheus")
PROMETHEUS = Program(("prometheus",), "prometheus")

CONTRAST = """
const parse = text => (text.match(/[\\d.]+/g) || []).map(Number);
const light = ([r, g, b]) => {
  const [x, y, z] = [r, g, b].map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * x + 0.7152 * y + 0.0722 * z;
};
const under = element => {
  for (let it = element; it; it = it.parentElement) {
    const colour = parse(getComputedStyle(it).backgroundColor);
    if (colour.length === 3 || colour[3] > 0) return colour;
  }
  return [255, 255, 255];
};
const ratio = (element, colour) => {
  const [a, b] = [light(parse(colour)), light(under(element))].sort((x, y) => y - x);
  return (a + 0.05) / (b + 0.05);
};
"""
"""JavaScript: `ratio(element, colour)`, the contrast of a colour with what is under the element, as in WCAG 2."""


@contextmanager
def launched(path: str) -> Iterator[Browser]:
    """The browser of that path, running."""
    from playwright.sync_api import sync_playwright  # the benchmarks, which look for programs too, do without

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path,
            args=["--no-sandbox"] if os.geteuid() == 0 else [],  # the sandbox refuses to run as root
        )
        yield browser
        browser.close()

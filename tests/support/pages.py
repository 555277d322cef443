"""Pages in a real browser: what holds for each of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Browser, Page

from support.programs import CONTRAST

MS = 20_000
"""What may take a moment, in milliseconds."""

CONTRASTS = (
    f"async () => {{{CONTRAST}"
    """
  await Promise.allSettled(document.getAnimations().map(it => it.finished)); // a colour on its way to another is none
  const found = [];
  for (const element of document.querySelectorAll('body *')) {
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
    if (!element.checkVisibility() || !(own || element.matches('input'))) continue;
    found.push([element.textContent || element.id, ratio(element, getComputedStyle(element).color)]);
  }
  return found;
}"""
)
"""The contrast of each text with what is under it."""


WIDER = """() => {
  const right = element => element.getBoundingClientRect().right;
  return [...document.querySelectorAll('body > * *')]
    .filter(it => it.checkVisibility() && !it.closest('.scroll, .answers, .skip, svg'))
    .filter(it => right(it) > right(it.parentElement) + 1)
    .map(it => it.outerHTML.slice(0, 200));
}"""
"""What is wider than what it is in."""


@contextmanager
def opened(browser: Browser, base: str, **how: Any) -> Iterator[Page]:
    """The page; at its end, nothing was complained of and nothing came from elsewhere."""
    page = browser.new_page(**how)
    requests: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    try:
        page.goto(base)
        yield page
    finally:
        page.close()
    assert complaints == []
    assert [it for it in requests if not it.startswith(f"{base}/")] == []


def assert_legible(page: Page, least: int = 30) -> None:
    """Each of its texts, of which there are more than `least`, can be read."""
    found = page.evaluate(CONTRASTS)
    assert len(found) > least
    assert [it for it in found if it[1] < 4.5] == []


def assert_fits(page: Page) -> None:
    """Nothing scrolls sideways, unless it is made to scroll."""
    wide, window = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide <= window
    assert page.evaluate(WIDER) == []

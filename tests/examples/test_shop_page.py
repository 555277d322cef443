"""The page of the shop in a real browser, with RabbitMQ, and services that are killed."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from support.examples import example
from support.pages import MS, assert_fits, assert_legible, opened

pytestmark = [pytest.mark.long, pytest.mark.timeout(180)]

LATE = 3 * MS
"""What takes several processes a moment, in milliseconds."""

NAMES = ("orders", "payment", "inventory", "shipping", "notification", "analytics")


@pytest.fixture(scope="module")
def base(vhost: str) -> Iterator[str]:
    with example("shop", vhost, f"t{secrets.token_hex(8)}") as where:
        yield where


def cell(page: Page, service: str, column: int) -> Locator:
    return page.locator(f"#service-{service} > :nth-child({column})")


def served(page: Page) -> None:
    """Wait until each service is shown with its process and its queue."""
    for name in NAMES:
        expect(cell(page, name, 3)).to_have_text(re.compile(r"^\d+$"), timeout=MS)
        expect(cell(page, name, 2)).to_have_text(re.compile(r"^\d+"), timeout=MS)


def order(page: Page, kind: str) -> None:
    page.select_option("#kind", kind)
    page.click("#order button.main")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_something_is_ordered_by_keyboard_alone_and_done(browser: Browser, base: str, scheme: Any) -> None:
    with opened(browser, base, color_scheme=scheme) as page:
        served(page)
        order = []
        for _ in range(10):
            page.keyboard.press("Tab")
            order.append(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
            assert page.evaluate("getComputedStyle(document.activeElement).outlineWidth") == "3px"
            if order[-1] == "Order":
                page.keyboard.press("Enter")
        assert order == ["kind", "Order", "customers", *(f"switch-{name}" for name in NAMES), "mail"]
        expect(page.locator("#ordered")).to_have_text(re.compile(r"^Order [\da-f]{6}: done\.$"), timeout=LATE)
        assert_legible(page, 40)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("card", "the card company refuses the card"),
        ("stock", "there is not enough truffles left"),
        ("country", "no carrier goes to Atlantis"),
    ],
)
def test_an_order_that_cannot_be_done_is_cancelled_and_undone(browser: Browser, base: str, kind: str, why: str) -> None:
    with opened(browser, base) as page:
        served(page)
        order(page, kind)
        expect(page.locator("#ordered")).to_have_text(re.compile(rf"^Order \w+: cancelled: {why}\.$"), timeout=LATE)
        expect(page.locator("#verdict")).to_have_text(re.compile("^Settled"), timeout=LATE)


@pytest.mark.long
def test_payment_is_killed_and_no_order_is_lost(browser: Browser, base: str) -> None:
    with opened(browser, base) as page:
        served(page)
        page.get_by_role("button", name="Kill payment").click()
        expect(cell(page, "payment", 2)).to_have_text("none", timeout=MS)
        for _ in range(3):
            order(page, "plain")
        expect(cell(page, "payment", 3)).to_have_text("3", timeout=LATE)
        expect(page.locator("#totals")).to_contain_text("3 under way")
        assert_legible(page, 40)
        page.get_by_role("button", name="Start payment").click()
        expect(page.locator("#ordered")).to_have_text(re.compile(r"^Order \w+: done\.$"), timeout=LATE)
        expect(page.locator("#verdict")).to_have_text(re.compile("^Settled"), timeout=LATE)
        expect(cell(page, "payment", 3)).to_have_text("0", timeout=MS)


@pytest.mark.long
def test_dead_letters_are_shown_and_replayed(browser: Browser, base: str) -> None:
    with opened(browser, base) as page:
        served(page)
        page.click("#mail")
        expect(page.locator("#mail")).to_have_attribute("aria-pressed", "true", timeout=MS)
        order(page, "plain")
        expect(page.locator("#ordered")).to_have_text(re.compile(r"shipped, not told yet\.$"), timeout=LATE)
        expect(page.locator("#letters")).to_contain_text(
            "notification.tell: gave_up, the mail provider refuses our key", timeout=LATE
        )
        assert_legible(page, 40)
        page.click("#mail")
        expect(page.locator("#mail")).to_have_attribute("aria-pressed", "false", timeout=MS)
        page.get_by_role("button", name="Replay 1 dead letter of notification").click()
        expect(page.locator("#ordered")).to_have_text(re.compile(r"^Order \w+: done\.$"), timeout=LATE)
        expect(page.locator("#dead")).to_have_text("None: nothing needs a person.", timeout=LATE)


def test_at_320_px_nothing_scrolls_sideways(browser: Browser, base: str) -> None:
    with opened(browser, base, viewport={"width": 320, "height": 640}) as page:
        served(page)
        order(page, "plain")
        expect(page.locator("#ordered")).to_contain_text("done", timeout=LATE)
        assert_fits(page)


def test_without_javascript_the_page_says_what_it_needs(browser: Browser, base: str) -> None:
    with opened(browser, base, java_script_enabled=False) as page:
        expect(page.locator("noscript .note")).to_be_visible()

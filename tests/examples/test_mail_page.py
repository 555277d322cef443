"""The page of the e-mails in a real browser, with RabbitMQ, a mail server and services that are killed."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from support.examples import example
from support.pages import MS, assert_fits, assert_legible, opened

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def base(vhost: str) -> Iterator[str]:
    with example("mail", vhost, f"t{secrets.token_hex(8)}") as where:
        yield where


def served(page: Page) -> None:
    """Wait until the services have declared their queues."""
    expect(page.locator("#dead")).to_contain_text("dead letter", timeout=MS)
    for queue in ("confirmation-mails", "billing", "analytics"):
        expect(page.locator(f"#queues-{queue} td").first).not_to_have_text("?", timeout=MS)


def row(page: Page, address: str) -> Any:
    return page.locator("#users tr", has_text=address)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_user_signs_up_and_confirms_by_keyboard_alone(browser: Browser, base: str, scheme: Any) -> None:
    with opened(browser, base, color_scheme=scheme) as page:
        served(page)
        for typed in ("Ada", f"{scheme}@example.org"):
            page.keyboard.press("Tab")
            assert page.evaluate("getComputedStyle(document.activeElement).outlineWidth") == "3px"
            page.keyboard.press("Control+A")
            page.keyboard.type(typed)
        page.keyboard.press("Enter")
        confirm = page.locator(f"button[aria-label='Confirm {scheme}@example.org']")
        expect(confirm).to_be_visible(timeout=MS)
        for _ in range(20):
            page.keyboard.press("Tab")
            if confirm.evaluate("it => it === document.activeElement"):
                break
        page.keyboard.press("Enter")
        expect(row(page, f"{scheme}@example.org").locator("td").nth(1)).to_have_text("arrived", timeout=MS)
        expect(page.locator("#said")).to_contain_text("All of it is done", timeout=MS)
        assert_legible(page)


def test_a_mail_that_bounces_is_replayed_when_its_address_exists(browser: Browser, base: str) -> None:
    with opened(browser, base) as page:
        served(page)
        page.fill("#address", "nobody@example.org")
        page.click("#up button.main")
        expect(page.locator("#letters li")).to_have_text(
            "emails.confirm, gave_up: the mail server refuses it: 550 no such user", timeout=MS
        )
        page.click("#account")
        page.click("#replay")
        expect(row(page, "nobody@example.org").locator("td").first).to_have_text("arrived", timeout=MS)
        expect(page.locator("#dead")).to_have_text("0 dead letters.", timeout=MS)


def test_mails_wait_while_their_service_is_dead_and_the_others_go_on(browser: Browser, base: str) -> None:
    with opened(browser, base, viewport={"width": 320, "height": 640}) as page:
        served(page)
        page.click("button[aria-label='Kill emails']")
        expect(page.locator("button[aria-label='Start emails']")).to_be_visible(timeout=MS)
        page.fill("#address", "late@example.org")
        page.click("#up button.main")
        expect(page.locator("#said")).to_contain_text("Not all done: confirmation mails.", timeout=MS)
        expect(page.locator("#queues-confirmation-mails td").first).to_have_text("1", timeout=MS)
        assert_fits(page)
        page.click("button[aria-label='Start emails']")
        expect(row(page, "late@example.org").locator("td").first).to_have_text("arrived", timeout=MS)
        assert_fits(page)


def test_without_javascript_the_page_says_what_it_needs(browser: Browser, base: str) -> None:
    with opened(browser, base, java_script_enabled=False) as page:
        expect(page.locator("noscript .note")).to_be_visible()

"""The newsroom in a real browser, with RabbitMQ and services that are killed."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from support.examples import example
from support.pages import MS, assert_fits, assert_legible, opened

pytestmark = pytest.mark.long

LATER = 2 * MS
"""What comes after a service was started, in milliseconds."""

PROGRAMS = ("editor", "mobile", "emails", "web-1", "web-2")


@pytest.fixture(scope="module")
def base(vhost: str) -> Iterator[str]:
    with example("news", vhost, f"t{secrets.token_hex(8)}") as where:
        yield where


def served(page: Page) -> None:
    """Wait until all programs run, the broker has told of their queues, and the browser has a stream."""
    for program in PROGRAMS:
        expect(page.locator(f"#programs-{program} td").nth(1)).not_to_have_text("?", timeout=LATER)
    expect(page.locator("#connected")).to_contain_text("Live, from web-", timeout=LATER)


def press(page: Page, what: str) -> None:
    page.click(f"button[aria-label='{what}']")


def publish(page: Page, topic: str, headline: str) -> None:
    page.fill("#headline", headline)
    page.select_option("#topic", topic)
    with page.expect_response("**/stories?*", timeout=LATER) as answer:
        page.click("#story button.main")
    assert answer.value.status == 201


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_story_is_published_by_keyboard_and_read_live(browser: Browser, base: str, scheme: Any) -> None:
    with opened(browser, base, color_scheme=scheme) as page:
        served(page)
        page.keyboard.press("Tab")
        assert page.evaluate("getComputedStyle(document.activeElement).outlineWidth") == "3px"
        page.keyboard.press("Control+A")
        page.keyboard.type(f"A {scheme} story")
        page.keyboard.press("Tab")
        page.keyboard.type("news.science.space")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        expect(page.locator("#pages li").first).to_have_text(f"A {scheme} story news.science.space", timeout=MS)
        expect(page.locator("#said")).to_contain_text("Everybody has what they asked for, once.", timeout=LATER)
        expect(page.locator("#readers-Eli td").nth(2)).to_have_text(f"A {scheme} story", timeout=MS)
        assert_legible(page)


def test_a_reader_chooses_topics_in_the_browser(browser: Browser, base: str) -> None:
    with opened(browser, base) as page:
        served(page)
        publish(page, "news.breaking", "A bridge is closed")
        publish(page, "news.sport.tennis", "Five sets")
        shown = page.locator("#pages li")
        expect(shown.filter(has_text="Five sets")).to_be_visible(timeout=MS)
        page.uncheck("#choices [value='news.breaking']")
        page.uncheck("#choices [value='news.science']")
        expect(shown.filter(has_text="Five sets")).to_be_visible(timeout=MS)
        publish(page, "news.breaking", "The bridge is open")
        publish(page, "news.sport.football", "One to nil")
        expect(shown.filter(has_text="One to nil")).to_be_visible(timeout=MS)
        assert [it for it in shown.all_inner_texts() if "news.sport." not in it] == []
        page.uncheck("#choices [value='news.sport']")
        expect(page.locator("#connected")).to_have_text("You chose nothing.")
        expect(shown).to_have_count(0)


def test_who_is_away_gets_what_it_missed_and_no_story_twice(browser: Browser, base: str) -> None:
    with opened(browser, base, viewport={"width": 320, "height": 640}) as page:
        served(page)
        shown = page.locator("#pages li")
        publish(page, "news.breaking", "Before")
        expect(shown.filter(has_text="Before")).to_be_visible(timeout=MS)
        # Whoever is killed holds nothing then.
        expect(page.locator("#said")).to_contain_text("Everybody has what they asked for, once.", timeout=LATER)
        before = shown.count()
        for program in ("web-1", "web-2", "mobile", "emails"):
            press(page, f"Kill {program}")
            expect(page.locator(f"#programs-{program} td").first).to_have_text("dead", timeout=MS)
        expect(page.locator("#connected")).to_contain_text("No program of the web is up.", timeout=MS)
        for number in range(3):
            publish(page, "news.breaking", f"Missed {number}")
        for program in ("web-1", "mobile", "emails"):
            expect(page.locator(f"#programs-{program} td").nth(1)).to_have_text("3", timeout=MS)
        expect(page.locator("#said")).to_contain_text(
            "On the way to Ada, Cem, Dana, Fay. 3 are not on the web yet.", timeout=MS
        )
        assert_fits(page)
        for program in ("web-2", "mobile", "emails"):
            press(page, f"Start {program}")
        expect(shown).to_have_count(before + 3, timeout=LATER)
        expect(page.locator("#connected")).to_have_text("Live, from web-2.", timeout=LATER)
        expect(page.locator("#said")).to_contain_text("Everybody has what they asked for, once.", timeout=LATER)
        stories = shown.evaluate_all("all => all.map(it => it.dataset.story)")
        assert len(set(stories)) == len(stories)
        headlines = shown.all_inner_texts()[:4]
        assert sorted(headlines[:3]) == [f"Missed {number} news.breaking" for number in range(3)]
        assert headlines[3] == "Before news.breaking"
        expect(page.locator("#readers-Dana td").nth(1)).to_contain_text("e-mail")
        assert_fits(page)
        press(page, "Start web-1")
        served(page)


def test_without_javascript_the_page_says_what_it_needs(browser: Browser, base: str) -> None:
    with opened(browser, base, java_script_enabled=False) as page:
        expect(page.locator("noscript .note")).to_be_visible()

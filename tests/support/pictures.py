"""Pictures of the examples' pages for the documentation: `make picture-NAME` writes docs/assets/NAME.png.

Each example has a function here that brings its page into the state that is worth a picture.
"""

from __future__ import annotations

import os
import re
import secrets
import sys
from pathlib import Path

from playwright.sync_api import Page, expect

from support.examples import example
from support.harness import to_stderr
from support.pages import MS
from support.programs import CHROMIUM, launched

ASSETS = Path(__file__).parents[2] / "docs" / "assets"


def scores(page: Page) -> None:
    """A flood in low, and products that visitors look at meanwhile."""
    expect(page.locator("#dead")).to_have_text("0 dead letters.", timeout=MS)
    page.click("#renew")
    expect(page.locator("#flood")).to_contain_text("A flood of", timeout=MS)
    page.click("#visitors")
    expect(page.locator("#lane-high > :nth-child(3)")).to_have_text("8", timeout=MS)
    page.click("#visitors")
    page.select_option("#product", "phone-vietnam")
    page.click("#look button.main")
    expect(page.locator("#looked")).to_contain_text("grade", timeout=MS)
    page.mouse.move(0, 0)


def shop(page: Page) -> None:
    """Payment is killed, and orders go on being taken."""
    expect(page.locator("#service-analytics > :nth-child(3)")).to_have_text("0", timeout=3 * MS)
    for kind in ("country", "plain"):
        page.select_option("#kind", kind)
        page.click("#order button.main")
    expect(page.locator("#verdict")).to_contain_text("Settled", timeout=3 * MS)
    page.click("#switch-payment")
    expect(page.locator("#service-payment > :nth-child(2)")).to_have_text("none", timeout=MS)
    page.select_option("#kind", "plain")
    for _ in range(12):
        page.click("#order button.main")
    expect(page.locator("#service-payment > :nth-child(3)")).to_have_text("12", timeout=3 * MS)
    page.mouse.move(0, 0)


def mail(page: Page) -> None:
    """Users who signed up: one confirmed, one bounced, and the others have their e-mails one after the other."""
    expect(page.locator("#queues-analytics td").first).not_to_have_text("?", timeout=MS)
    expect(page.locator("#dead")).to_have_text("0 dead letters.", timeout=MS)
    for address in ("nobody@example.org", "ada@example.org"):
        page.fill("#address", address)
        page.click("#up button.main")
    page.click("button[aria-label='Confirm ada@example.org']", timeout=MS)
    expect(page.locator("#letters li")).to_have_count(1, timeout=MS)
    expect(page.locator("#queues-welcome-mails td").nth(1)).to_have_text("1", timeout=MS)
    page.click("button[aria-label='Kill billing']")
    page.click("#many")
    some = re.compile(r"^[1-4]\d$")  # of 51: the others wait
    expect(page.locator("#queues-confirmation-mails td").nth(1)).to_have_text(some, timeout=MS)
    page.mouse.move(0, 0)


def news(page: Page) -> None:
    """The mailboxes' service and the web were killed, and their stories wait."""
    for program in ("editor", "mobile", "emails", "web-1"):
        expect(page.locator(f"#programs-{program} td").nth(1)).not_to_have_text("?", timeout=3 * MS)
    expect(page.locator("#connected")).to_contain_text("Live, from", timeout=3 * MS)
    stories = [
        ("news.breaking", "A bridge is closed"),
        ("news.science.space", "A comet with two tails"),
        ("news.sport.tennis", "Five sets, and a rainbow"),
    ]
    late = [("news.sport.football", "One to nil, in the last minute"), ("news.breaking", "The bridge is open again")]

    def publish(topic: str, headline: str) -> None:
        page.fill("#headline", headline)
        page.select_option("#topic", topic)
        with page.expect_response("**/stories?*", timeout=MS):
            page.click("#story button.main")

    for topic, headline in stories:
        publish(topic, headline)
    expect(page.locator("#pages li")).to_have_count(3, timeout=MS)
    expect(page.locator("#said")).to_contain_text("Everybody has what they asked for", timeout=MS)
    for program in ("emails", "web-1", "web-2"):
        page.click(f"button[aria-label='Kill {program}']")
    expect(page.locator("#connected")).to_contain_text("No program of the web is up", timeout=MS)
    for topic, headline in late:
        publish(topic, headline)
    expect(page.locator("#programs-emails td").nth(1)).to_have_text("2", timeout=MS)
    expect(page.locator("#readers-Cem td").nth(1)).to_have_text("2 of 2", timeout=MS)
    page.mouse.move(0, 0)


def media(page: Page) -> None:
    """A video under way, a step that is a dead letter, and pictures that are done."""
    expect(page.locator("#dead")).to_have_text("0 dead letters.", timeout=MS)
    page.click("[data-sample=picture]")
    expect(page.locator("#uploads h3")).to_contain_text("its user knows", timeout=3 * MS)
    page.click("#fault-watermark")
    page.click("[data-sample=picture]")
    expect(page.locator("#uploaded")).to_have_text("A picture is made and uploaded.", timeout=MS)
    expect(page.locator("#letters li")).to_have_count(1, timeout=3 * MS)
    page.click("[data-sample=video]")
    some = re.compile(r"worker \d+: [2-7]\d %")
    expect(page.locator("[data-step='720p'] span").last).to_have_text(some, timeout=3 * MS)
    page.mouse.move(0, 0)


STATES = {"mail": mail, "media": media, "news": news, "scores": scores, "shop": shop}


def main(name: str) -> None:
    """Take the picture of one example."""
    size = {"width": 1000, "height": 760}
    where = example(name, os.environ["RPCQ_URL"], f"t{secrets.token_hex(8)}")
    with where as base, launched(CHROMIUM.find(to_stderr)) as browser:
        page = browser.new_page(viewport=size, color_scheme="light")
        page.goto(base)
        STATES[name](page)
        page.screenshot(path=ASSETS / f"{name}.png")


if __name__ == "__main__":
    main(sys.argv[1])

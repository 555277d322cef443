"""Plots and numbers as one page of HTML, in the look of a report of `rpcq bench`. Pure; needs Jinja2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from markupsafe import Markup

from rpcq.bench.rendering import render


class Card(NamedTuple):
    """A number, and a word about it."""

    name: str
    text: str
    about: str = ""


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a page.

    Attributes:
        head: its heading; empty for none.
        about: a sentence under the heading.
        cards: numbers.
        plots: plots, from `figure`.
        values: names, and the text of each.

    """

    head: str = ""
    about: str = ""
    cards: Sequence[Card] = ()
    plots: Sequence[Markup] = ()
    values: Sequence[tuple[str, str]] = ()


def sheet(
    title: str, facts: Sequence[str], sections: Sequence[Section], *, verdict: str = "", is_good: bool = True
) -> str:
    """A page of HTML, which needs no other file and no network.

    Args:
        title: its title.
        facts: short texts that stand in a line under the title.
        sections: its parts.
        verdict: what came out, in a sentence.
        is_good: whether that is good; it is red if not.

    """
    return str(
        render(
            "sheet.html.jinja",
            title=title,
            facts=facts,
            sections=[it for it in sections if it.cards or it.plots or it.values],
            verdict=verdict,
            is_good=is_good,
        )
    )

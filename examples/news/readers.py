"""Who asked for what. These would be rows of a table: people come and go while services run."""

from __future__ import annotations

from collections.abc import Mapping

Choices = tuple[str, ...]

PHONES: Mapping[str, Choices] = {
    "Ada": ("news.breaking", "news.sport"),
    "Ben": ("news.sport.tennis",),
    "Cem": ("news.breaking",),
}
"""Those who want to be pushed, and the topics of each."""

MAILBOXES: Mapping[str, Choices] = {
    "Dana": ("news",),
    "Eli": ("news.science",),
    "Fay": ("news.breaking", "news.sport.football"),
}
"""Those who want e-mails, and the topics of each."""

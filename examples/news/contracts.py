"""What the programs know of each other: the events, one for each topic, and how a story is published."""

from __future__ import annotations

from typing import Literal, Protocol, get_args

from rpcq import Event, Retry, contract


class Story(Event):
    """The base of all stories. Its classes are the topics, and their names what subscribers choose by."""

    story_id: str
    headline: str


class Breaking(Story, name="news.breaking"):
    """What cannot wait."""


class Football(Story, name="news.sport.football"):
    """A match."""


class Tennis(Story, name="news.sport.tennis"):
    """Another match."""


class Space(Story, name="news.science.space"):
    """Something far away."""


class Health(Story, name="news.science.health"):
    """Something near."""


Topic = Literal[
    "news.breaking", "news.sport.football", "news.sport.tennis", "news.science.space", "news.science.health"
]
"""The name of a topic."""

TOPICS: dict[str, type[Story]] = {kind.event_name: kind for kind in (Breaking, Football, Tennis, Space, Health)}
"""The event of each topic."""

Choice = Literal["news", "news.breaking", "news.sport", "news.science", Topic]
"""What a reader may ask for: a topic, or all topics that begin with these words."""

CHOICES: tuple[str, ...] = get_args(Choice)

RETRY = Retry(max_attempts=8, initial_backoff=0.5, max_backoff=60)
"""How often a story is tried again, for a service whose provider is away."""


def asked_for(choices: tuple[str, ...], topic: str) -> bool:
    """Whether a reader with these choices has asked for a topic."""
    return any(topic == choice or topic.startswith(f"{choice}.") for choice in choices)


@contract("editor")
class EditorApi(Protocol):
    """Takes stories."""

    async def publish(self, story_id: str, topic: Topic, headline: str) -> None:
        """Save a story, and publish it after that. A second call with the same ID does nothing."""
        ...

"""Routing keys of topic exchanges, and the patterns that match them. Pure.

The rules are RabbitMQ's: https://www.rabbitmq.com/tutorials/amqp-concepts#exchange-topic
"""

from __future__ import annotations


def words_of(key: bytes) -> list[bytes]:
    """The words of a routing key or binding key of a topic exchange; an empty key has no words."""
    return key.split(b".") if key else []


def has_wildcard(words: list[bytes]) -> bool:
    """Whether a binding key of a topic exchange has a wildcard."""
    return b"*" in words or b"#" in words


def topic_matches(pattern: list[bytes], words: list[bytes]) -> bool:
    """Whether a binding key matches a routing key: `*` stands for one word, `#` for any number of words."""
    if not pattern:
        return not words
    if pattern[0] == b"#":
        return any(topic_matches(pattern[1:], words[at:]) for at in range(len(words) + 1))
    return bool(words) and pattern[0] in (b"*", words[0]) and topic_matches(pattern[1:], words[1:])

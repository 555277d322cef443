"""A message with several requests, as each of them sees it. Pure."""

from __future__ import annotations

from rpcq.transport.base import Acknowledger, Delivery


class Carrier:
    """The delivery of a message batch, which is needed until none of its requests needs it any more.

    Args:
        delivery: of the message.
        requests: how many it has.

    Attributes:
        delivery: as given.
        source: as in `Delivery`; so are `exchange`, `redelivered` and `properties`.

    """

    __slots__ = ("_left", "delivery", "exchange", "properties", "redelivered", "source")

    def __init__(self, delivery: Delivery, requests: int) -> None:
        self.delivery = delivery
        self._left = requests
        self.source: Acknowledger = delivery.source
        self.exchange = delivery.exchange
        self.redelivered = delivery.redelivered
        self.properties = delivery.properties

    def let_go(self) -> bool:
        """One of its requests needs it no more. Returns whether that was the last one.

        Raises:
            RuntimeError: this was called more often than it has requests.

        """
        self._left -= 1
        if self._left < 0:
            msg = "more requests of a message were settled than it has"
            raise RuntimeError(msg)
        return not self._left

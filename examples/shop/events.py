"""What happens in the shop. These classes are all that its services know of each other."""

from __future__ import annotations

from rpcq import Event


class OrderPlaced(Event, name="order.placed"):
    """A customer has ordered something."""

    order_id: str
    customer: str
    article: str
    count: int
    cents: int
    card: str
    country: str


class PaymentProcessed(Event, name="payment.processed"):
    """The card is charged."""

    order_id: str
    customer: str
    article: str
    count: int
    country: str


class PaymentRefused(Event, name="payment.refused"):
    """The card company refuses the card."""

    order_id: str
    why: str


class InventoryReserved(Event, name="inventory.reserved"):
    """The goods are put aside for the order."""

    order_id: str
    customer: str
    country: str


class InventoryFailed(Event, name="inventory.failed"):
    """The goods cannot be had."""

    order_id: str
    why: str


class OrderShipped(Event, name="order.shipped"):
    """A carrier takes the parcel."""

    order_id: str
    customer: str


class ShippingFailed(Event, name="shipping.failed"):
    """No carrier takes the parcel."""

    order_id: str
    why: str


class InventoryReleased(Event, name="inventory.released"):
    """The goods are back in stock."""

    order_id: str


class PaymentRefunded(Event, name="payment.refunded"):
    """The customer has the money back."""

    order_id: str
    why: str


class OrderCancelled(Event, name="order.cancelled"):
    """Nothing comes of the order, and what was done for it is undone."""

    order_id: str
    customer: str
    why: str


class NotificationSent(Event, name="notification.sent"):
    """The customer knows."""

    order_id: str

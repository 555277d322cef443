"""Before a test imports the shop: its services open their databases then."""

import examples.orders.conftest  # noqa: F401

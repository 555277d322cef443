"""Before a test imports the shop: its services open their databases then."""

import examples.shop.conftest  # noqa: F401

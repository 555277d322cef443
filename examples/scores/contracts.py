"""What the web app knows of the service: it does not import the code that computes."""

from __future__ import annotations

from typing import Protocol

from rpcq import contract


@contract("scores", jobs=["compute", "renew"])
class ScoresApi(Protocol):
    """Computes the scores of products."""

    async def compute(self, product: str) -> None:
        """Compute the score of a product, unless the store has it already."""
        ...

    async def renew(self) -> None:
        """Take new emission factors, and have each product computed again, in the lane `low`."""
        ...

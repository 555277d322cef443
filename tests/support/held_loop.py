"""An event loop on a clock that the test moves."""

from __future__ import annotations

import asyncio


class HeldLoop(asyncio.SelectorEventLoop):
    """An event loop whose time stands still until it is told to pass."""

    now = 1_000.0

    def time(self) -> float:
        return self.now

    def settle_down(self) -> None:
        """Run what is due, and what follows from it, until nothing is left to do now."""
        for _ in range(100):
            self.call_soon(self.stop)
            self.run_forever()
            if not self._ready:  # type: ignore[attr-defined]
                return
        raise AssertionError("what runs in the loop does not come to rest")

    def pass_time(self, seconds: float, step: float = 0.01) -> None:
        """Let time pass in small steps, in seconds: a timer may set another."""
        until = self.now + seconds
        while self.now < until:
            self.now = min(self.now + step, until)
            self.settle_down()

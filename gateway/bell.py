"""Waking a loop that has nothing to do.

In charge of: the wait of every loop, ended by a ring or by its timeout.

Promises: a ring between two waits is not lost, it ends the next one at once, unless the listener only looks
by itself. A lost ring costs the timeout, never a fax: each loop looks again.

Fails: never.
"""

import asyncio
import contextlib
import time
from typing import Protocol


class Wake(Protocol):
    """What a loop waits with."""

    async def wait(self, timeout: float) -> None:  # noqa: ASYNC109 -- running out is the normal case
        """Return on a ring or after `timeout` seconds."""


class Bell:
    """One ringer, any number of listeners; all in one event loop."""

    def __init__(self) -> None:
        self._listeners: list[Listener] = []
        self._woken: list[Listener] = []

    def ring(self) -> None:
        """Wake everyone who wants it. From another thread: `loop.call_soon_threadsafe(bell.ring)`."""
        for listener in self._woken:
            listener.event.set()

    def listener(self, *, woken: bool = True) -> "Listener":
        """Return a new listener; one that is not `woken` only looks when its time has run out."""
        listener = Listener()
        self._listeners.append(listener)
        if woken:
            self._woken.append(listener)
        return listener

    def longest_turn(self) -> float:
        """Return how long the loop that is away longest has not come round, in seconds; for the watchdog."""
        return max((time.monotonic() - one.came_round for one in self._listeners), default=0.0)


class Listener:
    """What one loop waits with."""

    def __init__(self) -> None:
        self.event = asyncio.Event()
        self.came_round = time.monotonic()

    async def wait(self, timeout: float) -> None:  # noqa: ASYNC109 -- running out is the normal case here
        """Return when the bell woke it, or did so since the last wait, or after `timeout` seconds."""
        self.came_round = time.monotonic()
        # Not `wait_for`: before Python 3.12 it forgets a cancellation that comes together with the ring.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self.event.wait()
        self.event.clear()
        self.came_round = time.monotonic()

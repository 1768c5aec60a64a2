"""Clocks that tell how much time has truly passed.

In charge of: time that nobody sets, and how far the store's clock, which somebody may set, can be relied on.

Promises: `elapsed` goes on while the machine sleeps, where the system offers that, and never jumps.

Fails: never.
"""

import time
from collections.abc import Callable

_STEP = 5.0  # seconds by which two looks at the store's clock may differ from ours, and it went on steadily
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def elapsed() -> float:
    """Return seconds since some moment."""
    return time.clock_gettime(_CLOCK)


class Steadiness:
    """For how long the store's clock has surely gone on without being set.

    A lease that ran out by a clock that was set may be that of a POST which is still on its way, from another
    gateway: what the carrier does not have yet proves nothing then.
    """

    def __init__(self, clock: Callable[[], float] = elapsed) -> None:
        self._clock = clock
        self._since = 0.0
        self._offset: float | None = None

    def see(self, now: float) -> float:
        """Look at the store's clock, which tells `now`; return the seconds that it surely counted."""
        ours = self._clock()
        if self._offset is None or abs(now - ours - self._offset) > _STEP:
            self._since = ours
        self._offset = now - ours
        return ours - self._since

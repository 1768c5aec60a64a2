"""How much is measured: all of it, or a look at whether everything works."""

import time
from collections.abc import Callable
from dataclasses import dataclass


def _tell(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


@dataclass(frozen=True, slots=True)
class Plan:
    """The lengths: `seconds` for each run, `rounds` for each figure, the sizes of what is filled and sent."""

    rounds: int = 5
    seconds: float = 1.5
    sizes: tuple[str, ...] = ("2 KB", "100 KB", "1 MB", "20 MB")
    sessions: tuple[int, ...] = (1, 10, 50)
    stall_seconds: float = 5.0
    way_seconds: float = 4.0
    webhooks: int = 4000
    replies: int = 100
    finished: tuple[int, ...] = (100, 10_000, 1_000_000)
    waiting: int = 100_000
    purged: int = 100
    say: Callable[[str], None] = _tell


QUICK = Plan(
    rounds=1,
    seconds=0.3,
    sessions=(1, 10),
    stall_seconds=2.0,
    way_seconds=0.7,
    webhooks=300,
    replies=10,
    finished=(100, 1000),
    waiting=1000,
    purged=20,
)
"""Figures of it mean nothing."""

"""A daemon whose clock on the wall is set while it runs."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from harness import Gateway, World, until, world

STEPPING_CLOCK = """
import pathlib, time
right, wrong = time.time, pathlib.Path({path!r})
time.time = lambda: right() + float(wrong.read_text())
"""


class Clock:
    """The daemon's wall clock, which the test sets; nothing else in the daemon is changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "clock"
        self.folder.mkdir()
        self._file = self.folder / "seconds"
        (self.folder / "sitecustomize.py").write_text(STEPPING_CLOCK.format(path=str(self._file)))
        self.set(0.0)

    def set(self, ahead: float) -> None:
        """Set the clock to be so many seconds ahead of the carrier's, from now on."""
        self.ahead = ahead
        new = self._file.with_suffix(".new")
        new.write_text(str(ahead))
        new.replace(self._file)


@contextlib.asynccontextmanager
async def clocked(
    folder: Path, monkeypatch: pytest.MonkeyPatch, ahead: float = 0.0, **sections: Any
) -> AsyncIterator[tuple[World, Clock]]:
    """Open a world whose gateway has a clock that can be set, and is `ahead` at first."""
    clock = Clock(folder)
    clock.set(ahead)
    environment = Gateway._environment
    monkeypatch.setattr(
        Gateway, "_environment", lambda gateway: environment(gateway) | {"PYTHONPATH": str(clock.folder)}
    )
    async with world(folder, **sections) as w:
        yield w, clock
        await w.everyone_told()


async def refused_events(w: World, number: str, calls: int) -> None:
    """Wait until the last call to a number ended at the carrier, and its events were all refused."""
    await until(lambda: len(w.taken(number)) == calls, "the call")
    last = w.taken(number)[-1].fax_id

    def ends() -> list[int | None]:
        tries = [sent for sent in w.carrier.events if sent.fax_id == last]
        return [sent.status for sent in tries if sent.event_type == "fax.delivered" and sent.attempt == 3]

    await until(ends, "the carrier to give its event up")
    assert {sent.status for sent in w.carrier.events if sent.fax_id == last} == {401}

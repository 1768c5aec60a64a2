"""Gateways that come back whenever they are gone, and what is done to them and to their database.

Nothing in the gateway helps: it is killed, stopped and frozen by signals. Whoever talks to it tells the
`Executioner` what moment has come at which gateway; it strikes there if that is what it lies in wait for.
"""

import asyncio
import contextlib
import json
import math
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psycopg
import short_leases
from crashes import rows
from harness import Gateway, until
from postgres import Server

PROGRAM = (sys.executable, str(Path(short_leases.__file__).resolve()))
WAIT_FOR_MOMENT = 2.0  # seconds
LONGEST_START = 15.0  # seconds
LONGEST_STOP = 20.0  # seconds from SIGTERM
LINES_KEPT = 400  # of a gateway's log, in memory

CLIENT_MOMENTS = ("in the middle of DATA", "after the final dot", "the 250 said and not heard")
CARRIER_MOMENTS = ("after the POST was read", "right before the 202", "right after the 202")
WEBHOOK_MOMENTS = ("in the middle of a webhook", "before a webhook's answer arrives")
RELAY_MOMENTS = ("in a reply's RCPT", "in a reply's DATA", "after a reply's final dot")
MOMENTS = (*CLIENT_MOMENTS, *CARRIER_MOMENTS, *WEBHOOK_MOMENTS, *RELAY_MOMENTS)


# --- the gateways --------------------------------------------------------------------------------------


class RestlessGateway(Gateway):
    """A gateway that is started again whenever it is gone, as systemd would."""

    def __init__(
        self,
        name: str,
        folder: Path,
        settings: dict[str, dict[str, Any]],
        heard: Callable[[str, dict[str, Any]], None],
    ) -> None:
        super().__init__(folder, settings, PROGRAM, {"STATE_DIRECTORY": str(folder)})
        self.name = name
        self.state = "down"  # starting, ready, stopping, frozen
        self.starts = 0
        self.faults: list[str] = []  # what it should never have said, and ends that nobody wished
        self.wished = False  # that it ends
        self.on_ready: Callable[[], None] = lambda: None
        self._heard = heard
        self._file: IO[bytes] = (folder / f"{name}.log").open("ab", buffering=0)
        self._closing = False

    def _environment(self) -> dict[str, str]:
        # Measuring what runs through a process that is killed only makes it slow.
        return {name: value for name, value in super()._environment().items() if "COVERAGE" not in name}

    async def live(self, may_fail: Callable[[], bool]) -> None:
        """Start it over and over until `close`; `may_fail` says when a start may be in vain."""
        while not self._closing:
            self.state, self.wished, self.stderr = "starting", False, ""
            self.starts += 1
            try:
                await self.start()
            except AssertionError as error:
                if self._process is not None and self._process.returncode is None:
                    await self.kill()
                    self.faults.append(f"{self.name} was not ready in time")
                elif not (self.wished or may_fail()):
                    self.faults.append(f"{self.name}: {error}")
                await asyncio.sleep(0.1 if self.wished else 0.5)
            else:
                self.state = "ready"
                self.on_ready()
                await self._outlive()
            self.state = "down"

    async def _outlive(self) -> None:
        assert self._process is not None
        code = await self._process.wait()
        await asyncio.gather(*self._readers)
        if not self.wished or code not in {0, -signal.SIGKILL}:
            self.faults.append(f"{self.name} ended with {code}: {self.stderr[-2000:]}")
        elif "Traceback" in self.stderr:
            self.faults.append(f"{self.name} wrote: {self.stderr[-2000:]}")

    @property
    def lives(self) -> bool:
        """Whether there is a process that nobody has killed yet."""
        return self.state != "down" and self._process is not None and self._process.returncode is None

    def strike(self, number: signal.Signals) -> None:
        """Send a signal; those that end it end it by our wish."""
        self.wished = self.wished or number in {signal.SIGKILL, signal.SIGTERM}
        with contextlib.suppress(ProcessLookupError):
            if self._process is not None:
                self._process.send_signal(number)

    async def gone(self, patience: float = 10.0) -> bool:
        """Return when it has ended, and whether it did in time."""
        process = self._process  # by then there may be a new one
        assert process is not None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await process.wait()
        return process.returncode is not None

    async def close(self) -> None:
        """Stop it for good; say what is wrong if it does not stop as it should."""
        self._closing = True
        if self.state == "ready":
            self.strike(signal.SIGTERM)
            if not await self.gone(LONGEST_STOP):
                self.faults.append(f"{self.name} did not stop within {LONGEST_STOP:.0f} s")
        if self._process is not None and self._process.returncode is None:
            self.strike(signal.SIGKILL)
            await self.gone()
        self._file.close()

    async def _read_log(self) -> None:
        """Write the log to a file, and keep its last lines only."""
        assert self._process is not None
        assert self._process.stdout is not None
        async for raw in self._process.stdout:
            self._file.write(raw)
            with contextlib.suppress(ValueError):
                line = json.loads(raw)
                self.log.append(line)
                self._heard(self.name, line)
                if line["event"] == "task_failed" or "Traceback" in line.get("exception", ""):
                    self.faults.append(f"{self.name} said: {raw.decode(errors='replace').strip()}")
            if len(self.log) > LINES_KEPT:
                del self.log[: LINES_KEPT // 2]


# --- the store -----------------------------------------------------------------------------------------


class Storage:
    """The database that the gateways use, looked at from outside; on PostgreSQL also taken away."""

    def __init__(self, folder: Path, server: Server | None) -> None:
        self.server = server
        self.away = False
        self._back = -math.inf  # monotonic
        self._path = folder / "gateway.db"
        self.url = f"sqlite:///{self._path}" if server is None else server.create()

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """Look into it."""
        if self.server is None:
            return rows(self._path, query)
        with psycopg.connect(self.url) as connection:
            return connection.execute(query.encode()).fetchall()

    async def restart(self, how: signal.Signals, seconds: float) -> None:
        """Take PostgreSQL away for a while."""
        assert self.server is not None
        self.away = True
        await asyncio.to_thread(self.server.stop, how)
        await asyncio.sleep(seconds)
        await asyncio.to_thread(self.server.start)
        self.away, self._back = False, time.monotonic()

    @property
    def lately_away(self) -> bool:
        """Whether a start that began some seconds ago may not have found it."""
        return self.away or time.monotonic() - self._back < LONGEST_START

    def dump(self, folder: Path) -> None:
        """Write the tables of a server that will be gone into files; SQLite's file is there anyway."""
        if self.server is None:
            return
        with psycopg.connect(self.url) as connection:
            for table in ("mails", "faxes", "attempts", "history", "carrier_events", "outbox", "brakes"):
                query = f"COPY (SELECT * FROM {table}) TO STDOUT CSV HEADER"  # noqa: S608 -- names of ours
                with (
                    (folder / f"{table}.csv").open("wb") as file,
                    connection.cursor().copy(query.encode()) as lines,
                ):
                    for data in lines:
                        file.write(data)


# --- who strikes, and when -----------------------------------------------------------------------------


@dataclass(slots=True)
class Figures:
    """What was done to the gateways."""

    kills: Counter[str] = field(default_factory=Counter)  # by moment
    stops: int = 0
    freezes: int = 0
    database: Counter[str] = field(default_factory=Counter)
    alerts: Counter[str] = field(default_factory=Counter)  # by cause

    @property
    def killed(self) -> int:
        """How many SIGKILLs."""
        return self.kills.total()


@dataclass(slots=True)
class _Trap:
    moment: str
    deed: str
    sprung: asyncio.Event = field(default_factory=asyncio.Event)


class Executioner:
    """Kills, stops and freezes gateways, and takes the database away, until told to end."""

    def __init__(
        self, seed: int, gateways: Sequence[RestlessGateway], storage: Storage, figures: Figures, pause: float
    ) -> None:
        """`pause`: seconds between two deeds on average."""
        self._chance = random.Random(f"{seed} deeds")  # noqa: S311 -- repeatable on purpose
        self._gateways = gateways
        self._storage = storage
        self._figures = figures
        self._pause = pause
        self._trap: _Trap | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        for gateway in gateways:
            gateway.on_ready = lambda name=gateway.name: self._now("right after its start", name)  # type: ignore[misc]

    def waits_for(self, moment: str) -> bool:
        """Tell whether it lies in wait for that."""
        return self._trap is not None and self._trap.moment == moment

    async def reached(self, moment: str, gateway: str) -> bool:
        """Hear that a moment has come at a gateway; tell whether the gateway was killed there."""
        if not self.waits_for(moment):
            return False
        one = next(one for one in self._gateways if one.name == gateway)
        if one.state != "ready" or self._trap is None:
            return False
        trap, self._trap = self._trap, None
        trap.sprung.set()
        self._do(trap.deed, one, moment)
        if trap.deed == "kill":
            await one.gone()
        return trap.deed == "kill"

    def _now(self, moment: str, name: str) -> None:
        if self.waits_for(moment):
            self._start(self.reached(moment, name))

    def _start(self, what: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(what)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def run(self, enough: Callable[[], bool]) -> None:
        """Strike until there is `enough`; return when every deed is over."""
        while not enough():
            ready = await self._some_ready()
            await asyncio.sleep(min(self._chance.expovariate(1 / self._pause), 4 * self._pause))
            draw = self._chance.random()
            if self._storage.server is not None and draw < 0.04:
                if not self._storage.away:
                    self._start(self._take_database())
            elif len(self._gateways) > 1 and draw < 0.10:
                for gateway in self._gateways:
                    self._do("kill", gateway, "all gateways at once")
            elif draw < 0.16:
                self._do("kill", ready, "at any time")
                await self._once_more(ready)
            else:
                deed = self._chance.choices(("kill", "stop", "freeze"), weights=(88, 6, 4))[0]
                await self._strike(deed, ready)
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _some_ready(self) -> RestlessGateway:
        def ready() -> list[RestlessGateway]:
            return [gateway for gateway in self._gateways if gateway.state == "ready"]

        await until(ready, "a gateway to be ready", 60.0)
        return self._chance.choice(ready())

    async def _once_more(self, gateway: RestlessGateway) -> None:
        """Kill a gateway while it starts again, or right after."""
        if self._chance.random() < 0.5:
            trap = self._trap = _Trap("right after its start", "kill")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(15):
                    await trap.sprung.wait()
            self._trap = None
            return
        await gateway.gone()
        await asyncio.sleep(self._chance.uniform(0.2, 1.2))
        if gateway.state == "starting":
            self._do("kill", gateway, "during its start")

    async def _strike(self, deed: str, gateway: RestlessGateway) -> None:
        """Do it at a moment of choice, or at any time."""
        if self._chance.random() < 0.75:
            trap = self._trap = _Trap(self._chance.choice(MOMENTS), deed)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WAIT_FOR_MOMENT):
                    await trap.sprung.wait()
            self._trap = None
            if trap.sprung.is_set():
                return
        if gateway.state == "ready":
            self._do(deed, gateway, "at any time")

    def _do(self, deed: str, gateway: RestlessGateway, moment: str) -> None:
        match deed:
            case "kill":
                if not gateway.lives:
                    return
                self._figures.kills[moment] += 1
                gateway.strike(signal.SIGKILL)
                gateway.state = "down"
            case "stop":
                self._start(self._stop(gateway))
            case "freeze":
                self._start(self._freeze(gateway))

    async def _stop(self, gateway: RestlessGateway) -> None:
        self._figures.stops += 1
        gateway.strike(signal.SIGTERM)
        gateway.state = "stopping"
        if not await gateway.gone(LONGEST_STOP):
            gateway.faults.append(f"{gateway.name} did not stop within {LONGEST_STOP:.0f} s")
            gateway.strike(signal.SIGKILL)

    async def _freeze(self, gateway: RestlessGateway) -> None:
        """Let it sleep past its lease, and now and then past the last look at a doubt."""
        self._figures.freezes += 1
        gateway.strike(signal.SIGSTOP)
        gateway.state = "frozen"
        longest = short_leases.LAST_CHECK + 2.0
        await asyncio.sleep(self._chance.uniform(short_leases.CALL_LEASE + 0.5, longest))
        if gateway.state == "frozen":  # and not killed in its sleep
            gateway.strike(signal.SIGCONT)
            gateway.state = "ready"

    async def _take_database(self) -> None:
        how = self._chance.choice((signal.SIGQUIT, signal.SIGINT))
        self._figures.database[how.name] += 1
        await self._storage.restart(how, self._chance.uniform(1.0, 5.0))

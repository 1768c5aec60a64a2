"""A pool of warm child processes that do one job at a time and may be killed one by one.

In charge of the daemon's end of the pipe, whose other end is `child.serve`: a job and its answer are one line
of JSON each, so nothing that a child sends is ever unpickled or run.

Promises: a child that takes too long, grows too large or dies costs its own job and no other; it is replaced.
Children see an empty environment, stand outside the daemon's process group, so that a signal to the group
leaves running jobs alone, and end when the daemon ends, because their standard input does. Children that
cannot be started are tried again with growing pauses; until one lives, every job fails at once.

Fails: `ChildFailed` for the one job.
"""

import asyncio
import contextlib
import json
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal, cast

from gateway.child import MAX_LINE, Json

START_LIMIT = 30.0
"""Seconds for a child to import what it needs and say that it is ready."""
_FIRST_PAUSE = 0.1
_LAST_PAUSE = 30.0


class ChildFailed(Exception):
    """A job was not done, and nobody knows whether it can be.

    `reason` is "time" (limit passed, child killed), "died" (child ended or spoke nonsense, or none can be
    started), "fault" (the job raised in the child, which lives on; `detail` is the exception's class) or
    "closed" (the pool is shutting down).
    """

    def __init__(self, reason: Literal["time", "died", "fault", "closed"], detail: str = "") -> None:
        super().__init__(f"{reason} {detail}".rstrip())
        self.reason = reason
        self.detail = detail


class _Child:
    """One process, used by one job at a time."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        # Both are pipes, whatever the type says: the process was started so.
        self._jobs = cast("asyncio.StreamWriter", process.stdin)
        self._answers = cast("asyncio.StreamReader", process.stdout)
        self.jobs = 0

    @property
    def alive(self) -> bool:
        return self._process.returncode is None

    async def ask(self, job: Json, time_limit: float) -> Json:
        """Return the child's answer; raise ChildFailed ("time", "died"): the child must be killed then."""
        try:
            async with asyncio.timeout(time_limit):
                self._jobs.write(json.dumps(job).encode() + b"\n")
                await self._jobs.drain()
                answer = json.loads(await self._answers.readline())
        except TimeoutError:
            raise ChildFailed("time") from None
        except (OSError, RuntimeError, ValueError):  # pipe gone; answer cut, too long, too deep or not JSON
            raise ChildFailed("died") from None
        if not isinstance(answer, dict):
            raise ChildFailed("died")
        return answer

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def gone(self) -> None:
        await self._process.wait()


class Pool:
    """`size` children started by `command`, each doing one job at a time.

    `patience`: seconds that a job may wait before the pool calls itself full, whatever their number: small
    ones are done in no time; `time_limit`: seconds for one job, from its hand-over; `memory_limit`: octets of
    address space of a child; `recycle_after`: jobs before a child is replaced by a fresh one; `clock`:
    seconds that never step back.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        size: int,
        patience: float = 5.0,
        time_limit: float = 10.0,
        memory_limit: int = 512 * 1024 * 1024,
        recycle_after: int = 1000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._command = command
        self._size = size
        self._patience = patience
        self._clock = clock
        self._time_limit = time_limit
        self._memory_limit = memory_limit
        self._recycle_after = recycle_after
        self._idle: deque[_Child] = deque()
        self._turns: deque[tuple[float, asyncio.Future[_Child]]] = deque()  # with the time they began to wait
        self._keepers: list[asyncio.Task[None]] = []
        self._living = 0
        self._unstartable = False
        self._closed = False

    @property
    def full(self) -> bool:
        """Whether new work should be turned away now. Work already taken on may still be handed to `run`."""
        return bool(self._turns) and self._clock() - self._turns[0][0] > self._patience

    async def start(self) -> None:
        """Start the children and return when each has been tried once; raise ChildFailed if none lives."""
        tried = [asyncio.Event() for _ in range(self._size)]
        self._keepers = [asyncio.create_task(self._keep(event)) for event in tried]
        for event in tried:
            await event.wait()
        if not self._living:
            await self.close()
            raise ChildFailed("died")

    async def run(self, job: Json) -> Json:
        """Have `job` done by the next free child and return its answer; raise ChildFailed.

        Cancelling this ends the job: a child at work on it is killed and replaced.
        """
        child = await self._free_child()
        child.jobs += 1
        answered = False
        try:
            answer = await child.ask(job, self._time_limit)
            answered = True
        except ChildFailed as failure:
            raise ChildFailed("closed" if self._closed else failure.reason) from None
        finally:
            if answered and child.jobs < self._recycle_after:
                self._hand_on(child)
            else:
                child.kill()
        if "failed" in answer:
            raise ChildFailed("fault", str(answer["failed"])[:100])
        return answer

    async def close(self) -> None:
        """Kill every child; jobs at work or waiting fail with "closed". Never raises, may be called twice."""
        self._closed = True
        self._fail_turns("closed")
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)

    async def _free_child(self) -> _Child:
        if self._closed:
            raise ChildFailed("closed")
        while self._idle:
            child = self._idle.popleft()
            if child.alive:
                return child
        if self._unstartable:
            raise ChildFailed("died")
        turn: asyncio.Future[_Child] = asyncio.get_running_loop().create_future()
        place = (self._clock(), turn)
        self._turns.append(place)
        try:
            return await turn
        except asyncio.CancelledError:
            with contextlib.suppress(ValueError):
                self._turns.remove(place)
            if not turn.cancelled() and not turn.exception():  # handed over at that very moment
                self._hand_on(turn.result())
            raise

    def _hand_on(self, child: _Child) -> None:
        """Give a free child to the job that has waited longest, or let it wait for one."""
        if not child.alive:
            return
        if turn := self._next_turn():
            turn.set_result(child)
        else:
            self._idle.append(child)

    def _fail_turns(self, reason: Literal["died", "closed"]) -> None:
        while turn := self._next_turn():
            turn.set_exception(ChildFailed(reason))

    def _next_turn(self) -> asyncio.Future[_Child] | None:
        """Take the job that has waited longest off the queue, passing over those cancelled meanwhile."""
        while self._turns:
            _, turn = self._turns.popleft()
            if not turn.done():
                return turn
        return None

    async def _keep(self, tried: asyncio.Event) -> None:
        """Keep one child alive while the pool is open: start it, wait for its end, start the next."""
        pause = _FIRST_PAUSE
        while True:
            child = await self._started()
            if child:
                self._living += 1
                self._unstartable = False
                self._hand_on(child)
                tried.set()
                try:
                    await child.gone()
                finally:
                    self._living -= 1
                    await self._bury(child)
            else:
                self._unstartable = not self._living
                if self._unstartable:
                    self._fail_turns("died")
                tried.set()
            if child and child.jobs:
                pause = _FIRST_PAUSE
            else:  # it cannot start or does not live: trying at once again would only burn the processor
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LAST_PAUSE)

    async def _started(self) -> _Child | None:
        """Return a child that said it is ready, or None."""
        starting = asyncio.ensure_future(
            asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                cwd="/",
                env={},
                start_new_session=True,
                limit=MAX_LINE,
            )
        )
        try:
            child = _Child(await asyncio.shield(starting))
        except OSError:
            return None
        except asyncio.CancelledError:
            with contextlib.suppress(OSError):  # it runs, or will in a moment, and nobody else knows of it
                await self._bury(_Child(await starting))
            raise
        ready = False
        try:
            limits = {"memory": self._memory_limit, "seconds": math.ceil(self._time_limit) + 1}
            ready = await child.ask(limits, START_LIMIT) == {"ready": True}
        except ChildFailed:
            return None
        finally:
            if not ready:
                await self._bury(child)
        return child if ready else None

    async def _bury(self, child: _Child) -> None:
        child.kill()
        with contextlib.suppress(ValueError):
            self._idle.remove(child)
        await child.gone()

import asyncio
import io
import json
import os
import resource
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from gateway.child import MAX_LINE, Json, serve
from gateway.children import ChildFailed, Pool

# A child that does as it is told: each job names what to do.
OBEDIENT = """
import os, resource, sys, time
from gateway.child import serve

def echo(job): return {"echo": job["word"], "pid": os.getpid()}
def hang(job):
    open(job["sign"], "w").write(str(os.getpid()))
    time.sleep(1000)
def spin(job):
    while True: pass
def eat(job): return {"size": len(bytearray(1 << 40))}
def die(job): os.abort()
def fail(job): raise ValueError("never told: " + job["word"])
def say(job): os.write(1, job["word"].encode() + b"\\n"); time.sleep(1000)
def long(job): return {"word": "x" * job["size"]}
def look(job):
    names = ("AS", "CORE", "CPU", "NOFILE")
    limits = {name: resource.getrlimit(getattr(resource, "RLIMIT_" + name)) for name in names}
    return limits | {"pid": os.getpid(), "session": os.getsid(0), "cwd": os.getcwd(),
                     "environment": dict(os.environ), "stderr": os.readlink("/proc/self/fd/2")}

serve(lambda job: globals()[job["do"]](job), sys.stdin.buffer, sys.stdout.buffer)
"""
COMMAND = (sys.executable, "-I", "-c", OBEDIENT)

Opened = Callable[..., Awaitable[Pool]]


@pytest.fixture
async def opened() -> AsyncIterator[Opened]:
    """Open pools that are closed at the end of the test."""
    pools: list[Pool] = []

    async def start(size: int = 1, time_limit: float = 60.0, **settings: Any) -> Pool:
        pool = Pool(COMMAND, size=size, time_limit=time_limit, **settings)
        pools.append(pool)
        await pool.start()
        return pool

    yield start
    for pool in pools:
        await pool.close()


def echo(word: str) -> Json:
    """Return a job that answers with its word."""
    return {"do": "echo", "word": word}


async def until(condition: Callable[[], object]) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110  # what is waited for happens in other processes
            await asyncio.sleep(0.005)


async def hanging(pool: Pool, sign: Path) -> tuple[asyncio.Task[Json], int]:
    """Give the pool a job without end; return it at work, and the process that is at it."""
    task = asyncio.create_task(pool.run({"do": "hang", "sign": str(sign)}))
    await until(lambda: task.done() or (sign.exists() and sign.read_text()))
    return task, int(sign.read_text())  # noqa: ASYNC240  # six characters


def ended(pid: int) -> bool:
    """Whether a process is gone."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


async def failure(job: Awaitable[Json]) -> ChildFailed:
    """Return why a job failed."""
    with pytest.raises(ChildFailed) as caught:
        await job
    return caught.value


async def served(pool: Pool) -> int:
    """Return the process that does the next job, having seen that it is done."""
    answer = await pool.run(echo("still here"))
    assert answer["echo"] == "still here"
    return int(answer["pid"])


async def test_answers_find_their_jobs(opened: Opened) -> None:
    """Many jobs at once all get their own answers, from no more children than allowed."""
    pool = await opened(size=2)
    answers = await asyncio.gather(*(pool.run(echo(str(n))) for n in range(50)))
    assert [answer["echo"] for answer in answers] == [str(n) for n in range(50)]
    assert len({answer["pid"] for answer in answers}) == 2


async def test_child_stands_alone(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child sees no environment of the daemon's, has its own session and dumps no core."""
    monkeypatch.setenv("FAX_GATEWAY_TELNYX__API_KEY", "KEY-secret")
    found = await (await opened(memory_limit=1 << 30)).run({"do": "look"})
    assert "KEY-secret" not in json.dumps(found)
    assert set(found["environment"]) <= {"LC_CTYPE"}  # which the interpreter sets itself
    assert (found["session"], found["cwd"], found["stderr"]) == (found["pid"], "/", "/dev/null")
    assert found["AS"] == [1 << 30, 1 << 30]
    assert (found["CORE"], found["NOFILE"]) == ([0, 0], [64, 64])
    assert 61 <= found["CPU"][0] <= 65


async def test_hanging_job_costs_only_itself(opened: Opened, tmp_path: Path) -> None:
    """A document that hangs is killed at the limit, while its neighbours and successors are served."""
    pool = await opened(size=2, time_limit=1.0)
    task, pid = await hanging(pool, tmp_path / "sign")
    neighbours = [await served(pool) for _ in range(5)]
    assert not task.done()
    assert (await failure(task)).reason == "time"
    await until(lambda: ended(pid))
    assert pid not in [*neighbours, await served(pool), await served(pool)]


async def test_busy_loop_is_killed(opened: Opened) -> None:
    """A document that keeps the processor busy is killed like one that waits."""
    pool = await opened(time_limit=0.5)
    assert (await failure(pool.run({"do": "spin"}))).reason == "time"
    await served(pool)


@pytest.mark.parametrize("do", ["eat", "die"])
async def test_child_that_bursts_costs_only_its_job(opened: Opened, tmp_path: Path, do: str) -> None:
    """A document that eats all memory, or crashes the library, ends its own child and no other."""
    pool = await opened(size=2)
    neighbour, pid = await hanging(pool, tmp_path / "sign")
    assert (await failure(pool.run({"do": do}))).reason == "died"
    assert await served(pool) != pid
    assert not neighbour.done()
    assert not ended(pid)


async def test_kill_of_a_busy_child(opened: Opened, tmp_path: Path) -> None:
    """A child killed from outside fails its job, and another takes its place."""
    pool = await opened()
    task, pid = await hanging(pool, tmp_path / "sign")
    os.kill(pid, signal.SIGKILL)
    assert (await failure(task)).reason == "died"
    assert await served(pool) != pid


async def test_kill_of_an_idle_child(opened: Opened) -> None:
    """A child killed while it waits is replaced before anybody misses it."""
    pool = await opened(size=2)
    first = await served(pool)
    (killed,) = [child for child in pool._idle if child._process.pid == first]
    os.kill(first, signal.SIGKILL)
    await until(lambda: len(pool._idle) == 2 and killed not in pool._idle)
    assert first not in await asyncio.gather(*(served(pool) for _ in range(10)))


async def test_dead_child_is_not_given_a_job(opened: Opened) -> None:
    """A child that ended just now, its place not yet filled, is passed over."""
    pool = await opened(size=2)
    dying = pool._idle[0]
    dying.kill()
    await dying.gone()
    pool._idle.appendleft(dying)  # as if its keeper had not run yet
    await served(pool)
    pool._hand_on(dying)
    assert dying not in pool._idle


async def test_fault_in_a_job_tells_its_class_only(opened: Opened) -> None:
    """An unexpected exception in a job is told by its class alone; the child lives."""
    pool = await opened()
    before = await served(pool)
    failed = await failure(pool.run({"do": "fail", "word": "secret"}))
    assert (failed.reason, failed.detail, str(failed)) == ("fault", "ValueError", "fault ValueError")
    assert await served(pool) == before


@pytest.mark.parametrize("word", ["not JSON", "[1, 2]", "[" * 100_000, '"half'])
async def test_nonsense_from_a_child(opened: Opened, word: str) -> None:
    """A child that answers nonsense is taken for what it is, and killed."""
    pool = await opened()
    before = await served(pool)
    assert (await failure(pool.run({"do": "say", "word": word}))).reason == "died"
    assert await served(pool) != before


async def test_endless_answer(opened: Opened) -> None:
    """An answer may be long, and not endless."""
    pool = await opened()
    answer = await pool.run({"do": "long", "size": MAX_LINE - 100})
    assert len(answer["word"]) == MAX_LINE - 100
    assert (await failure(pool.run({"do": "long", "size": 3 * MAX_LINE}))).reason == "died"
    await served(pool)


async def test_cancelled_job_frees_its_child(opened: Opened, tmp_path: Path) -> None:
    """When a client leaves, its job ends and the pool goes on with a fresh child."""
    pool = await opened()
    task, pid = await hanging(pool, tmp_path / "sign")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: ended(pid))
    assert await served(pool) != pid


async def test_cancelled_wait_leaves_the_queue(opened: Opened, tmp_path: Path) -> None:
    """A job cancelled while it waits gives up its place, and those behind it move up."""
    pool = await opened()
    busy, _ = await hanging(pool, tmp_path / "sign")
    waiting = [asyncio.create_task(pool.run(echo(str(n)))) for n in range(3)]
    await until(lambda: len(pool._turns) == 3)
    waiting[0].cancel()
    waiting[2].cancel()
    await asyncio.wait([waiting[0], waiting[2]])
    assert len(pool._turns) == 1
    busy.cancel()
    assert (await waiting[1])["echo"] == "1"


async def test_cancelled_as_its_turn_comes(opened: Opened) -> None:
    """A job cancelled in the moment a child is given to it gives the child back."""
    pool = await opened()
    child = await pool._free_child()
    waiting = [asyncio.create_task(pool.run(echo(str(n)))) for n in range(2)]
    await until(lambda: len(pool._turns) == 2)
    pool._hand_on(child)
    waiting[0].cancel()
    assert (await waiting[1])["echo"] == "1"
    assert waiting[0].cancelled()
    child = await pool._free_child()
    late = asyncio.create_task(pool.run(echo("late")))
    await until(lambda: pool._turns)
    late.cancel()
    pool._hand_on(child)  # its turn is over, though it has not had time to say so
    await served(pool)


async def test_full_at_the_limit(opened: Opened, tmp_path: Path) -> None:
    """The pool calls itself full while a job has waited for too long, however many wait, and no longer."""
    times = [100.0]
    pool = await opened(patience=5.0, clock=lambda: times[-1])
    busy, _ = await hanging(pool, tmp_path / "sign")
    times.append(110.0)
    full = [pool.full]  # nothing waits
    waiting = [asyncio.create_task(pool.run(echo(str(n)))) for n in range(50)]
    await until(lambda: len(pool._turns) == 50)
    for now in (114.0, 116.0):
        times.append(now)
        full.append(pool.full)
    busy.cancel()
    await asyncio.gather(*waiting)
    assert [*full, pool.full] == [False, False, True, False]


async def test_child_is_replaced_after_its_share(opened: Opened) -> None:
    """A child does only so many jobs, so that what a library leaks does not add up."""
    pool = await opened(recycle_after=3)
    pids = [await served(pool) for _ in range(7)]
    assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [3, 3, 1]


async def test_closing_fails_all_jobs(opened: Opened, tmp_path: Path) -> None:
    """Closing ends every child at once; jobs at work, waiting and to come fail as closed."""
    pool = await opened()
    busy, pid = await hanging(pool, tmp_path / "sign")
    waiting = asyncio.create_task(pool.run(echo("x")))
    await until(lambda: pool._turns)
    await pool.close()
    assert ended(pid)
    assert [(await failure(job)).reason for job in (busy, waiting, pool.run(echo("y")))] == ["closed"] * 3
    await pool.close()


@pytest.mark.parametrize(
    "command",
    [
        ("/no/such/program",),
        ("/bin/sh", "-c", ":"),  # over before it is spoken to
        (sys.executable, "-I", "-c", ""),
        (sys.executable, "-I", "-c", "print(1)"),
    ],
)
async def test_children_that_cannot_start(command: tuple[str, ...]) -> None:
    """A pool without a single child says so at the start instead of letting mails wait."""
    pool = Pool(command, size=2)
    assert (await failure(pool.start())).reason == "died"  # type: ignore[arg-type]  # start returns nothing
    assert (await failure(pool.run(echo("x")))).reason == "closed"


def fickle(bad: Path, log: Path) -> tuple[str, ...]:
    """Return the command for a child that notes its start in `log` and ends at once while `bad` exists."""
    script = f"open({str(log)!r}, 'a').write('x'); import os; os.path.exists({str(bad)!r}) and os._exit(1)\n"
    return (sys.executable, "-I", "-c", script + OBEDIENT)


async def test_children_that_cannot_start_again(tmp_path: Path) -> None:
    """When no child can be started again, jobs fail at once without a busy loop, until one lives."""
    bad, log = tmp_path / "bad", tmp_path / "log"
    pool = Pool(fickle(bad, log), size=1, time_limit=60.0)
    await pool.start()
    try:
        bad.touch()
        first = [asyncio.create_task(pool.run({"do": "die"})), asyncio.create_task(pool.run(echo("waits")))]
        assert [(await failure(job)).reason for job in first] == ["died", "died"]
        for _ in range(100):
            assert (await failure(pool.run(echo("x")))).reason == "died"
        assert len(log.read_text()) <= 3
        bad.unlink()
        await until(lambda: not pool._unstartable)
        await served(pool)
    finally:
        await pool.close()


async def test_one_child_that_cannot_start_again_leaves_the_others(tmp_path: Path) -> None:
    """While one place cannot be filled, the other children go on serving."""
    bad, log = tmp_path / "bad", tmp_path / "log"
    pool = Pool(fickle(bad, log), size=2, time_limit=60.0)
    await pool.start()
    try:
        bad.touch()
        os.kill(await served(pool), signal.SIGKILL)
        await until(lambda: len(log.read_text()) > 3)
        for _ in range(20):
            await served(pool)
    finally:
        await pool.close()


async def test_children_end_with_the_daemon(tmp_path: Path) -> None:
    """When the daemon is killed, its children end by themselves."""
    script = (
        "import asyncio\nfrom gateway.children import Pool\n"
        f"async def main():\n    pool = Pool({COMMAND!r}, size=1)\n    await pool.start()\n"
        "    print((await pool.run({'do': 'look'}))['pid'], flush=True)\n    await asyncio.sleep(1000)\n"
        "asyncio.run(main())"
    )
    daemon = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE, cwd=tmp_path
    )
    assert daemon.stdout
    pid = int(await daemon.stdout.readline())
    assert not ended(pid)
    daemon.kill()
    await daemon.wait()
    await until(lambda: ended(pid))


# The child's side


def conversation(
    handle: Callable[[Json], Json], *jobs: Json
) -> tuple[list[Json], list[tuple[int, int, int]]]:
    """Serve these jobs in this process; return the answers and the limits that were asked for."""
    lines = b"".join(
        json.dumps(line).encode() + b"\n" for line in ({"memory": 1 << 29, "seconds": 11}, *jobs)
    )
    answers, asked = io.BytesIO(), []
    serve(handle, io.BytesIO(lines), answers, lambda kind, pair: asked.append((kind, *pair)))
    return [json.loads(line) for line in answers.getvalue().splitlines()], asked


def test_child_limits_itself() -> None:
    """A child limits its memory and files once, and its processor time anew for each job."""
    answers, asked = conversation(lambda job: {"n": job["n"] + 1}, {"n": 1}, {"n": 2})
    assert answers == [{"ready": True}, {"n": 2}, {"n": 3}]
    kinds = [kind for kind, _, _ in asked]
    assert kinds.count(resource.RLIMIT_CPU) == 2
    assert (resource.RLIMIT_AS, 1 << 29, 1 << 29) in asked
    used = resource.getrusage(resource.RUSAGE_SELF)
    assert asked[-1][1] >= used.ru_utime + used.ru_stime + 10


def test_child_goes_on_after_a_fault_and_ends_after_lack_of_memory() -> None:
    """A job that raises is answered with the class; for lack of memory the child ends without a word."""

    def handle(job: Json) -> Json:
        if job["n"] == 2:
            raise MemoryError
        return {"n": 1 // job["n"]}

    answers, _ = conversation(handle, {"n": 0}, {"n": 1}, {"n": 2}, {"n": 1})
    assert answers == [{"ready": True}, {"failed": "ZeroDivisionError"}, {"n": 1}]


def test_child_without_a_daemon() -> None:
    """A child whose daemon is gone before the first word ends in silence."""
    answers = io.BytesIO()
    serve(lambda job: job, io.BytesIO(), answers)
    assert not answers.getvalue()

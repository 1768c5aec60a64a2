"""A start, and operators' commands, on a database that somebody else has: told in a line, and harmless."""

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import pytest_asyncio
from crashes import locked, rows
from harness import PATIENCE, Gateway, World, numbers, until, world
from shims import shim

pytestmark = pytest.mark.asyncio(loop_scope="module")
FREE = numbers()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def w(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """One world for all tests of this file; at its end every fax has exactly one final reply."""
    async with world(tmp_path_factory.mktemp("start"), retries={"no_answer": ["1h"]}) as made:
        yield made
        await made.everyone_told()


def store_of(w: World) -> Path:
    """Return the database's file."""
    return w.gateway.folder / "gateway.db"


@contextlib.contextmanager
def taken(database: Path) -> Iterator[None]:
    """Keep everybody else from writing to the store, and from reading it; nobody may have it open."""
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("PRAGMA locking_mode=EXCLUSIVE")
        connection.execute("BEGIN EXCLUSIVE")
        connection.execute("UPDATE faxes SET version = version WHERE id = ''")
        yield
        connection.execute("ROLLBACK")


def _write(database: Path, statement: str) -> None:
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute(statement)


async def _refused(gateway: Gateway, *words: str) -> tuple[int, str]:
    """Run a command that must end by itself; return its exit code and its one line about what is wrong."""
    async with asyncio.timeout(PATIENCE):
        code, _, errors = await gateway.run(*words)
    (line,) = errors.splitlines()
    return code, line


# --- the daemon ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lock", [locked, taken])
async def test_a_start_on_a_locked_database_is_told_and_a_later_one_works(
    w: World, lock: Callable[[Path], AbstractContextManager[None]]
) -> None:
    """While another program has the database, `serve` ends with exit code 69 and says so; then it starts."""
    assert await w.gateway.stop() == 0
    with lock(store_of(w)):
        code, line = await _refused(w.gateway, "serve")
    assert code == 69
    assert line.startswith("fax-gateway: cannot start: the database cannot be used now: ")
    assert "locked" in line
    await w.restart()
    (reply,) = await w.replies(next(FREE))
    assert reply["X-Fax-Outcome"] == "delivered"


async def test_a_start_that_cannot_take_over_open_calls_is_told_and_a_later_one_does(w: World) -> None:
    """When the database fails as the last process's calls are looked at: 69, a line, and no second call."""
    number, accepted, lost = next(FREE), asyncio.Event(), asyncio.Event()

    async def lose_the_answer(step: str, told: dict[str, str]) -> None:
        if step == "accepted" and told["to"] == number:
            accepted.set()
            await lost.wait()

    w.on_step = lose_the_answer
    mail_id = await w.mail(number)
    async with asyncio.timeout(PATIENCE):
        await accepted.wait()
    await w.gateway.kill()
    lost.set()
    w.on_step = None
    _write(
        store_of(w),
        "CREATE TRIGGER fault BEFORE UPDATE ON faxes BEGIN SELECT RAISE(ABORT, 'a fault of the disk'); END",
    )
    code, line = await _refused(w.gateway, "serve")
    assert code == 69
    assert line.startswith("fax-gateway: cannot start: the database cannot be used now: ")
    assert "a fault of the disk" in line
    assert rows(store_of(w), f"SELECT state FROM faxes WHERE mail_id = '{mail_id}'") == [("submitting",)]  # noqa: S608 -- ours
    _write(store_of(w), "DROP TRIGGER fault")
    await w.restart()
    assert w.gateway.said("call_in_doubt", faxes=1)
    assert (await w.reply(f"{mail_id}-1"))["X-Fax-Outcome"] == "delivered"
    assert len(w.taken(number)) == 1


@pytest.mark.parametrize("linked", ["file", "folder"])
async def test_a_database_under_another_name_is_the_same_one(w: World, tmp_path: Path, linked: str) -> None:
    """A second `serve` on the same file by way of a symbolic link is refused; the first one goes on."""
    store = store_of(w)
    link = tmp_path / "link"
    link.symlink_to(store if linked == "file" else store.parent)
    name = link if linked == "file" else link / store.name
    second = Gateway(tmp_path, w.gateway.settings | {"store": {"url": f"sqlite:///{name}"}})
    second.write_config()
    code, line = await _refused(second, "serve")
    assert code == 78
    assert "store.url: another `fax-gateway serve` uses the database" in line
    (reply,) = await w.replies(next(FREE))
    assert reply["X-Fax-Outcome"] == "delivered"


# Two programs may bind to a port, with SO_REUSEADDR, until one of them listens.
NO_LISTENING = """
#include <errno.h>
int listen(int socket, int backlog) { errno = EADDRINUSE; return -1; }
"""


async def test_a_port_on_which_somebody_else_listens_first_is_told(w: World, tmp_path: Path) -> None:
    """Whoever loses the race for a port is told so in a line, with exit code 69, as for any port in use."""
    settings = w.gateway.settings | {
        "store": {"url": f"sqlite:///{tmp_path}/gateway.db"},
        "smtp": {"listen": "127.0.0.1:0"},
        "http": {"listen": "127.0.0.1:0"},
    }
    second = Gateway(tmp_path, settings, environ={"LD_PRELOAD": str(shim(tmp_path, NO_LISTENING))})
    second.write_config()
    code, line = await _refused(second, "serve")
    assert code == 69
    assert line.startswith("fax-gateway: cannot start: smtp.listen or http.listen: ")
    assert "Address already in use" in line


# --- the commands ----------------------------------------------------------------------------------------

CHANGES = [["hold"], ["release"], ["cancel"], ["retry"], ["hold", "--all"], ["release", "--all"]]
LOOKS = [["list", "--json"], ["list"], ["show"]]


@pytest.mark.parametrize(
    ("lock", "serving", "commands"),
    [(locked, True, CHANGES), (taken, False, [*LOOKS, *CHANGES])],
    ids=["nobody may write", "nobody may read"],
)
async def test_a_command_on_a_database_that_stays_locked_gives_up(
    w: World,
    lock: Callable[[Path], AbstractContextManager[None]],
    serving: bool,  # noqa: FBT001 -- a parameter
    commands: list[list[str]],
) -> None:
    """An operator is told within seconds to try later, with exit code 75, and nothing was changed."""
    number, store = next(FREE), store_of(w)
    w.carrier.set_script({number: ["receiver_no_answer", "delivered"]})
    mail_id = await w.mail(number)
    await until(lambda: w.gateway.said("fax_requeued", fax=f"{mail_id}-1"), "the wait")
    before = _kept(store)
    if not serving:
        assert await w.gateway.stop() == 0
    with lock(store):
        answers = await asyncio.gather(
            *(
                _refused(w.gateway, *words, *([] if "--all" in words or "list" in words else [mail_id]))
                for words in commands
            )
        )
    assert {code for code, _ in answers} == {75}
    for _, line in answers:
        assert line.startswith("fax-gateway: the database cannot be used now: ")
        assert "locked" in line
    assert _kept(store) == before
    if not serving:
        await w.restart()
    assert await w.gateway.run("retry", mail_id) == (0, f"{mail_id}-1: queued\n", "")
    assert (await w.reply(f"{mail_id}-1"))["X-Fax-Outcome"] == "delivered"


def _kept(store: Path) -> list[tuple[object, ...]]:
    return [
        *rows(store, "SELECT id, state, version, due_at FROM faxes ORDER BY id"),
        *rows(store, "SELECT kind, scope FROM brakes"),
    ]

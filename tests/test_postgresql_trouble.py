"""PostgreSQL servers that go away, connections that break, sessions that stand in each other's way."""

import asyncio
import os
import signal
import socket
import threading
import time

import psycopg
import pytest
import servers
from harness import until
from postgres import Server
from servers import PATIENCE, execute, gateway, say, statement, words
from sqlalchemy.engine import Connection

from gateway import postgresql
from gateway.database import StoreUnavailable, Work
from gateway.postgresql import WRITERS, PostgresqlDatabase

url = servers.url
database = servers.database
machine = servers.machine


async def test_a_server_that_was_away_is_used_again(machine: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the server is away callers hear so at once; when it is back, all goes on by itself."""
    monkeypatch.setattr(postgresql, "AWAY_PAUSE", 0.1)
    machine.start()
    url = machine.create()
    async with gateway(url) as (database, bell):
        await database.write(statement("CREATE TABLE words (word TEXT)"))
        for place, how in enumerate((signal.SIGINT, signal.SIGQUIT)):
            await database.write(say(f"before {place}"))
            rung = bell.rung
            await asyncio.to_thread(machine.stop, how)
            began = time.monotonic()
            units = [ask(say("lost")) for ask in (database.write, database.read) * 20]
            outcomes = await asyncio.wait_for(asyncio.gather(*units, return_exceptions=True), PATIENCE)
            assert {type(outcome) for outcome in outcomes} == {StoreUnavailable}
            assert time.monotonic() - began < postgresql.CONNECT_LIMIT
            await asyncio.to_thread(machine.start)
            assert await bell.wait(rung + 1), "it listens again, and looks at what it may have missed"
            await until_written(database, f"after {place}")
        assert words(url) == {"before 0", "after 0", "before 1", "after 1"}
    machine.stop()


async def until_written(database: PostgresqlDatabase, word: str) -> None:
    """Ask until the store does it."""
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                await database.write(say(word))
            except StoreUnavailable:
                await asyncio.sleep(0)
            else:
                return


async def test_connections_that_were_cut_are_replaced(database: PostgresqlDatabase, url: str) -> None:
    """A failover of the server, or a firewall that forgot us, costs no mail."""
    await asyncio.gather(*(database.write(say(f"before {n}")) for n in range(2 * WRITERS)))
    cut = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = current_database()"
    assert execute(url, f"{cut} AND pid <> pg_backend_pid()")[0][0] != 0
    units = [database.write(say(f"after {n}")) for n in range(2 * WRITERS)]
    await asyncio.gather(*units, database.read(statement("SELECT 1")))
    assert len(words(url)) == 4 * WRITERS
    begun: list[int] = []

    def cut_off(connection: Connection) -> None:
        begun.append(connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one())
        if len(begun) == 1:
            execute(url, f"SELECT pg_terminate_backend({begun[0]}, 10000)")
        say("in the middle")(connection)

    await database.write(cut_off)
    assert len(set(begun)) == 2
    assert "in the middle" in words(url)


async def test_a_commit_that_nobody_answered_is_not_repeated(database: PostgresqlDatabase, url: str) -> None:
    """If the server falls silent during a commit, the caller hears that it is away: it may have happened."""
    execute(
        url,
        "CREATE FUNCTION die() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END $$; "
        "CREATE CONSTRAINT TRIGGER death AFTER INSERT ON words DEFERRABLE INITIALLY DEFERRED "
        "FOR EACH ROW EXECUTE FUNCTION die()",
    )
    begun: list[str] = []

    def once(connection: Connection) -> None:
        begun.append("")
        say("perhaps")(connection)

    with pytest.raises(StoreUnavailable, match="terminating connection"):
        await database.write(once)
    assert len(begun) == 1
    execute(url, "DROP TRIGGER death ON words")
    await database.write(say("next"))

    def cut_at_the_end(connection: Connection) -> None:
        driver = connection.connection.driver_connection
        assert driver is not None
        with socket.socket(fileno=os.dup(driver.fileno())) as line:
            line.shutdown(socket.SHUT_RDWR)

    with pytest.raises(StoreUnavailable, match=r"closed the connection|could not send"):
        await database.write(cut_at_the_end)
    await database.write(say("the server is there"))


async def test_a_gateway_that_froze_gives_its_locks_back(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who stands still in mid-work holds up no other gateway for long, and begins anew when it wakes."""
    monkeypatch.setitem(postgresql._LIMITS, "idle_in_transaction_session_timeout", "200ms")
    execute(url, "INSERT INTO words VALUES ('contended')")
    has_it, wake, begun = asyncio.Event(), threading.Event(), []
    loop = asyncio.get_running_loop()

    def freeze(connection: Connection) -> None:
        begun.append("")
        statement("UPDATE words SET word = word || ', frozen'")(connection)
        loop.call_soon_threadsafe(has_it.set)
        assert wake.wait(PATIENCE)
        connection.exec_driver_sql("SELECT 1")

    async with gateway(url) as (frozen, _), gateway(url) as (other, _):
        freezing = frozen.write(freeze)
        await has_it.wait()
        await other.write(statement("UPDATE words SET word = word || ', other'"))
        assert words(url) == {"contended, other"}
        wake.set()
        await freezing
    assert words(url) == {"contended, other, frozen"}
    assert len(begun) == 2


async def test_nobody_waits_for_a_lock_for_ever(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session of somebody else's that keeps a row locked costs callers one wait, not several."""
    monkeypatch.setitem(postgresql._LIMITS, "lock_timeout", "300ms")
    execute(url, "INSERT INTO words VALUES ('locked')")
    async with gateway(url) as (database, _):
        with psycopg.connect(url) as somebody:
            somebody.execute("UPDATE words SET word = 'theirs'")
            began = time.monotonic()
            with pytest.raises(StoreUnavailable, match="lock timeout"):
                await database.write(statement("UPDATE words SET word = 'ours'"))
            assert 0.3 <= time.monotonic() - began < 1.2
        await database.write(statement("UPDATE words SET word = word || ', then ours'"))
    assert words(url) == {"theirs, then ours"}


async def test_a_server_that_does_not_answer_is_told_in_words(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operator reads that there was no answer and for how long, and no name out of the program."""
    monkeypatch.setattr(postgresql, "ANSWER_LIMIT", 1.0)
    monkeypatch.setattr(postgresql._Connection, "patience", 1.0)
    async with gateway(url) as (database, _):
        with pytest.raises(StoreUnavailable, match=r"^no answer within 1 s$"):
            await database.write(statement("SELECT pg_sleep(15)"))


async def test_a_standby_that_never_comes_holds_nobody_up_for_ever(
    machine: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit that waits for a standby in vain is given up in time; told not to wait, all goes on."""
    limit = 1.0
    monkeypatch.setattr(postgresql, "ANSWER_LIMIT", limit)
    monkeypatch.setattr(postgresql._Connection, "patience", limit)
    monkeypatch.setattr(postgresql, "AWAY_PAUSE", 0.1)
    machine.start(wal_level="replica", max_wal_senders="1")
    url = machine.create()
    execute(url, "CREATE TABLE words (word TEXT); INSERT INTO words VALUES ('first')")
    lengthen = statement("UPDATE words SET word = word || '+' WHERE word LIKE 'first%'")
    async with gateway(url) as (database, _):
        _wait_for_standby(machine, "nobody")
        times = 0
        async with asyncio.timeout(PATIENCE):
            while (waited := await _refused(database, lengthen)) is None:
                times += 1  # the server has not heard of its setting yet
        assert limit <= waited < limit + 1.0
        _wait_for_standby(machine, "")
        await until_written(database, "last")
        # Nobody locks the row any more; what was refused had happened, which a caller must reckon with.
        await database.write(lengthen)
    assert words(url) == {"first" + "+" * (times + 2), "last"}
    machine.stop()


async def _refused(database: PostgresqlDatabase, work: Work[None]) -> float | None:
    """Return after how many seconds the work was refused, None if it was done."""
    began = time.monotonic()
    try:
        await database.write(work)
    except StoreUnavailable as error:
        assert str(error) == "no answer within 1 s"  # noqa: PT017 -- done is all right, too
        return time.monotonic() - began
    return None


def _wait_for_standby(machine: Server, name: str) -> None:
    """Let every commit wait for the standby of that name, or for none."""
    machine.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{name}'")
    machine.execute("SELECT pg_reload_conf()")


async def test_nobody_waits_for_a_thread_that_ended(url: str) -> None:
    """Should a fault of ours ever end a thread, whoever asks hears that the store is away; and it closes."""
    broken: list[Exception] = []

    def fault() -> None:
        raise RuntimeError("a fault of ours")

    database = PostgresqlDatabase(url, fault, broken.append)
    database.open(serve=False)
    await database.write(say("heard"))  # answered before the news
    await until(lambda: broken, "the end of the thread")
    with pytest.raises(StoreUnavailable, match="closed"):
        database.read(statement("SELECT 1"))
    await asyncio.wait_for(asyncio.to_thread(database.close), PATIENCE)
    assert [str(error) for error in broken] == ["a fault of ours"]

"""The store on a PostgreSQL server: opening, units of work, news between gateways."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import postgres
import pytest
import servers
import sqlalchemy as sa
from faxes import NUMBER
from harness import until
from postgres import Server
from servers import PATIENCE, WORDS, execute, gateway, say, statement, words
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.engine import Connection

from gateway import migrations, postgresql
from gateway.database import Conflict, NotYet, StoreError, StoreUnavailable, Work, WrongDatabase
from gateway.postgresql import PostgresqlDatabase
from gateway.schema import metadata

url = servers.url
database = servers.database
nothing = servers.nothing
machine = servers.machine


# --- opening -----------------------------------------------------------------------------------------


def test_gateways_that_start_at_once_create_the_tables_once(nothing: str) -> None:
    """An empty database is set up by one of several gateways; the others find it ready."""
    gateways = [PostgresqlDatabase(nothing) for _ in range(3)]
    with ThreadPoolExecutor() as pool:
        for opened in [pool.submit(gateway.open, serve=True) for gateway in gateways]:
            opened.result()
    assert execute(nothing, "SELECT version_num FROM alembic_version") == [(migrations.REVISIONS[-1],)]
    tables = {
        name for (name,) in execute(nothing, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    }
    assert tables == {*metadata.tables, "alembic_version"}
    for one in gateways:
        one.close()
        one.close()  # once more does no harm


def test_only_a_server_sets_a_database_up(nothing: str) -> None:
    """A command that meets an empty database says what is to be done, and changes nothing."""
    with pytest.raises(NotYet, match="no tables yet: start `fax-gateway serve` once, it makes them"):
        PostgresqlDatabase(nothing).open(serve=False)
    assert execute(nothing, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'") == []


@pytest.mark.parametrize("serve", [True, False])
def test_a_newer_database_is_left_alone(url: str, serve: bool) -> None:  # noqa: FBT001 -- a parameter
    """A program that is older than the other gateways' says so and does not start."""
    execute(url, "UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(WrongDatabase, match=r"newer fax-gateway \(revision 9999\): upgrade the program"):
        PostgresqlDatabase(url).open(serve=serve)
    assert execute(url, "SELECT version_num FROM alembic_version") == [("9999",)]


@pytest.mark.parametrize("setting", ["off", "local", "remote_write"])
@pytest.mark.parametrize("of", ["DATABASE {name}", "ROLE postgres IN DATABASE {name}"])
def test_a_server_that_may_forget_is_refused(url: str, setting: str, of: str) -> None:
    """A 250 is only said for what the server has on its disk: weaker settings end the start."""
    execute(url, f"ALTER {of.format(name=url.rpartition('/')[2])} SET synchronous_commit = {setting}")
    with pytest.raises(WrongDatabase, match=f"synchronous_commit = {setting} and may lose"):
        PostgresqlDatabase(url).open(serve=True)


@pytest.mark.parametrize("setting", ["fsync", "full_page_writes"])
def test_a_server_that_does_not_write_is_refused(machine: Server, setting: str) -> None:
    """Nor does a gateway work on a server whose settings give a crash the last word."""
    machine.start(**{setting: "off"})
    try:
        with pytest.raises(WrongDatabase, match=f"{setting} = off and may lose"):
            PostgresqlDatabase(machine.url("postgres")).open(serve=True)
    finally:
        machine.stop()


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_an_encoding_that_loses_letters_is_refused(encoding: str) -> None:
    """Names and subjects come from everywhere: only UTF8 holds them all."""
    server, name = postgres.server(), encoding.lower()
    server.execute(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING '{encoding}' LOCALE 'C'")
    with pytest.raises(WrongDatabase, match="encoding UTF8"):
        PostgresqlDatabase(server.url(name)).open(serve=True)
    server.drop(server.url(name))


async def test_of_two_servers_the_one_that_writes_is_used(url: str) -> None:
    """The URL of the manual with two hosts works, for reading too, while the first of them is away."""
    port, name = postgres.server().port, url.rpartition("/")[2]
    hosts = f"host=127.0.0.1:1&host=127.0.0.1:{port}"
    async with gateway(f"postgresql://postgres:hush@/{name}?{hosts}&target_session_attrs=read-write") as (
        one,
        _,
    ):
        await one.write(say("written"))
        assert await one.read(lambda connection: list(connection.execute(sa.select(WORDS)).scalars())) == [
            "written"
        ]


@pytest.mark.parametrize("serve", [True, False])
def test_no_server_is_told(serve: bool) -> None:  # noqa: FBT001 -- a parameter
    """Who starts before the server hears that it is away, and not the password that it was to be told."""
    server = postgres.server()
    absent = server.url("absent").replace("postgres@", "postgres:hush@")
    for url, cause in (
        (absent, '"absent" does not exist'),
        (absent.replace(f":{server.port}/", ":1/"), "refused"),
    ):
        with pytest.raises(StoreUnavailable, match=cause) as caught:
            PostgresqlDatabase(url).open(serve=serve)
        assert "hush" not in str(caught.value)


# --- units of work -----------------------------------------------------------------------------------


async def test_a_failing_unit_leaves_nothing(database: PostgresqlDatabase, url: str) -> None:
    """One mail that cannot be stored is not half there, and takes nothing from the others."""

    def half_done(connection: Connection) -> None:
        say("half")(connection)
        raise LookupError("the rest fails")

    units = [database.write(work) for work in (say("one"), half_done, say("two"))]
    outcomes = await asyncio.gather(*units, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [type(None), LookupError, type(None)]
    assert words(url) == {"one", "two"}


async def test_a_reader_sees_one_moment(database: PostgresqlDatabase, url: str) -> None:
    """What a list shows was true at one moment, whatever is committed meanwhile; and it changes nothing."""

    def look_twice(connection: Connection) -> list[list[str]]:
        seen = [list(connection.execute(sa.text("SELECT word FROM words")).scalars())]
        execute(url, "INSERT INTO words VALUES ('meanwhile')")
        return [*seen, list(connection.execute(sa.text("SELECT word FROM words")).scalars())]

    await database.write(say("before"))
    assert await database.read(look_twice) == [["before"], ["before"]]
    with pytest.raises(StoreUnavailable, match="read-only"):
        await database.read(say("smuggled"))


async def test_who_lost_a_race_begins_anew(database: PostgresqlDatabase, url: str) -> None:
    """What another gateway changed in between is looked at again, a few times; then the caller is told."""
    begun: list[str] = []

    def overtaken(times: int) -> Work[None]:
        def work(connection: Connection) -> None:
            begun.append("")
            say(f"take {len(begun)} of {times}")(connection)
            if len(begun) <= times:
                raise Conflict("another was faster")

        return work

    await database.write(overtaken(2))
    assert (len(begun), words(url)) == (3, {"take 3 of 2"})
    begun.clear()
    with pytest.raises(Conflict):
        await database.write(overtaken(99))
    assert (len(begun), words(url)) == (postgresql.TRIES, {"take 3 of 2"})


async def test_no_error_shows_a_value(database: PostgresqlDatabase) -> None:
    """Errors go to the log; the numbers of the people who fax do not."""
    await database.write(say(NUMBER))
    with pytest.raises(StoreUnavailable, match='unique constraint "words_word_key"') as caught:
        await database.write(say(NUMBER))
    assert NUMBER not in repr(caught.value)


async def test_the_clock_is_the_servers(
    database: PostgresqlDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leases of several machines are counted by one clock, however wrong a machine's own is."""
    monkeypatch.setattr(time, "time", lambda: 0.0)

    def look(connection: Connection) -> tuple[float, float]:
        asked = connection.exec_driver_sql(
            "SELECT extract(epoch FROM clock_timestamp())::float8"
        ).scalar_one()
        return database.clock(connection), asked

    for ask in (database.write, database.read):
        ours, asked = await ask(look)
        assert asked - 5 < ours <= asked


# --- news --------------------------------------------------------------------------------------------


async def test_the_news_of_another_gateway_comes_at_once(url: str) -> None:
    """What one gateway commits the other hears within half a second, and so does the one itself."""
    async with gateway(url) as (one, bell_of_one), gateway(url) as (_, bell_of_other):
        waits = []
        for turn in range(1, 6):
            began = time.monotonic()
            await one.write(say(f"word {turn}"))
            assert await bell_of_one.wait(turn)
            assert await bell_of_other.wait(turn)
            waits.append(time.monotonic() - began)
        assert sorted(waits)[2] < 0.5
        assert bell_of_one.rung == 5, "its own news do not come back to it"


async def test_what_changed_nothing_is_no_news(url: str) -> None:
    """Gateways that look and find nothing do not wake each other for ever."""
    execute(url, "INSERT INTO words VALUES ('old')")
    async with gateway(url) as (one, bell_of_one), gateway(url) as (_, bell_of_other):
        for work in (
            statement("SELECT 1"),
            lambda connection: connection.execute(
                WORDS.update().where(WORDS.c.word == "no").values(word="x")
            ),
            lambda connection: connection.execute(WORDS.delete().where(WORDS.c.word == "no")),
            lambda connection: connection.execute(insert(WORDS).values(word="old").on_conflict_do_nothing()),
            statement("SELECT * FROM words FOR UPDATE"),
        ):
            await one.write(work)
        with pytest.raises(LookupError):
            await one.write(undone)
        execute(url, "NOTIFY fax_gateway, 'somebody'")
        assert await bell_of_one.wait(1)
        assert await bell_of_other.wait(1)
        assert (bell_of_one.rung, bell_of_other.rung) == (1, 1)


def undone(connection: Connection) -> None:
    """Write, and fail."""
    say("undone")(connection)
    raise LookupError("the rest fails")


async def test_what_a_command_did_last_is_heard(url: str) -> None:
    """A command that changes several faxes and ends is heard after the last of them."""
    seen: list[set[object]] = []
    heard = threading.Event()

    def look() -> None:
        seen.append(words(url))
        heard.set()

    def heard_of(word: str) -> bool:
        return word in seen[-1]

    server = PostgresqlDatabase(url, look)
    server.open(serve=True)
    assert await asyncio.to_thread(heard.wait, PATIENCE)
    for turn in range(10):
        async with gateway(url, serve=False) as (command, _):
            for place in range(2):
                await command.write(say(f"{turn}.{place}"))
        await until(partial(heard_of, f"{turn}.1"), "the news of the last commit")
    await asyncio.to_thread(server.close)


async def test_closing_finishes_what_was_asked(database: PostgresqlDatabase, url: str) -> None:
    """What waited when the gateway was told to stop is still done; what comes later is refused at once."""

    async def go_on_saying() -> None:
        while True:
            units.append(database.write(say(f"late {len(units)}")))
            await asyncio.sleep(0)

    units = [database.write(say(str(n))) for n in range(100)]
    reading = database.read(statement("SELECT 1"))
    closing = asyncio.create_task(asyncio.to_thread(database.close))
    with pytest.raises(StoreError, match="closed"):
        await go_on_saying()
    await asyncio.gather(*units, reading, closing)
    assert len(words(url)) == len(units)

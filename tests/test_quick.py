"""An operator is answered at once: in 0.6 s with the queue, in 0.35 s with the help, on an idle machine."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.sqlite import SqliteDatabase

HEAVY = {
    "aiohttp",
    "aiosmtpd",
    "aiosmtplib",
    "alembic",
    "cryptography",
    "pikepdf",
    "PIL",
    "pypdfium2",
    "structlog",
}

LIST_SHARE, HELP_SHARE = 4.0, 2.5  # of the yardstick; on an idle machine they take 2 and 1


@pytest.fixture
def configuration(tmp_path: Path) -> Path:
    """Return a configuration with an empty database beside it."""
    url = f"sqlite:///{tmp_path}/gateway.db"
    database = SqliteDatabase(url)
    database.open(serve=True)
    database.close()
    path = tmp_path / "config.toml"
    path.write_text(
        '[telnyx]\napi_key = "KEY"\nconnection_id = "1"\nfrom_number = "+13127367276"\n'
        f'[replies]\npostmaster = "postmaster@example.com"\n[store]\nurl = "{url}"\n',
        encoding="utf-8",
    )
    path.chmod(0o600)
    return path


def answer(*arguments: str, python: tuple[str, ...] = ()) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Return the processor time of a command of the gateway's, and what it said."""
    return ran(*python, "-m", "gateway", *arguments)


def yardstick() -> float:
    """Return the processor time of some imports, now: a machine that is shared may be half as fast later."""
    return ran("-c", "import sqlalchemy")[0]


def ran(*arguments: str) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Return the processor time of Python with these arguments, and what it said."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environ, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before, done


def loaded(*arguments: str) -> set[str]:
    """Return the packages, and modules of the gateway, that a command loads."""
    _, done = answer(*arguments, python=("-X", "importtime"))
    names = re.findall(r"^import time:.*\| +(\S+)$", done.stderr, flags=re.MULTILINE)
    assert "gateway.cli" in names
    return {name if name.startswith("gateway.") else name.partition(".")[0] for name in names}


def test_list_answers_at_once(configuration: Path) -> None:
    """The queue is shown before an operator wonders: not long after the database's library is loaded."""
    shares = [answer("list", "--config", str(configuration))[0] / yardstick() for _ in range(3)]
    assert min(shares) < LIST_SHARE


def test_help_answers_at_once() -> None:
    """The commands are shown faster still."""
    assert min(answer("--help")[0] / yardstick() for _ in range(3)) < HELP_SHARE


def test_list_loads_only_what_it_needs(configuration: Path) -> None:
    """To show the queue, no door, document or carrier is made ready."""
    names = loaded("list", "--config", str(configuration))
    assert "sqlalchemy" in names
    assert not names & {*HEAVY, "rich"}


def test_help_loads_no_settings_and_no_store() -> None:
    """To show the commands, nothing is made ready at all."""
    assert not loaded("--help") & {*HEAVY, "pydantic", "phonenumbers", "sqlalchemy", "gateway.config"}

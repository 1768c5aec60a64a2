"""From the settings to the values that the parts take.

In charge of: the one place, besides `daemon` and `cli`, that reads `Settings`; nothing below sees them.

Promises: only the parts that a command needs are loaded, so that `list` answers at once.

Fails: `WrongDatabase` when the store cannot be opened.
"""

import contextlib
import fcntl
import itertools
import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from gateway.config import Settings
from gateway.database import Database
from gateway.records import Rules
from gateway.store import Store
from gateway.store_unit import News

POLL_WITHOUT_WEBHOOKS = 30.0  # seconds to the first question when no event will come
POLL_PAGE = 90.0  # seconds more for each page: transmission takes over a minute a page


def rules_of(settings: Settings) -> Rules:
    """Return what decides about retries, doubts and deadlines."""
    retries, telnyx = settings.retries, settings.telnyx
    webhooks = bool(telnyx.public_key)
    return Rules(
        waits={
            "busy": retries.busy,
            "no_answer": retries.no_answer,
            "line": retries.line,
            "provider": retries.provider,
            "declined": retries.declined,
        },
        max_calls=retries.max_calls,
        give_up_after=retries.give_up_after,
        delayed_after=settings.replies.delayed_after,
        doubt_checks=telnyx.doubt_checks,
        poll_first=telnyx.poll_after if webhooks else min(telnyx.poll_after, POLL_WITHOUT_WEBHOOKS),
        poll_page=POLL_PAGE if webhooks else 0.0,
    )


def hostname_of(settings: Settings) -> str:
    """Return the name that the gateway gives itself in greetings and message ids."""
    return settings.smtp.hostname or socket.getfqdn()


def open_store(
    settings: Settings,
    *,
    serve: bool,
    news: Callable[[], None] = lambda: None,
    broken: Callable[[Exception], None] = lambda _error: None,
    observe: Callable[[News], None] | None = None,
) -> Store:
    """Open the store; only with `serve` is it created or upgraded. Raises WrongDatabase."""
    database = _database(settings.store.url.get_secret_value(), news, broken)
    database.open(serve=serve)
    return Store(
        database,
        rules=rules_of(settings),
        postmaster=settings.replies.postmaster,
        observe=observe,
    )


def _database(url: str, news: Callable[[], None], broken: Callable[[Exception], None]) -> Database:
    if url.startswith("sqlite:"):
        from gateway.sqlite import SqliteDatabase  # noqa: PLC0415 -- the drivers take long to load

        return SqliteDatabase(url, news, broken)
    from gateway.postgresql import PostgresqlDatabase  # noqa: PLC0415 -- as above

    return PostgresqlDatabase(url, news, broken)


@contextlib.contextmanager
def workplace(settings: Settings, environ: Mapping[str, str]) -> Iterator[Path]:
    """Yield a folder for this gateway alone, where mails lie while they are prepared. Raises OSError.

    It is `incoming` beside the SQLite file, which only one gateway serves. Gateways with PostgreSQL take the
    first free of `incoming-1`, `incoming-2` … in the unit's state directory, else in one for temporary files,
    so that what a killed one left is swept by its successor.
    """
    url = settings.store.url.get_secret_value()
    if url.startswith("sqlite:"):
        yield Path(url.removeprefix("sqlite:///")).parent / "incoming"
        return
    base = environ.get("STATE_DIRECTORY")
    place = Path(base) if base else Path(tempfile.gettempdir(), f"email-fax-gateway-{os.getuid()}")
    place.mkdir(mode=0o700, exist_ok=True)
    if place.is_symlink() or place.stat().st_uid != os.getuid():
        raise OSError(f"{place} is not ours: set STATE_DIRECTORY to a folder that is")
    for number in itertools.count(1):
        with (place / f"incoming-{number}.lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield place / f"incoming-{number}"
            return

"""From the settings to the values that the parts take.

In charge of: the one place, besides `daemon` and `cli`, that reads `Settings`; nothing below sees them.

Promises: only the parts that a command needs are loaded, so that `list` answers at once.

Fails: `WrongDatabase` when the store cannot be opened.
"""

import socket
import time
from collections.abc import Callable

from gateway.config import Settings
from gateway.database import Database
from gateway.records import Rules
from gateway.store import Store
from gateway.store_apply import News

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
    observe: Callable[[News], None] | None = None,
) -> Store:
    """Open the store; only with `serve` is it created or upgraded. Raises WrongDatabase."""
    database = Database(settings.store.url, news)
    database.open(serve=serve)
    return Store(
        database,
        clock=time.time,
        rules=rules_of(settings),
        postmaster=settings.replies.postmaster,
        observe=observe,
    )

"""Starts the gateway with its waits of minutes made seconds; nothing else of it is changed.

    python tests/short_leases.py serve --config FILE

A crash run cannot wait two minutes for each POST that hangs, nor five for each reply that a dead gateway had
in its hands. What no setting shortens is shortened here, and what depends on the order of two times keeps
that order: a lease outlasts the longest POST, and the settings must put the last doubt check beyond both
(`LAST_CHECK` or later). The other way round, what counts the ends of a gateway that a fax may be to blame for
counts further than in life.
"""

import functools
from types import ModuleType

from gateway import (
    cli,
    daemon,
    dispatch,
    fax_steps,
    notify,
    store_brakes,
    store_outbox,
    store_work,
    telnyx,
    wiring,
)

POST_LIMIT = 1.5
CALL_LEASE = POST_LIMIT + 1.0
LAST_CHECK = CALL_LEASE + POST_LIMIT + 1.0
"""Seconds after the POST; `telnyx.doubt_checks` must not end earlier."""
REPLY_LIMIT = 3.0


def shorten() -> None:
    """Set the short times."""
    telnyx.POST_LIMIT = POST_LIMIT
    _give(telnyx, "Limits", connect=2.0, post=POST_LIMIT, question=POST_LIMIT)
    daemon.CALL_LEASE = CALL_LEASE
    daemon.DRAIN_LIMIT = POST_LIMIT + 1.0
    store_work.QUESTION_LEASE = POST_LIMIT + 2.0
    vars(daemon)["POST_LIMIT"] = POST_LIMIT  # imported there
    # A retry that meets a call which should have ended, and the events that nobody claimed.
    dispatch._STILL_OPEN = 2.0
    dispatch._SWEEP_EVERY = 2.0
    # After a 429 the whole queue stands still, for minutes after the second one.
    store_brakes._BRAKE_WAITS = {"pause": (1.0, 2.0), "hold": (1.0, 2.0)}
    fax_steps.APART = 0.2
    # Calls whose webhooks are lost are found by asking.
    wiring.POLL_PAGE = 0.0
    _give(wiring, "Rules", poll_longest=4.0, reason_wait=2.0)
    # Replies: how long a gateway may hold one in its hands, and the pauses after a refusal.
    _give(daemon, "Relay", timeout=REPLY_LIMIT)
    store_outbox.NOTICE_LEASE = REPLY_LIMIT + 2.0
    notify.RELAY_PAUSE = 1.0
    notify.FIRST_WAIT, notify.LONGEST_WAIT = 1.0, 2.0
    # No fax is to blame for a kill every few seconds, however many it meets.
    store_work.HARMFUL_AFTER = store_outbox.HARMFUL_AFTER = fax_steps.LOST_IN_A_ROW = 50


def _give(module: ModuleType, name: str, **times: float) -> None:
    """Let the module call what it knows by this name with these times, where it names none."""
    vars(module)[name] = functools.partial(vars(module)[name], **times)


if __name__ == "__main__":
    shorten()
    cli.main()

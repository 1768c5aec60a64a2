"""When the next call, question or check is due, and with which settings the next call is made."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from faxes import NOW, PAGES, RETRY_TWICE, RULES, Walk, at, doubted, queued_fax
from hypothesis import given
from hypothesis import strategies as st

from gateway.records import Rules, State
from gateway.schedule import (
    first_poll,
    last_check,
    next_check,
    next_poll,
    next_settings,
    stuck_limit,
    until_midnight,
)

BUSY, SILENT, DROPPED = "user_busy", "receiver_no_answer", "receiver_call_dropped"
FAULT, DECLINED = "service_unavailable", "receiver_decline"
SIGNALS, ECM, INCOMPATIBLE = (
    "fax_signaling_error",
    "invalid_ecm_response_from_receiver",
    "receiver_incompatible_destination",
)
FULL, DISABLED = "user_channel_limit_exceeded", "account_disabled"


def minutes(*values: float) -> list[float]:
    """Return seconds."""
    return [60.0 * value for value in values]


@pytest.mark.parametrize(
    ("reasons", "waits"),
    [
        ([BUSY] * 5, minutes(3, 6, 12, 20)),
        ([SILENT] * 4, minutes(15, 30, 60)),
        (["fax_initial_communication_timeout"] * 3, minutes(15, 30)),
        ([DROPPED] * 4, minutes(2, 10, 30)),
        (["destination_unreachable"] * 3, minutes(2, 10)),
        ([INCOMPATIBLE] * 2, minutes(2)),
        ([FAULT] * 4, minutes(5, 15, 60)),
        (["file_download_failed"] * 3, minutes(5, 15)),
        (["media_processing_exception"] * 2, minutes(5)),
        ([DECLINED] * 2, minutes(60)),
        ([DECLINED, "rejected"], minutes(60)),
        (["sender_canceled"] * 2, minutes(2)),
        (["modem_on_fire"] * 2, minutes(2)),
        ([BUSY, SILENT, DROPPED, FAULT, DECLINED], minutes(3, 15, 2, 5)),
        ([DROPPED, INCOMPATIBLE, INCOMPATIBLE], minutes(2, 10)),
        ([FULL, FULL, DISABLED, BUSY, FULL, BUSY, BUSY, BUSY, BUSY], minutes(0, 0, 0, 3, 0, 6, 12, 20)),
    ],
)
def test_waits(reasons: Sequence[str], waits: Sequence[float]) -> None:
    """Each kind of failure has its own growing waits, its cap, and five calls in all."""
    walk, found = Walk(), []
    for reason in reasons:
        walk.fail(reason)
        if walk.fax.state is State.QUEUED:
            found.append(walk.fax.due_at - walk.now)
    assert found == waits
    assert walk.fax.state is State.FAILED, "and no call after the last wait"


def test_contradiction_counts_as_a_call() -> None:
    """A call that failed with success was placed, so it is one of the five, also when an operator goes on."""
    walk = at("held, contradiction").make(RETRY_TWICE)
    for _ in range(3):
        assert walk.fail(BUSY).fax.state is State.QUEUED
    assert walk.fail(BUSY).fax.state is State.FAILED


def with_waits(max_calls: int = 5, **waits: tuple[float, ...]) -> Rules:
    """Return the rules with other waits."""
    return replace(RULES, max_calls=max_calls, waits=RULES.waits | waits)


@pytest.mark.parametrize(
    ("rules", "calls"),
    [
        (with_waits(busy=()), 1),
        (with_waits(busy=(0.0,)), 2),
        (with_waits(max_calls=1), 1),
        (with_waits(max_calls=3), 3),
        (with_waits(max_calls=9), 5),
    ],
)
def test_configured_waits(rules: Rules, calls: int) -> None:
    """An empty list means never again; the list and `max_calls` both limit the calls."""
    walk = Walk(rules=rules)
    while not walk.fax.final:
        walk.fail(BUSY)
    assert len(walk.fax.calls) == calls


@pytest.mark.parametrize(
    ("reasons", "quality", "t38"),
    [
        ([], "high", True),
        ([BUSY, BUSY], "high", True),
        ([INCOMPATIBLE], "high", False),
        ([ECM], "high", False),
        ([ECM, ECM], "high", True),
        ([SIGNALS], "high", True),
        ([SIGNALS, SIGNALS], "normal", False),
        ([SIGNALS, SIGNALS, SIGNALS], "normal", False),
        ([BUSY, SIGNALS], "normal", False),
        ([SIGNALS, BUSY], "normal", False),
        ([FULL, SIGNALS], "high", True),
        ([SIGNALS, ECM], "normal", True),
    ],
)
def test_settings_of_the_next_call(reasons: Sequence[str], quality: str, *, t38: bool) -> None:
    """A call that failed in its fax protocol is repeated in another mode, at last in a robust one."""
    walk = Walk()
    for reason in reasons:
        walk.fail(reason)
    assert next_settings(walk.fax, "high", t38=True) == (quality, t38)


def test_settings_start_from_the_configuration() -> None:
    """Where T.38 is switched off, another mode means with it, and robust still means less data."""
    assert next_settings(Walk().fail(ECM).fax, "normal", t38=False) == ("normal", True)
    assert next_settings(Walk().fail(INCOMPATIBLE).fax, "normal", t38=False) == ("normal", False)
    assert next_settings(Walk().fail(SIGNALS).fail(SIGNALS).fax, "very_high", t38=False) == ("normal", True)


def test_first_poll() -> None:
    """The first question comes 2 minutes and 90 s a page after the carrier took the fax."""
    assert first_poll(queued_fax(), RULES) == 120.0 + 90.0 * PAGES


@pytest.mark.parametrize(("age", "wait"), [(0, 120), (240, 120), (400, 200), (1800, 900), (86400, 900)])
def test_polls_grow_apart(age: float, wait: float) -> None:
    """A long call is asked about ever more rarely, at least every 15 minutes."""
    call = Walk().call().last
    assert call.taken_at is not None
    now = call.taken_at + age
    assert next_poll(call, now, RULES) == now + wait
    unknown = replace(call, taken_at=None, started_at=call.taken_at)
    assert next_poll(unknown, now, RULES) == now + wait


@pytest.mark.parametrize(
    ("age", "due"),
    [
        *[(0, 10), (9.9, 10), (10, 30), (45, 60), (60, 120), (299, 300), (300, 600)],
        *[(600, 610), (620, 630), (700, 750), (1000, 1200), (1800, 2400), (5000, 5600)],
    ],
)
def test_doubt_checks(age: float, due: float) -> None:
    """The checks of a doubt follow the configured times; the last one repeats, ever less often."""
    assert next_check(NOW, NOW + age, NOW + age, RULES) == NOW + due


@pytest.mark.parametrize(("late", "wait"), [(0, 600), (600, 600), (601, 10), (86400, 10)])
def test_a_doubt_is_asked_about_soon_after_an_outage(late: float, wait: float) -> None:
    """A fax that nobody could ask about for long does not wait another ten minutes."""
    now = NOW + 2 * 86400.0
    assert next_check(NOW, now - late, now, RULES) == now + wait


@pytest.mark.parametrize(("age", "last"), [(0, False), (599.9, False), (600, True), (9000, True)])
def test_last_check(age: float, *, last: bool) -> None:
    """Only a check after the last configured time may prove absence; a release counts anew."""
    doubt = Walk().begin().make(doubted()).last
    assert last_check(doubt, doubt.started_at + age, RULES) is last
    assert last_check(replace(doubt, doubted_at=None), doubt.started_at + age, RULES) is last
    released = replace(doubt, doubted_at=NOW + 5000.0)
    assert last_check(released, NOW + 5000.0 + age, RULES) is last


def test_stuck_limit() -> None:
    """A call of three pages counts as stuck after 1 h 9 min without news."""
    assert stuck_limit(queued_fax(), RULES) == 3600.0 + 3 * 180.0


@given(st.datetimes(min_value=datetime(2020, 1, 1), max_value=datetime(2100, 1, 1)))  # noqa: DTZ001 -- drawn naive, made UTC below
def test_until_midnight(moment: datetime) -> None:
    """A spend limit is waited for until shortly after the next 00:00 UTC, from any moment."""
    now = moment.replace(tzinfo=UTC).timestamp()
    again = datetime.fromtimestamp(now + until_midnight(now), UTC)
    assert (again.hour, again.minute) == (0, 5)
    assert 300.0 < until_midnight(now) <= 86400.0 + 300.0

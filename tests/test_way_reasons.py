"""Every way a call can fail, with real processes: how often each is tried, and what the sender reads."""

from collections.abc import AsyncIterator
from email.message import EmailMessage

import pytest
import pytest_asyncio
from harness import World, until, words, world

from gateway import reasons
from gateway.sandbox_behaviours import REASONS

pytestmark = pytest.mark.asyncio(loop_scope="module")

NUMBERS = {reason: f"+131255501{place:02}" for place, reason in enumerate(REASONS, 1)}
CALLS = {
    "canceled": 2,
    "carrier_lost": 4,
    "destination_invalid": 1,
    "destination_not_in_countries_whitelist": 1,
    "destination_not_in_service_plan": 1,
    "destination_unreachable": 3,
    "fax_initial_communication_timeout": 3,
    "fax_signaling_error": 4,
    "file_download_failed": 3,
    "file_format_invalid": 1,
    "file_size_limit_exceeded": 1,
    "invalid_ecm_response_from_receiver": 4,
    "media_processing_exception": 2,
    "page_count_limit_exceeded": 1,
    "receiver_call_dropped": 4,
    "receiver_calling_the_number_is_busy": 5,
    "receiver_communication_error": 4,
    "receiver_decline": 2,
    "receiver_incompatible_destination": 2,
    "receiver_invalid_number_format": 1,
    "receiver_no_answer": 4,
    "receiver_no_response": 4,
    "receiver_recovery_on_timer_expire": 4,
    "receiver_unallocated_number": 1,
    "rejected": 2,
    "sender_call_dropped": 4,
    "sender_canceled": 2,
    "sender_communication_error": 4,
    "service_unavailable": 4,
    "unverified_destination_not_allowed": 1,
    "user_busy": 5,
}
"""How often a number is called that fails every time, with the waits of `harness.QUICK`: the length of its
kind's list and one, cut by a reason's cap."""
STOPPING = {
    "account_disabled",
    "connection_channel_limit_exceeded",
    "no_outbound_profile",
    "outbound_profile_channel_limit_exceeded",
    "outbound_profile_daily_spend_limit_exceeded",
    "received",
    "success",
    "unverified_origination_number",
    "user_channel_limit_exceeded",
}
"""What stops the queue, or leaves the fax to a person: no second call by itself."""
OTHERS = {"+13125550150": "sandbox_invented_reason", "+13125550151": "unknown"}


def _reads(reply: EmailMessage, reason: str) -> None:
    """Check what a sender reads about a failure: the sentence, the advice, the carrier's own word."""
    row = reasons.lookup(reason)
    text = words(reply)
    assert reply["Subject"].startswith("Fax failed: +1 312-555-01")
    assert f"Your fax could not be delivered. {row.sentence} {row.advice}" in text
    if reason != "unknown":
        assert f"failure_reason: {reason}" in text
    assert ("may have arrived all the same" in text) == row.pages_may_have_arrived


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def failed(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[World, list[EmailMessage]]]:
    """One mail to every number that fails and stops nothing, and the replies about it."""
    async with world(tmp_path_factory.mktemp("reasons"), call_time=0.02) as w:
        replies = await w.replies(*(NUMBERS[reason] for reason in CALLS), *OTHERS)
        yield w, replies
        await w.everyone_told()


async def test_each_reason_is_called_as_often_as_its_kind_says(
    failed: tuple[World, list[EmailMessage]],
) -> None:
    """A failure is tried again as its reason's kind says, and no more often: each call costs money."""
    w, replies = failed
    assert set(CALLS) | STOPPING == set(REASONS)  # the last test has the others
    made = {reason: len(w.taken(NUMBERS[reason])) for reason in CALLS}
    assert made == CALLS
    assert [len(w.taken(number)) for number in OTHERS] == [2, 2]
    assert len(w.carrier.ledger) == len(w.posts) == sum(CALLS.values()) + 4
    assert [int(reply["X-Fax-Attempts"]) for reply in replies] == [*CALLS.values(), 2, 2]


async def test_each_reason_is_told_in_plain_words(failed: tuple[World, list[EmailMessage]]) -> None:
    """The sender reads what the reason means and what to do, with the carrier's word in small print."""
    _, replies = failed
    for reply, reason in zip(replies, [*CALLS, *OTHERS.values()], strict=True):
        assert (reply["X-Fax-Outcome"], reply["X-Fax-Reason"]) == ("failed", reason)
        _reads(reply, reason)


async def test_the_postmaster_hears_of_what_the_account_may_not_call(
    failed: tuple[World, list[EmailMessage]],
) -> None:
    """Destinations that the account leaves out are told to the postmaster, in one mail a day."""
    w, _ = failed
    await until(w.mailbox.alerts, "the alert")
    (alert,) = w.mailbox.alerts()
    assert alert["Subject"] == "Fax gateway alert: a fax failed because of the set-up"
    assert "retry ID" in words(alert)


async def test_reasons_that_stop_the_queue_end_at_the_deadline(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """What stops the queue or needs a person is called once; at the deadline the sender reads the reason."""
    folder = tmp_path_factory.mktemp("stopping")
    # The calls last long enough for all of them to be open before the first one stops the queue.
    async with world(folder, call_time=1.5, telnyx={"channels": 12}, retries={"give_up_after": "7s"}) as w:
        names = sorted(STOPPING)
        replies = await w.replies(*(NUMBERS[name] for name in names))
        assert [len(w.taken(NUMBERS[name])) for name in names] == [1] * len(names)
        assert len(w.posts) == len(names)
        for reply, name in zip(replies, names, strict=True):
            assert (reply["X-Fax-Outcome"], reply["X-Fax-Reason"]) == ("failed", name)
            _reads(reply, name)
            # Everybody who had to wait was told so, once.
            assert len(w.mailbox.about(reply["X-Fax-Id"], "delayed")) == 1
        titles = sorted(alert["X-Fax-Alert"] for alert in w.mailbox.alerts())
        assert titles == ["account_held", "fax_held"]
        await w.everyone_told()

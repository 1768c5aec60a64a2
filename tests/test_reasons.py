"""The table of failure reasons: complete, consistent, and readable for the person whose fax failed."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import reasons
from gateway.reasons import LOCAL, TABLE, UNKNOWN, Adjust, Kind, Reason, lookup, nearest

# Written down from the carrier's own pages, not from the table.
TUTORIAL = """
user_busy receiver_no_answer receiver_no_response receiver_recovery_on_timer_expire receiver_call_dropped
receiver_communication_error fax_signaling_error invalid_ecm_response_from_receiver
fax_initial_communication_timeout receiver_incompatible_destination receiver_decline destination_unreachable
service_unavailable connection_channel_limit_exceeded outbound_profile_channel_limit_exceeded
user_channel_limit_exceeded outbound_profile_daily_spend_limit_exceeded account_disabled no_outbound_profile
destination_not_in_countries_whitelist destination_not_in_service_plan destination_invalid
receiver_invalid_number_format receiver_unallocated_number
"""
REFERENCE = "file_size_limit_exceeded page_count_limit_exceeded"
WEBHOOK_PAGE = "unverified_origination_number unverified_destination_not_allowed"
SDK = """
carrier_lost sender_call_dropped sender_communication_error sender_canceled file_format_invalid
media_processing_exception file_download_failed
"""
HELP_CENTRE = "success received"
OLD_REFERENCE = "rejected"
SEEN_BY_OTHERS = "receiver_calling_the_number_is_busy canceled"
PUBLISHED = (
    f"{TUTORIAL} {REFERENCE} {WEBHOOK_PAGE} {SDK} {HELP_CENTRE} {OLD_REFERENCE} {SEEN_BY_OTHERS}".split()
)

RETRIED = {Kind.BUSY, Kind.NO_ANSWER, Kind.LINE, Kind.PROVIDER, Kind.DECLINED}
HOLDS = {Kind.ACCOUNT, Kind.SENDER, Kind.SPEND}


def test_every_published_reason_has_exactly_one_row() -> None:
    """Whatever reason the carrier is known to give, the gateway knows what to do about it."""
    assert len(PUBLISHED) == 40
    assert sorted(reason.name for reason in TABLE) == sorted(PUBLISHED)


def test_no_name_is_in_both_tables() -> None:
    """A reason of ours can never be mistaken for one of the carrier's."""
    names = [reason.name for reason in (*TABLE, *LOCAL, UNKNOWN)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("reason", [*TABLE, *LOCAL, UNKNOWN], ids=lambda reason: reason.name)
def test_each_row_says_something_a_clerk_understands(reason: Reason) -> None:
    """The sender reads one whole sentence on what happened and one on what to do, in plain words."""
    for text in (reason.sentence, reason.advice):
        assert re.fullmatch(r"[A-Z][^\n]{15,}\.", text)
        assert not re.search(r"[._][a-z]|[A-Z]{4,}|SIP|T\.38|Telnyx|API", text), "technical language"
        assert text.isascii()
    assert reason.sentence != reason.advice
    assert re.fullmatch(r"5\.[0-7]\.\d", reason.status), "a final report is class 5 (RFC 3463, 2)"


@pytest.mark.parametrize("reason", [*TABLE, *LOCAL, UNKNOWN], ids=lambda reason: reason.name)
def test_each_row_is_consistent(reason: Reason) -> None:
    """A reason is retried, waited for or given up, never two of them at once."""
    if reason.kind not in RETRIED:
        assert reason.cap is None, "only retried kinds have a number of retries to limit"
        assert reason.adjust is Adjust.NONE
    assert reason.cap in {None, 1, 2}
    if reason.kind in HOLDS or reason.kind is Kind.CONTRADICTION:
        assert reason.alert, "nobody else can end it"
    if "has been told" in reason.sentence:
        assert reason.alert, "what the sender is told must be true"


def test_sender_is_warned_where_pages_may_have_arrived() -> None:
    """After a call that broke off in the middle, the sender hears that the recipient may hold some pages."""
    broken_off = {reason.name for reason in (*TABLE, *LOCAL) if reason.pages_may_have_arrived}
    assert broken_off == {
        "receiver_call_dropped",
        "receiver_communication_error",
        "fax_signaling_error",
        "invalid_ecm_response_from_receiver",
        "carrier_lost",
        "sender_call_dropped",
        "sender_communication_error",
        "sender_canceled",
        "canceled",
        "success",
        "received",
    }


def test_postmaster_is_told_of_what_only_an_administrator_can_mend() -> None:
    """Faults of the account or of the gateway reach the postmaster; a busy line does not."""
    assert {reason.name for reason in (*TABLE, *LOCAL) if reason.alert} == {
        "account_disabled",
        "no_outbound_profile",
        "unverified_origination_number",
        "outbound_profile_daily_spend_limit_exceeded",
        "unverified_destination_not_allowed",
        "destination_not_in_countries_whitelist",
        "destination_not_in_service_plan",
        "success",
        "received",
        "document_refused",
    }


def test_retry_kinds_are_named_like_the_configuration() -> None:
    """An operator finds the waits for a kind under the same word in [retries]."""
    assert {kind.value for kind in RETRIED} == {"busy", "no_answer", "line", "provider", "declined"}


@pytest.mark.parametrize(
    ("name", "kind", "cap"),
    [
        ("user_busy", Kind.BUSY, None),
        ("receiver_no_answer", Kind.NO_ANSWER, None),
        ("fax_initial_communication_timeout", Kind.NO_ANSWER, 2),
        ("receiver_call_dropped", Kind.LINE, None),
        ("destination_unreachable", Kind.LINE, 2),
        ("receiver_incompatible_destination", Kind.LINE, 1),
        ("sender_canceled", Kind.LINE, 1),
        ("service_unavailable", Kind.PROVIDER, None),
        ("media_processing_exception", Kind.PROVIDER, 1),
        ("file_download_failed", Kind.PROVIDER, 2),
        ("receiver_decline", Kind.DECLINED, 1),
        ("rejected", Kind.DECLINED, 1),
        ("user_channel_limit_exceeded", Kind.CAPACITY, None),
        ("account_disabled", Kind.ACCOUNT, None),
        ("no_outbound_profile", Kind.ACCOUNT, None),
        ("unverified_origination_number", Kind.SENDER, None),
        ("outbound_profile_daily_spend_limit_exceeded", Kind.SPEND, None),
        ("destination_invalid", Kind.NEVER, None),
        ("destination_not_in_countries_whitelist", Kind.NEVER, None),
        ("success", Kind.CONTRADICTION, None),
    ],
)
def test_retry_plan(name: str, kind: Kind, cap: int | None) -> None:
    """A busy line is called again, a wrong number never, and a doubtful cause only once or twice."""
    assert (lookup(name).kind, lookup(name).cap) == (kind, cap)


@pytest.mark.parametrize(
    ("name", "adjust"),
    [
        ("fax_signaling_error", Adjust.ROBUST),
        ("invalid_ecm_response_from_receiver", Adjust.FLIP_T38),
        ("receiver_incompatible_destination", Adjust.WITHOUT_T38),
        ("user_busy", Adjust.NONE),
    ],
)
def test_next_call_is_made_differently_where_that_helps(name: str, adjust: Adjust) -> None:
    """A call that failed for its settings is not repeated with the same ones."""
    assert lookup(name).adjust is adjust


def test_same_wording_for_two_names_of_one_thing() -> None:
    """The unconfirmed names behave as the documented ones that mean the same."""
    for one, other in (
        ("user_busy", "receiver_calling_the_number_is_busy"),
        ("sender_canceled", "canceled"),
        ("receiver_decline", "rejected"),
    ):
        first, second = lookup(one), lookup(other)
        assert (first.sentence, first.kind, first.cap) == (second.sentence, second.kind, second.cap)


def test_misspelt_page_limit_is_understood() -> None:
    """The help centre's misspelling of the page limit means the page limit."""
    assert lookup("page_count_limit_limit_exceeded") is lookup("page_count_limit_exceeded")


@pytest.mark.parametrize("name", ["number_refused", "document_refused", "gave_up_waiting"])
def test_our_own_reasons_are_found_too(name: str) -> None:
    """`explain` knows the reasons of the gateway itself."""
    assert lookup(name) in LOCAL
    assert lookup(name).kind is Kind.NEVER


@pytest.mark.parametrize("name", [None, "", " ", "\x00\n"])
def test_missing_reason(name: str | None) -> None:
    """A failure without a reason is retried once and reported neutrally."""
    assert lookup(name) == UNKNOWN
    assert UNKNOWN.kind is Kind.LINE
    assert UNKNOWN.cap == 1


def test_new_reason_keeps_its_name() -> None:
    """A reason nobody has seen before is handled with care and shown as the carrier wrote it."""
    assert lookup("modem_on_fire").name == "modem_on_fire"
    assert lookup("modem_on_fire").sentence == UNKNOWN.sentence


@given(st.text())
def test_any_reason_fits_into_a_header(name: str) -> None:
    """No reason, however strange, can break a header or a log line of ours."""
    found = lookup(name).name
    assert re.fullmatch(r"[ -~]+", found)
    assert len(found) <= reasons.LONGEST_NAME
    assert found == found.strip()


@pytest.mark.parametrize(
    ("typed", "first"),
    [
        ("user_bussy", "user_busy"),
        ("User-Busy", "user_busy"),
        ("recever_no_answer", "receiver_no_answer"),
        ("page_count", "page_count_limit_exceeded"),
        ("number refused", "number_refused"),
    ],
)
def test_typing_errors_find_the_reason_that_was_meant(typed: str, first: str) -> None:
    """`explain` with a typing error suggests the right reason first."""
    assert nearest(typed)[0] == first


@pytest.mark.parametrize("typed", ["", "zzzzzzzz"])
def test_nothing_near_is_suggested_for_nonsense(typed: str) -> None:
    """`explain` does not guess where nothing is alike."""
    assert nearest(typed) == []

"""The failure reasons: what each one means, whether another call makes sense, and what the sender is told.

In charge of one table, `TABLE`, with a row for each of the forty values that the carrier is known to give as
`failure_reason` (Telnyx: "Send a Fax via API", "Receiving Webhooks for Programmable Fax", the SDK's list, the
help centre's "Fax API error list"), and of a second one, `LOCAL`, for a fax that ends without such a value.

Promises: `lookup` always answers. The carrier's set is open, so a name it never showed before gets the
cautious row `UNKNOWN`: one more call, and a sentence that claims nothing.

Fails: never.
"""

import dataclasses
import difflib
from dataclasses import dataclass
from enum import StrEnum

LONGEST_NAME = 80
"""Characters kept of a name that is not in the tables; it goes into mails, logs and headers as it came."""


class Kind(StrEnum):
    """How a failure is answered. The first five are retried by the list of that name under `[retries]`."""

    BUSY = "busy"
    NO_ANSWER = "no_answer"
    LINE = "line"
    PROVIDER = "provider"
    DECLINED = "declined"
    CAPACITY = "capacity"
    """Too many calls at once: the whole queue pauses, and no call is counted."""
    ACCOUNT = "account"
    """The account cannot send: nothing is called until a probe succeeds."""
    SENDER = "sender"
    """The `from` number cannot send: nothing is called from it until a probe succeeds."""
    SPEND = "spend"
    """The day's money is used up: nothing is called before 00:00 UTC."""
    NEVER = "never"
    CONTRADICTION = "contradiction"
    """A failure that calls itself a success: the carrier is asked, then a person."""


class Adjust(StrEnum):
    """What the next call does differently from the one that failed."""

    NONE = "none"
    FLIP_T38 = "flip_t38"
    """T.38 off if it was on, on if it was off."""
    WITHOUT_T38 = "without_t38"
    ROBUST = "robust"
    """From the third call on: quality `normal`, which sends the least, and T.38 flipped."""


@dataclass(frozen=True, slots=True)
class Reason:
    """One row.

    `sentence` and `advice` are for the sender, plain and one sentence each. `status` is the enhanced status
    code of the final report (RFC 3463, class 5). `cap` limits the retries for this reason, None leaves it to
    the kind's list. `alert` means that the postmaster is told.
    """

    name: str
    kind: Kind
    sentence: str
    advice: str
    status: str
    cap: int | None = None
    adjust: Adjust = Adjust.NONE
    pages_may_have_arrived: bool = False
    alert: bool = False


_LATER = "Please send it again later, or ask the recipient whether the fax machine is free."
_ASK_IF_ON = "Please ask the recipient whether the fax machine is switched on and set to answer by itself."
_ASK_WHAT_CAME = "Please ask the recipient which pages came through, and send the rest again."
_CHECK_NUMBER = "Please check the number with the recipient and send the fax to the right one."
_OURS = "There is nothing wrong with your document or the number; please send it again later."
_ADMIN = "Please ask the administrator of this fax gateway before sending it again."
_OTHER_FILE = (
    "Please save the document as a PDF again, for example by printing it to PDF, and send the new file."
)

# Two or three lines a row are easier to compare than the formatter's seven.
# fmt: off
TABLE: tuple[Reason, ...] = (
    # The line is engaged.
    Reason("user_busy", Kind.BUSY,
           "The line of the recipient's fax was busy.", _LATER, "5.4.1"),
    Reason("receiver_calling_the_number_is_busy", Kind.BUSY,
           "The line of the recipient's fax was busy.", _LATER, "5.4.1"),
    # Nobody, or no fax machine, answers.
    Reason("receiver_no_answer", Kind.NO_ANSWER,
           "The phone rang, but nothing picked up.", _ASK_IF_ON, "5.4.1"),
    Reason("receiver_no_response", Kind.NO_ANSWER,
           "The recipient's line gave no sign of life in time.", _ASK_IF_ON, "5.4.1"),
    Reason("fax_initial_communication_timeout", Kind.NO_ANSWER,
           "Somebody or something answered the call, but it was not a fax machine.",
           "Please check the number, and ask the recipient whether the machine answers by itself.",
           "5.4.1", cap=2),
    # The call was set up, or nearly, and went wrong.
    Reason("receiver_recovery_on_timer_expire", Kind.LINE,
           "The call to the recipient ran out of time on its way.", _LATER, "5.4.2"),
    Reason("receiver_call_dropped", Kind.LINE,
           "The recipient's side hung up before all pages were through.", _ASK_WHAT_CAME, "5.4.2",
           pages_may_have_arrived=True),
    Reason("receiver_communication_error", Kind.LINE,
           "The call to the recipient's fax machine did not work.", _LATER, "5.4.2",
           pages_may_have_arrived=True),
    Reason("fax_signaling_error", Kind.LINE,
           "Our fax machine and the recipient's could not agree and broke off.", _ASK_WHAT_CAME, "5.4.2",
           adjust=Adjust.ROBUST, pages_may_have_arrived=True),
    Reason("invalid_ecm_response_from_receiver", Kind.LINE,
           "The recipient's fax machine gave answers during error correction that made no sense.",
           _ASK_WHAT_CAME, "5.4.2", adjust=Adjust.FLIP_T38, pages_may_have_arrived=True),
    Reason("receiver_incompatible_destination", Kind.LINE,
           "The recipient's line does not take fax calls.",
           "Please check whether this is really a fax number.", "5.6.1", cap=1, adjust=Adjust.WITHOUT_T38),
    Reason("destination_unreachable", Kind.LINE,
           "No way could be found to the recipient's number.", _CHECK_NUMBER, "5.4.4", cap=2),
    Reason("carrier_lost", Kind.LINE,
           "The signal was lost during transmission.", _ASK_WHAT_CAME, "5.4.2", pages_may_have_arrived=True),
    Reason("sender_call_dropped", Kind.LINE,
           "The call was cut off on our side during transmission.", _ASK_WHAT_CAME, "5.4.2",
           pages_may_have_arrived=True),
    # When we asked for it, the fax ends as cancelled and its reason is not looked up.
    Reason("sender_canceled", Kind.LINE,
           "The fax was cancelled before all pages were through.", _ASK_WHAT_CAME, "5.4.2", cap=1,
           pages_may_have_arrived=True),
    Reason("canceled", Kind.LINE,
           "The fax was cancelled before all pages were through.", _ASK_WHAT_CAME, "5.4.2", cap=1,
           pages_may_have_arrived=True),
    # The fax service has a fault of its own.
    Reason("service_unavailable", Kind.PROVIDER,
           "The fax service had a technical fault.", _OURS, "5.3.0"),
    Reason("sender_communication_error", Kind.PROVIDER,
           "The fax service had a technical fault while it was sending.", _ASK_WHAT_CAME, "5.3.0",
           pages_may_have_arrived=True),
    Reason("media_processing_exception", Kind.PROVIDER,
           "The fax service could not turn the document into fax pages.", _OTHER_FILE, "5.6.0", cap=1),
    Reason("file_download_failed", Kind.PROVIDER,
           "The fax service could not get hold of the document.", _OURS, "5.3.0", cap=2),
    # The recipient's side does not want the call.
    Reason("receiver_decline", Kind.DECLINED,
           "The recipient's side turned the call down.",
           "Please ask the recipient whether faxes from our number are blocked.", "5.2.1", cap=1),
    Reason("rejected", Kind.DECLINED,
           "The recipient's side turned the call down.",
           "Please ask the recipient whether faxes from our number are blocked.", "5.2.1", cap=1),
    # Too many calls at once.
    Reason("connection_channel_limit_exceeded", Kind.CAPACITY,
           "All of our fax lines were in use until the time was up.", _OURS, "5.4.5"),
    Reason("outbound_profile_channel_limit_exceeded", Kind.CAPACITY,
           "All of our fax lines were in use until the time was up.", _OURS, "5.4.5"),
    Reason("user_channel_limit_exceeded", Kind.CAPACITY,
           "All of our fax lines were in use until the time was up.", _OURS, "5.4.5"),
    # Our account, our number, our money: nothing to do with this document or its recipient.
    Reason("account_disabled", Kind.ACCOUNT,
           "Our account with the fax service is switched off; the administrator has been told.", _ADMIN,
           "5.3.5", alert=True),
    Reason("no_outbound_profile", Kind.ACCOUNT,
           "Our account with the fax service is not set up for sending; the administrator has been told.",
           _ADMIN, "5.3.5", alert=True),
    Reason("unverified_origination_number", Kind.SENDER,
           "The number that we send from is not approved for faxes; the administrator has been told.", _ADMIN,
           "5.3.5", alert=True),
    Reason("outbound_profile_daily_spend_limit_exceeded", Kind.SPEND,
           "The money set aside for faxes today is used up; the administrator has been told.",
           "Please send it again tomorrow, or ask the administrator of this fax gateway to raise the limit.",
           "5.3.5", alert=True),
    # Destinations that our account may not call.
    Reason("unverified_destination_not_allowed", Kind.NEVER,
           "Our account with the fax service may not call this number yet; the administrator has been told.",
           _ADMIN, "5.7.1", alert=True),
    Reason("destination_not_in_countries_whitelist", Kind.NEVER,
           "Our account with the fax service may not call this country; the administrator has been told.",
           _ADMIN, "5.7.1", alert=True),
    Reason("destination_not_in_service_plan", Kind.NEVER,
           "Our contract with the fax service leaves out this destination; the administrator has been told.",
           _ADMIN, "5.7.1", alert=True),
    # Numbers that cannot be called by anybody.
    Reason("destination_invalid", Kind.NEVER,
           "There can be no such fax number.", _CHECK_NUMBER, "5.1.1"),
    Reason("receiver_invalid_number_format", Kind.NEVER,
           "The fax number is not written as a telephone number.", _CHECK_NUMBER, "5.1.3"),
    Reason("receiver_unallocated_number", Kind.NEVER,
           "Nobody has this fax number at present.", _CHECK_NUMBER, "5.1.1"),
    # Documents that cannot be sent.
    Reason("file_format_invalid", Kind.NEVER,
           "The fax service could not read the document as a PDF.", _OTHER_FILE, "5.6.1"),
    Reason("file_size_limit_exceeded", Kind.NEVER,
           "The document takes up too much space for a fax.", "Please send it as several smaller documents.",
           "5.3.4"),
    Reason("page_count_limit_exceeded", Kind.NEVER,
           "The document has more pages than a fax may have (350).",
           "Please send it as several shorter documents.", "5.3.4"),
    # Documented by the help centre as happening all the same.
    Reason("success", Kind.CONTRADICTION,
           "The fax service said in one breath that the fax failed and that it succeeded.",
           "Please ask the recipient whether the fax came through before sending it again.", "5.3.0",
           pages_may_have_arrived=True, alert=True),
    Reason("received", Kind.CONTRADICTION,
           "The fax service gave a result that belongs to an incoming fax.",
           "Please ask the recipient whether the fax came through before sending it again.", "5.3.0",
           pages_may_have_arrived=True, alert=True),
)
"""The carrier's values, each once."""

LOCAL: tuple[Reason, ...] = (
    Reason("number_refused", Kind.NEVER,
           "The fax service does not accept the number as one that it can call.", _CHECK_NUMBER, "5.1.1"),
    Reason("document_refused", Kind.NEVER,
           "The fax service does not accept the document; the administrator has been told.", _OTHER_FILE,
           "5.6.0", alert=True),
    Reason("gave_up_waiting", Kind.NEVER,
           "The fax service could not be reached, or had no line free for us, until the time was up.", _OURS,
           "5.4.7"),
)
"""Ends without a `failure_reason`: refused at submission, or never submitted."""

# fmt: on

UNKNOWN = Reason(
    "unknown",
    Kind.LINE,
    "The fax could not be delivered.",
    "Please ask the recipient whether anything came through before sending it again.",
    "5.0.0",
    cap=1,
    pages_may_have_arrived=True,
)
"""For a value that is missing or was never seen before."""

_BY_NAME = {reason.name: reason for reason in (*TABLE, *LOCAL)}
# One copy of the help centre's list spells it so.
_MISSPELT = {"page_count_limit_limit_exceeded": "page_count_limit_exceeded"}


def lookup(name: str | None) -> Reason:
    """Return the row of `name`; else `UNKNOWN` under that name, cut to printable ASCII and `LONGEST_NAME`."""
    if name is None:
        return UNKNOWN
    known = _BY_NAME.get(_MISSPELT.get(name, name))
    if known is not None:
        return known
    kept = "".join(char for char in name if char.isascii() and char.isprintable()).strip()[:LONGEST_NAME]
    return dataclasses.replace(UNKNOWN, name=kept or UNKNOWN.name)


def nearest(name: str) -> list[str]:
    """Return at most five names that `name` may have been meant for, the likeliest first; often none."""
    wanted = name.strip().lower().replace("-", "_").replace(" ", "_")
    holding = [known for known in _BY_NAME if wanted and wanted in known]
    alike = difflib.get_close_matches(wanted, _BY_NAME, n=5, cutoff=0.6)
    return list(dict.fromkeys([*alike, *holding]))[:5]

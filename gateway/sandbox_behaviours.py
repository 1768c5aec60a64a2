"""What the sandbox carrier can do to a fax: pieces, and the table of behaviours made of them.

In charge of: how the POST is answered, how the call ends and how its webhooks travel, each as a small record,
and one name for each combination worth meeting. `sandbox_script` says which number or script meets which.
Promises: constants only; nothing here reads a clock, a socket or a file, so nothing here can fail.

The failure reasons are this module's own copy, taken from the carrier's pages, so that a mistake in the
gateway's table cannot hide here. Codes and titles of errors: Telnyx's page "API error codes".
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

REASONS = (
    "account_disabled",
    "canceled",  # not documented by Telnyx; seen in other people's code
    "carrier_lost",
    "connection_channel_limit_exceeded",
    "destination_invalid",
    "destination_not_in_countries_whitelist",
    "destination_not_in_service_plan",
    "destination_unreachable",
    "fax_initial_communication_timeout",
    "fax_signaling_error",
    "file_download_failed",
    "file_format_invalid",
    "file_size_limit_exceeded",
    "invalid_ecm_response_from_receiver",
    "media_processing_exception",
    "no_outbound_profile",
    "outbound_profile_channel_limit_exceeded",
    "outbound_profile_daily_spend_limit_exceeded",
    "page_count_limit_exceeded",
    "received",
    "receiver_call_dropped",
    "receiver_calling_the_number_is_busy",  # not documented by Telnyx; seen in other people's code
    "receiver_communication_error",
    "receiver_decline",
    "receiver_incompatible_destination",
    "receiver_invalid_number_format",
    "receiver_no_answer",
    "receiver_no_response",
    "receiver_recovery_on_timer_expire",
    "receiver_unallocated_number",
    "rejected",
    "sender_call_dropped",
    "sender_canceled",
    "sender_communication_error",
    "service_unavailable",
    "success",
    "unverified_destination_not_allowed",
    "unverified_origination_number",
    "user_busy",
    "user_channel_limit_exceeded",
)
"""Every `failure_reason` known, in alphabetical order: the order of the numbers from 0101 on."""

MEDIA_REASONS = frozenset(
    {
        "file_download_failed",
        "file_format_invalid",
        "file_size_limit_exceeded",
        "media_processing_exception",
        "page_count_limit_exceeded",
    }
)
"""Reasons that end a fax before its document is ready, so before any call."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What `POST /faxes` gets back, and whether the fax was taken.

    `status` is None where no answer is written: the connection is cut, or (`silent`) stays open and mute.
    `late` holds the answer back for the option `lag`. `code`, `title`, `detail` and `pointer` are what an
    error's body says.
    """

    status: int | None = 202
    taken: bool = True
    body: Literal["fax", "fax without id", "padded fax", "page", "error"] = "fax"
    code: str = ""
    title: str = ""
    detail: str = ""
    pointer: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    late: bool = False
    silent: bool = False

    @property
    def summary(self) -> str:
        """The answer in a word or two, for the ledger: `202`, `202 page`, `cut`, `silence`."""
        if self.status is None:
            return "silence" if self.silent else "cut"
        return str(self.status) if self.body in ("fax", "error") else f"{self.status} {self.body}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """An end of a call: `delivered`, or `failed` with a reason (None: the field is missing)."""

    status: Literal["delivered", "failed"]
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Webhooks:
    """How the webhooks of one fax travel.

    `copies` of each event go out at the same moment. `signed`: "truly"; "forged first", before each event a
    copy under a stranger's key with the end turned round; "stale", truly, but for a time ten minutes ago.
    """

    sent: bool = True
    copies: int = 1
    backwards: bool = False
    before_answer: bool = False
    unknown_type: bool = False
    page_count: bool = True
    signed: Literal["truly", "forged first", "stale"] = "truly"


DELIVERED = Outcome("delivered")
BUSY = Outcome("failed", "user_busy")
LOST = Answer(None)


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What happens to one fax: the answer, its ends in order (none: it stays `sending`), its webhooks.

    `hidden` keeps it out of the list for the option `lag`.
    """

    says: str
    answer: Answer = Answer()
    ends: tuple[Outcome, ...] = (DELIVERED,)
    webhooks: Webhooks = Webhooks()
    hidden: bool = False


def _refusal(
    status: int,
    code: str,
    title: str,
    detail: str,
    pointer: str = "",
    headers: tuple[tuple[str, str], ...] = (),
) -> Answer:
    return Answer(
        status,
        taken=False,
        body="error",
        code=code,
        title=title,
        detail=detail,
        pointer=pointer,
        headers=headers,
    )


UNAUTHORIZED = _refusal(401, "10009", "Authentication failed", "The API key is missing or not valid.")
NO_FUNDS = _refusal(
    402, "20100", "Insufficient Funds", "You do not have enough funds to perform this action."
)
BUSY_PAGE = Answer(503, taken=False, body="page")
TOO_MANY = ("10011", "Too many requests", "You have exceeded the maximum number of allowed requests.")
RETRY_AFTER = _refusal(429, *TOO_MANY, headers=(("Retry-After", "1"),))
RATE_LIMIT = (("x-ratelimit-limit", "10"), ("x-ratelimit-remaining", "0"), ("x-ratelimit-reset", "1"))
UNEXPECTED = ("10007", "Unexpected error", "An unexpected error occurred.")

_REFUSALS = {
    "401": Behaviour("Answers 401: the key is not valid.", UNAUTHORIZED),
    "402": Behaviour("Answers 402: no funds (20100).", NO_FUNDS),
    "403": Behaviour(
        "Answers 403 with a code that no list names.",
        _refusal(403, "19999", "Forbidden", "The request was understood and is not allowed."),
    ),
    "404": Behaviour(
        "Answers 404.",
        _refusal(404, "10005", "Resource not found", "The requested resource could not be found."),
    ),
    "422-to": Behaviour(
        "Answers 422 on `/to`.", _refusal(422, "10002", "Invalid phone number", "to is invalid", "/to")
    ),
    "422-from": Behaviour(
        "Answers 422 on `/from`.",
        _refusal(
            422, "10017", "Associated resource does not exist", "from is not a number of yours", "/from"
        ),
    ),
    "422-contents": Behaviour(
        "Answers 422 on `/contents`.",
        _refusal(422, "10027", "Unprocessable Entity", "contents is invalid", "/contents"),
    ),
    "429": Behaviour("Answers 429 without any header.", _refusal(429, *TOO_MANY)),
    "429-retry-after": Behaviour("Answers 429 with `Retry-After: 1`.", RETRY_AFTER),
    "429-reset": Behaviour(
        "Answers 429 with `x-ratelimit-reset: 1` and no `Retry-After`.",
        _refusal(429, *TOO_MANY, headers=RATE_LIMIT),
    ),
    "500-before-acceptance": Behaviour("Answers 500; nothing was taken.", _refusal(500, *UNEXPECTED)),
    "503-html": Behaviour("Answers 503 with a page of HTML; nothing was taken.", BUSY_PAGE),
    "307": Behaviour(
        "Answers 307 to the same address; nothing was taken.", Answer(307, taken=False, body="page")
    ),
    "cut-before-acceptance": Behaviour(
        "Reads the whole request, then cuts the connection; nothing was taken.", Answer(None, taken=False)
    ),
    "silence": Behaviour(
        "Reads the whole request and never answers; nothing was taken.",
        Answer(None, taken=False, silent=True),
    ),
}

_DOUBTFUL = {
    "answer-lost": Behaviour("Taken, then the connection is cut without an answer.", LOST),
    "answer-and-webhooks-lost": Behaviour(
        "Taken, no answer, no webhooks: only the list shows it.", LOST, webhooks=Webhooks(sent=False)
    ),
    "answer-lost-and-hidden": Behaviour(
        "Taken, no answer, no webhooks, and missing from the list for the option `lag`.",
        LOST,
        webhooks=Webhooks(sent=False),
        hidden=True,
    ),
    "silence-after-acceptance": Behaviour("Taken, and never answered.", Answer(None, silent=True)),
    "500-after-acceptance": Behaviour(
        "Taken, and answered 500.",
        Answer(500, body="error", code=UNEXPECTED[0], title=UNEXPECTED[1], detail=UNEXPECTED[2]),
    ),
    "202-without-id": Behaviour("Taken; the answer has no `data.id`.", Answer(body="fax without id")),
    "202-html": Behaviour("Taken; the answer is a page of HTML.", Answer(body="page")),
    "202-huge": Behaviour("Taken; the answer has 8 MB of padding before `data`.", Answer(body="padded fax")),
    "slow-answer": Behaviour("Taken; the answer comes after the option `lag`.", Answer(late=True)),
}

_ENDINGS = {
    "delivered": Behaviour("Delivered."),
    "invented-reason": Behaviour(
        "Failed with a reason nobody has heard of.", ends=(Outcome("failed", "sandbox_invented_reason"),)
    ),
    "no-reason": Behaviour("Failed without a reason.", ends=(Outcome("failed"),)),
    "never-ends": Behaviour("Stays `sending` until it is cancelled.", ends=()),
    "failed-then-delivered": Behaviour(
        "Failed (`user_busy`), then delivered after all, one call time later.", ends=(BUSY, DELIVERED)
    ),
    "delivered-then-failed": Behaviour(
        "Delivered, then failed (`receiver_call_dropped`), one call time later.",
        ends=(DELIVERED, Outcome("failed", "receiver_call_dropped")),
    ),
}

_WEBHOOKS = {
    "webhooks-before-answer": Behaviour(
        "Every webhook, the last one too, is sent before the 202 is written.",
        webhooks=Webhooks(before_answer=True),
    ),
    "webhooks-twice": Behaviour(
        "Each webhook is sent twice at the same moment.", webhooks=Webhooks(copies=2)
    ),
    "webhooks-backwards": Behaviour(
        "All webhooks are sent at the end, the last one first.", webhooks=Webhooks(backwards=True)
    ),
    "webhooks-lost": Behaviour("No webhooks: only asking finds out.", webhooks=Webhooks(sent=False)),
    "webhooks-forged": Behaviour(
        "Before each true webhook one with a forged signature, which tells of the opposite end.",
        webhooks=Webhooks(signed="forged first"),
    ),
    "webhooks-stale": Behaviour(
        "Every webhook is signed for ten minutes ago: only asking finds out.",
        webhooks=Webhooks(signed="stale"),
    ),
    "unknown-event": Behaviour(
        "An event of an unknown type comes before the end.", webhooks=Webhooks(unknown_type=True)
    ),
    "no-page-count": Behaviour(
        "Delivered, but `page_count` is missing.", webhooks=Webhooks(page_count=False)
    ),
}

BEHAVIOURS: Mapping[str, Behaviour] = {
    **_ENDINGS,
    **_REFUSALS,
    **_DOUBTFUL,
    **_WEBHOOKS,
    **{reason: Behaviour(f"Failed: `{reason}`.", ends=(Outcome("failed", reason),)) for reason in REASONS},
}
"""Every behaviour by name; a name in a script is one of these."""

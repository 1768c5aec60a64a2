"""The log: one line for each mail, call, webhook and reply, under names from a closed list.

In charge of how records look and of what may not be in them. `configure` sets structlog up and sends the
warnings of libraries the same way. A record is one line with `time` (ISO 8601, UTC), `level`, `event` and its
fields.

Promises: an event's name is in `EVENTS`. Telephone numbers are masked, secrets and bytes are never shown,
control characters are escaped, and a traceback names files, lines and functions but no values.

Fails: a stream that cannot be written to costs the record, never the fax. `UnlistedEventError` cannot happen
in use: a test reads all calls.
"""

import json
import logging
import re
import sys
import traceback
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, TextIO, cast

import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger

Format = Literal["auto", "console", "json"]
Level = Literal["debug", "info", "warning", "error"]

EVENTS: Mapping[str, str] = MappingProxyType(
    {
        # The daemon
        "started": "version, store: the configuration is good and the store is open",
        "ready": "smtp, http: addresses listened on; mail is taken from now on",
        "stopping": "(no fields): no new mail; what has begun is finished",
        "stopped": "seconds: how long the stop took",
        "configuration_warning": "key, text: allowed, but probably not meant",
        "task_failed": "task, fax, error, at: something unforeseen; the task goes on",
        "watchdog_missed": "late: seconds that the event loop was held up",
        "library_warning": "logger, text, error, at: what a library had to say",
        # Mail in
        "mail_accepted": "mail, faxes, peer, sender, seconds: answered 250",
        "mail_refused": "peer, sender, answer, cause: answered 4xx or 5xx for a fault of the mail",
        "mail_duplicate": "mail, peer, sender, seconds: answered 250 with the id of the mail it repeats",
        "mail_failed": "peer, sender, answer, error: answered 4xx for a fault of ours",
        "session_refused": "peer, answer: too many connections, commands, or a network not allowed",
        # Calls
        "call_begun": "fax, attempt, to, pages: the intent is on the disk, the request goes out",
        "call_withheld": "fax, attempt, found, cause: the look before a call found why it must not be made",
        "call_taken": "fax, attempt, carrier_id, seconds: the carrier has it",
        "call_refused": "fax, attempt, cause: certainly not taken, for a reason that stays",
        "call_unavailable": "fax, attempt, cause: certainly not taken, for now",
        "call_in_doubt": "fax, attempt, faxes, cause: no telling whether it was taken",
        "doubt_checked": "fax, attempt, verdict: one look for a call in doubt",
        "restore_checked": "listed, held, error: what the carrier sent since the restored backup was made",
        "carrier_asked": "fax, carrier_id, status, cancel, error: a question about a silent fax",
        # Webhooks
        "webhook_received": "event_id, type, carrier_id, fax, result: stored, so answered 200",
        "webhook_refused": "peer, answer, cause: forged, stale, malformed or too large",
        "webhook_ignored": "event_id, type, cause: not ours; answered 200",
        # States
        "fax_ended": "fax, number, outcome, reason, calls, seconds: its final state",
        "fax_requeued": "fax, reason, due: waits for another call; due in seconds from now",
        "fax_held": "fax, cause, detail: an operator must act",
        "account_held": "kind, scope, cause: no call, or only one at a time, until one succeeds",
        # Mail out
        "reply_sent": "fax, kind, recipient, relay: the relay took it",
        "reply_deferred": "fax, kind, error, due: the relay did not take it yet; due is the next try",
        "reply_given_up": "fax, kind, error: refused for good, or too old",
        "alert_raised": "cause, text: the postmaster is told, by mail once a day for each cause",
        # What works for all of these
        "child_failed": "fax, cause: a child process was killed or died over a document",
        "store_failed": "verb, fax, error: the database did not do it",
        "purged": "gone: how many mails, documents and records were old enough to go",
    }
)
"""Every event, with its fields and what it says."""

LONGEST_VALUE = 1000
"""Characters shown of one value."""

_NUMBER_KEYS = frozenset({"number", "to", "from_number"})
_SECRET_KEYS = frozenset({"api_key", "authorization", "password", "relay_password", "secret", "token"})
_HIDDEN = "(hidden)"
_NUMBER = re.compile(r"\+[1-9][0-9]{6,14}(?![0-9])")
# Libraries' errors may quote what they were given: a header, the carrier's key, an address with a password.
_SECRETS = (
    (re.compile(r"(?i)\bbearer\s+[^\s'\"]+"), f"Bearer {_HIDDEN}"),
    (re.compile(r"\bKEY[0-9A-Za-z]{8,}[0-9A-Za-z_-]*"), _HIDDEN),
    (re.compile(r"://[^\s/@]+@"), f"://{_HIDDEN}@"),
)
# They write whole addresses and a line per command or request; the gateway says what matters itself.
_SILENCED = ("mail.log", "aiohttp.access")


class UnlistedEventError(ValueError):
    """An event's name is not in `EVENTS`: a mistake in the program."""


def mask(number: str) -> str:
    """Return `number` with its middle digits hidden: `+13127367276` becomes `+1312*****76`.

    At least five digits are hidden, all of them where there are no more than five. Punctuation is dropped.
    """
    digits = "".join(char for char in number if char.isdigit())
    if not digits:
        return "***"
    tail = max(0, min(2, len(digits) - 5))
    head = max(0, min(4, len(digits) - 7))
    shown = digits[:head] + "*" * (len(digits) - head - tail) + digits[len(digits) - tail :]
    return ("+" if number.lstrip().startswith("+") else "") + shown


def get_logger() -> FilteringBoundLogger:
    """Return a logger; what `structlog.contextvars` holds (the fax, the mail) is added to each record."""
    return cast("FilteringBoundLogger", structlog.get_logger())


def configure(
    *,
    format: Format,  # noqa: A002  (named as the key in the configuration)
    level: Level,
    mask_numbers: bool,
    stream: TextIO,
) -> None:
    """Send all records from `level` on, and warnings of libraries, to `stream`.

    `auto` is `console` on a terminal and `json` else.
    """
    terminal = stream.isatty()
    console = format == "console" or (format == "auto" and terminal)
    renderer: Processor = (
        structlog.dev.ConsoleRenderer(colors=terminal, sort_keys=False) if console else _json
    )
    if console:
        renderer = structlog.dev.ConsoleRenderer(
            colors=terminal, sort_keys=False, timestamp_key="time", pad_event_to=20
        )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            _check_name,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
            _without_values,
            _Cleaner(mask_numbers=mask_numbers),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: _Sink(stream),
        # Loggers are made at import; a logger that kept its first configuration would ignore this one.
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    for handler in [old for old in root.handlers if isinstance(old, _LibraryHandler)]:
        root.removeHandler(handler)
    root.addHandler(_LibraryHandler(logging.WARNING))
    root.setLevel(logging.WARNING)
    logging.captureWarnings(capture=True)
    for name in _SILENCED:
        logging.getLogger(name).disabled = True


class _Sink:
    """Writes finished lines."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def _write(self, line: str) -> None:
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except (OSError, ValueError):
            # A full disk or a closed pipe behind the log: there is no one left to tell.
            pass

    debug = info = warning = error = critical = _write


class _LibraryHandler(logging.Handler):
    """Takes records of the standard library's logging into the same log, under one name."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()
        except (TypeError, ValueError):  # arguments that do not fit the library's own format
            text = str(record.msg)
        level = logging.ERROR if record.levelno >= logging.ERROR else logging.WARNING
        log = get_logger()
        log.log(level, "library_warning", logger=record.name, text=text, exc_info=record.exc_info)


class _Cleaner:
    """Masks numbers, hides secrets and bytes, escapes what is not printable, and cuts what is too long."""

    def __init__(self, *, mask_numbers: bool) -> None:
        self._mask_numbers = mask_numbers

    def __call__(self, _logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        return {key: self._clean(key, value) for key, value in event.items()}

    def _clean(self, key: str, value: Any) -> Any:
        if value is None:
            return value
        if key in _SECRET_KEYS:
            return _HIDDEN
        if self._mask_numbers and key in _NUMBER_KEYS and isinstance(value, str | int):
            return mask(str(value))
        if isinstance(value, bool | int | float):
            return value
        if isinstance(value, bytes | bytearray | memoryview):
            return f"({len(value)} bytes)"
        if isinstance(value, list | tuple | set | frozenset):
            return [self._clean(key, item) for item in value]
        if isinstance(value, Mapping):
            return {self._text(str(name)): self._clean(str(name), item) for name, item in value.items()}
        return self._text(str(value))

    def _text(self, text: str) -> str:
        if len(text) > LONGEST_VALUE:
            text = text[:LONGEST_VALUE] + "..."
        for pattern, instead in _SECRETS:
            text = pattern.sub(instead, text)
        if self._mask_numbers:
            text = _NUMBER.sub(lambda match: mask(match[0]), text)
        if text.isprintable():
            return text
        return "".join(char if char.isprintable() else _escape(char) for char in text)


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def _check_name(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    if event["event"] not in EVENTS:
        raise UnlistedEventError(f"the event {event['event']!r} is not in gateway.log.EVENTS")
    return event


def _without_values(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Turn an exception into `error` (its kind and text) and `at` (its way, innermost first)."""
    given = event.pop("exc_info", None)
    if given is True:
        given = sys.exc_info()
    exception = given[1] if isinstance(given, tuple) else given
    if isinstance(exception, BaseException):
        event.setdefault("error", f"{type(exception).__name__}: {exception}")
        frames = reversed(traceback.extract_tb(exception.__traceback__))
        event["at"] = " < ".join(f"{frame.name} {frame.filename}:{frame.lineno}" for frame in frames)
    return event


def _json(_logger: WrappedLogger, _method: str, event: EventDict) -> str:
    first = {key: event.pop(key) for key in ("time", "level", "event")}
    return json.dumps({**first, **event})

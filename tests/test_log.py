"""The log: what an operator sees of each event, and what nobody may see."""

import ast
import io
import json
import logging
import re
import warnings
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from gateway import log as log_module
from gateway.log import EVENTS, Format, Level, UnlistedEventError, configure, get_logger, mask

PACKAGE = Path(log_module.__file__).parent
NUMBER = "+13127367276"
LOG_METHODS = {"debug", "info", "warning", "error", "critical", "exception", "log"}


@pytest.fixture(autouse=True)
def _own_configuration() -> Iterator[None]:
    """Leave logging as it was found."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(capture=False)
    for name in ("mail.log", "aiohttp.access"):
        logging.getLogger(name).disabled = False
    structlog.contextvars.clear_contextvars()
    structlog.reset_defaults()


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        """Say so."""
        return True


def start(
    *,
    form: Format = "json",
    level: Level = "info",
    mask_numbers: bool = True,
    stream: io.StringIO | None = None,
) -> io.StringIO:
    """Configure the log and return where it writes."""
    stream = stream or io.StringIO()
    configure(format=form, level=level, mask_numbers=mask_numbers, stream=stream)
    return stream


def records(stream: io.StringIO) -> list[dict[str, Any]]:
    """Read back what was logged."""
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_record_is_one_json_line_with_time_level_and_event() -> None:
    """A program reads each record from one line, beginning with when, how bad and what."""
    stream = start()
    get_logger().info("mail_accepted", mail="a1", pages=3)
    assert stream.getvalue().endswith("\n")
    (record,) = records(stream)
    assert list(record) == ["time", "level", "event", "mail", "pages"]
    assert record["level"] == "info"
    assert record["event"] == "mail_accepted"
    assert record["pages"] == 3
    assert record["time"].endswith("Z")
    assert datetime.fromisoformat(record["time"]).utcoffset() == timedelta(0)


@pytest.mark.parametrize(
    ("form", "terminal", "is_json"),
    [("auto", True, False), ("auto", False, True), ("console", False, False), ("json", True, True)],
)
def test_format_follows_the_stream(form: Format, terminal: bool, is_json: bool) -> None:  # noqa: FBT001  (parameters)
    """A person at a terminal gets columns, a file or a pipe gets JSON, unless one of them was asked for."""
    stream = start(form=form, stream=Terminal() if terminal else io.StringIO())
    get_logger().info("ready", smtp="127.0.0.1:2525")
    assert stream.getvalue().startswith("{") is is_json
    assert "127.0.0.1:2525" in stream.getvalue()
    assert stream.getvalue().count("\n") == 1
    assert ("\x1b[" in stream.getvalue()) is (terminal and not is_json), "colours only on a terminal"


def test_records_below_the_level_are_left_out() -> None:
    """At level warning, everyday events are not written."""
    stream = start(level="warning")
    get_logger().info("ready")
    get_logger().warning("configuration_warning", key="senders.networks")
    assert [record["event"] for record in records(stream)] == ["configuration_warning"]


def test_bound_fields_are_in_every_record() -> None:
    """What happens while a fax is worked on can be found by its id."""
    stream = start()
    with structlog.contextvars.bound_contextvars(fax="a1-1"):
        get_logger().info("call_begun", attempt=1)
    get_logger().info("ready")
    assert [record.get("fax") for record in records(stream)] == ["a1-1", None]


def test_unlisted_name_is_an_error() -> None:
    """A misspelt event cannot slip into the log under a name nobody looks for."""
    start()
    with pytest.raises(UnlistedEventError, match="mail_acepted"):
        get_logger().info("mail_acepted")


@pytest.mark.parametrize(
    ("number", "masked"),
    [
        ("+13127367276", "+1312*****76"),
        ("+1 312-736-7276", "+1312*****76"),
        ("13127367276", "1312*****76"),
        ("+4930123456", "+493*****56"),
        ("+493012345678901", "+4930*********01"),
        ("+49301234", "+4*****34"),
        ("+4912345", "+*****45"),
        ("+491234", "+*****4"),
        ("12345", "*****"),
        ("112", "***"),
        ("FAX", "***"),
        ("", "***"),
    ],
)
def test_mask(number: str, masked: str) -> None:
    """A masked number still tells the area and its last two digits, but cannot be dialled."""
    assert mask(number) == masked


@given(st.from_regex(r"\+?[0-9][0-9 ().-]{0,20}", fullmatch=True))
def test_mask_hides_at_least_five_digits(number: str) -> None:
    """However short a number is, five of its digits stay hidden."""
    digits = sum(char.isdigit() for char in number)
    assert mask(number).count("*") >= min(5, digits)
    assert len(mask(number).lstrip("+")) == digits


def test_numbers_are_masked_wherever_they_stand() -> None:
    """No record shows a whole telephone number: not in its own field, not inside a text."""
    stream = start()
    get_logger().info(
        "call_begun",
        to=NUMBER,
        number=13127367276,
        from_number="312 736 7276",
        error=f"no route to {NUMBER}, tried twice",
        numbers=[NUMBER, {"to": "3127367276"}],
    )
    (record,) = records(stream)
    assert record["to"] == "+1312*****76"
    assert record["number"] == "1312*****76"
    assert record["error"] == "no route to +1312*****76, tried twice"
    assert not re.search(r"736.?72", stream.getvalue())


def test_numbers_are_shown_when_asked_for() -> None:
    """With `mask_numbers = false` an operator sees the whole number."""
    stream = start(mask_numbers=False)
    get_logger().info("call_begun", to=NUMBER, error=f"no route to {NUMBER}")
    (record,) = records(stream)
    assert record["to"] == NUMBER
    assert record["error"] == f"no route to {NUMBER}"


def _ask(password: str) -> None:
    raise RuntimeError(f"{len(password)} is not enough")


def test_planted_secrets_never_show() -> None:
    """Keys, passwords and documents stay out of the log, on whatever way they come."""
    stream = start()
    log = get_logger()
    log.warning(
        "call_unavailable",
        api_key="KEY0123456789ABCDEF_plantedsecret",
        relay_password="plantedsecret",
        setting=SecretStr("plantedsecret"),
        headers={"Authorization": "Bearer plantedsecret", "authorization": "plantedsecret"},
        error="401 for Bearer plantedsecret with KEY0123456789ABCDEF_plantedsecret",
        relay="smtps://user:plantedsecret@relay.example",
        document=b"%PDF-1.7 plantedsecret",
        pages=[bytearray(b"plantedsecret")],
    )
    try:
        _ask(password="plantedsecret")
    except RuntimeError:
        log.exception("task_failed", task="submit")
    assert "plantedsecret" not in stream.getvalue()
    assert records(stream)[0]["document"] == "(22 bytes)"
    assert records(stream)[0]["pages"] == ["(13 bytes)"]


def test_traceback_tells_the_way_in_one_line() -> None:
    """A fault of the program is logged with its kind, text and place, in one record."""
    stream = start()

    def inner() -> None:
        raise KeyError("lost\nhere")

    try:
        inner()
    except KeyError as error:
        get_logger().error("task_failed", task="submit", exc_info=error)
    get_logger().error("task_failed", task="submit", error="in words", exc_info=ValueError("not this"))
    first, second = records(stream)
    assert first["error"] == r"KeyError: 'lost\nhere'"
    assert re.match(r"inner \S*test_log\.py:\d+ < test_traceback\S* \S*test_log\.py:\d+$", first["at"])
    assert second["error"] == "in words"


@pytest.mark.parametrize("form", ["json", "console"])
@given(text=st.text(st.characters(codec=None, exclude_categories=[])))
def test_one_record_stays_one_line(form: Format, text: str) -> None:
    """No input, however hostile, can begin a new line, forge a record or steer a terminal."""
    stream = start(form=form)
    get_logger().info("mail_refused", sender=text, nested={"field": [text]})
    line = stream.getvalue()
    assert line.endswith("\n")
    assert line[:-1].isprintable()


def test_hostile_address_does_not_reach_the_terminal() -> None:
    """Escape sequences in an address are shown as text."""
    stream = start()
    get_logger().info("mail_refused", sender='\x1b[2J\r\n{"event":"ready"}\u202e')
    assert records(stream)[0]["sender"] == r"\x1b[2J\r\n" + '{"event":"ready"}' + r"\u202e"


def test_long_values_are_cut() -> None:
    """A peer cannot fill the disk by one long value."""
    stream = start()
    get_logger().info("mail_refused", sender="x" * 100_000)
    assert records(stream)[0]["sender"] == "x" * log_module.LONGEST_VALUE + "..."


@pytest.mark.parametrize("form", ["json", "console"])
def test_any_value_can_be_logged(form: Format) -> None:
    """A path, a set or an object of a library is written as text instead of failing."""
    stream = start(form=form)
    get_logger().info("started", path=Path("/tmp/x"), kinds={"one"}, none=None, yes=True, half=0.5)  # noqa: S108  (only a text)
    assert "/tmp/x" in stream.getvalue()  # noqa: S108  (as above)


def test_warnings_of_libraries_come_the_same_way() -> None:
    """What libraries log from WARNING on, and Python's own warnings, are records like all others."""
    logging.getLogger().handlers.clear()  # pytest's own would fail on the misfit below
    stream = start()
    library = logging.getLogger("some.library")
    library.info("everyday %s", "matter")
    library.warning("trouble with %s", NUMBER)
    library.error("worse", exc_info=OSError("gone"))
    library.warning("%d fits not", "text")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old habit", DeprecationWarning, stacklevel=1)
    found = records(stream)
    assert {record["event"] for record in found} == {"library_warning"}
    assert [(record["level"], record["logger"]) for record in found] == [
        ("warning", "some.library"),
        ("error", "some.library"),
        ("warning", "some.library"),
        ("warning", "py.warnings"),
    ]
    assert found[0]["text"] == "trouble with +1312*****76"
    assert found[1]["error"] == "OSError: gone"
    assert found[2]["text"] == "%d fits not"
    assert "old habit" in found[3]["text"]


@pytest.mark.parametrize("name", ["mail.log", "aiohttp.access"])
def test_loggers_that_tell_addresses_are_silent(name: str) -> None:
    """The mail server's own log, which writes whole addresses, stays off."""
    stream = start()
    logging.getLogger(name).error("rcpt to <%s@fax.local>", "3127367276")
    assert stream.getvalue() == ""


def test_configured_again_only_the_last_counts() -> None:
    """After a new configuration each record is written once, to the new place."""
    old = start()
    log = get_logger()
    log.info("started")
    new = start()
    log.info("ready")
    logging.getLogger("some.library").warning("once")
    assert [record["event"] for record in records(old)] == ["started"]
    assert [record["event"] for record in records(new)] == ["ready", "library_warning"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_full_disk_behind_the_log_harms_nobody() -> None:
    """When the log cannot be written, work goes on."""
    with (
        Path("/dev/full").open("wb", buffering=0) as full,
        io.TextIOWrapper(cast("BinaryIO", full), write_through=True) as stream,
    ):
        configure(format="json", level="info", mask_numbers=True, stream=stream)
        get_logger().info("ready")
        get_logger().info("stopping")


def _receiver(node: ast.expr) -> str:
    """Return the last name of what a method is called on: `log` for `self.log.bind(fax=1)`."""
    if isinstance(node, ast.Call):
        return _receiver(node.func.value) if isinstance(node.func, ast.Attribute) else ""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _logged() -> Iterator[tuple[str, str, set[str]]]:
    """Yield (place, name, fields written out) for each event logged in the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if node.func.attr not in LOG_METHODS or _receiver(node.func.value).lstrip("_") != "log":
                continue
            place = f"{path.name}:{node.lineno}"
            argument = node.args[1 if node.func.attr == "log" else 0]
            names = [part.value for part in ast.walk(argument) if isinstance(part, ast.Constant)]
            assert names, f"{place}: the name of the event must be written out"
            fields = {str(keyword.arg) for keyword in node.keywords if keyword.arg is not None}
            yield from ((place, str(name), fields) for name in names)


def test_every_event_logged_is_listed() -> None:
    """The list of events is complete: nothing appears in the log that the list does not explain."""
    unlisted = [f"{place}: {name}" for place, name, _ in _logged() if name not in EVENTS]
    assert unlisted == []


def test_every_event_listed_is_logged() -> None:
    """The list of events is true: an alarm set on any of its names can go off."""
    assert sorted(set(EVENTS) - {name for _, name, _ in _logged()}) == []


def test_every_event_is_described() -> None:
    """An operator finds the fields of each event in the list."""
    for name, description in EVENTS.items():
        assert re.fullmatch(r"[a-z]+(_[a-z]+)+|started|ready|stopping|stopped|purged", name)
        assert re.fullmatch(r"([a-z_]+(, [a-z_]+)*|\(no fields\)): \S.*", description)


def test_every_field_is_described() -> None:
    """An operator finds each field of a record in the list, beside its event."""
    missing = []
    for place, name, fields in _logged():
        described = set(EVENTS.get(name, "").partition(":")[0].split(", "))
        missing += [f"{place}: {name} {field}" for field in fields - described - {"exc_info"}]
    assert missing == []

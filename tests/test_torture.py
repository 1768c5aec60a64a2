"""A short crash run on each store, and that its verdict finds what it is there to find."""

import dataclasses
from pathlib import Path

import pytest
import torture
from torture_mails import Plan
from torture_verdict import Call, Ledgers, Mailed, Reply, Stored, Verdict, judge

ONE, TWO = "+13125560001", "+13125560002"
GOOD = Ledgers(
    mails=[Mailed("<1@example.com>", (ONE, TWO), 2, ("m",))],
    calls=[
        Call(ONE, "a", 10.0, 11.0, delivered=True, pages=2),
        Call(TWO, "b", 10.0, 11.0, delivered=False, pages=2),
        Call(TWO, "c", 12.0, 13.0, delivered=True, pages=2),
    ],
    replies=[Reply("<m-1>", "m-1", ONE, "delivered"), Reply("<m-2>", "m-2", TWO, "delivered")],
    faxes=[
        Stored("m-1", "m", ONE, "delivered", 9.0, 11.0),
        Stored("m-2", "m", TWO, "delivered", 9.0, 13.0),
    ],
    ends={ONE: "delivered", TWO: "delivered"},
)
"""Two faxes, one of them delivered at its second call."""


@pytest.mark.timeout(180)
@pytest.mark.parametrize("store", torture.GATEWAYS)
async def test_under_a_stream_of_mails_and_kills_no_fax_is_lost_doubled_or_unanswered(
    tmp_path: Path, store: str
) -> None:
    """Killed at all kinds of moments, the gateway sends each fax of each 250 once and answers it once."""
    options = torture.Options(seed=3, minutes=0.1, store=store, faxes=150, kills=8, pause=0.5)
    told: list[str] = []
    result = await torture.Run(options, tmp_path, told.append).run()
    lines = "\n".join([*told, *torture.report(options, result)])
    assert torture.exit_code(options, result) == 0, lines
    assert result.verdict.clean
    assert result.faxes >= 150
    assert result.world.figures.killed >= 8
    assert len(result.world.carrier.sandbox.ledger) >= result.faxes
    assert len({reply.number for reply in result.world.replies}) == result.faxes
    # And what the verdict finds decides the exit code and stands in the report.
    result.verdict.lost[ONE] = "no fax was stored"
    assert torture.exit_code(options, result) == 1
    assert f"lost: {ONE}: no fax was stored" in torture.report(options, result)


def test_ledgers_in_which_all_is_well_are_found_clean() -> None:
    """A call after a failed one and a reply that came again under its own name are no faults."""
    again = dataclasses.replace(GOOD, replies=[*GOOD.replies, GOOD.replies[0]])
    verdict = judge(again)
    assert verdict.clean
    assert verdict.repeated == 1


def changed(**ledgers: object) -> Verdict:
    """Judge the good ledgers with some of them replaced."""
    return judge(dataclasses.replace(GOOD, **ledgers))  # type: ignore[arg-type]  # each of its own kind


LOST: dict[str, dict[str, object]] = {
    "it was never stored": {"faxes": GOOD.faxes[1:], "replies": GOOD.replies[1:]},
    "it has not ended": {
        "faxes": [Stored("m-1", "m", ONE, "sending", 9.0, None), *GOOD.faxes[1:]],
        "replies": GOOD.replies[1:],
    },
    "the carrier never delivered it": {"calls": GOOD.calls[1:]},
    "it failed without need": {
        "faxes": [Stored("m-1", "m", ONE, "failed", 9.0, 11.0), *GOOD.faxes[1:]],
        "replies": [Reply("<m-1>", "m-1", ONE, "failed"), *GOOD.replies[1:]],
    },
}
DOUBLED = {
    "it was delivered before": [*GOOD.calls, Call(ONE, "d", 14.0, 15.0, delivered=True, pages=2)],
    "the earlier call was under way": [*GOOD.calls, Call(ONE, "d", 10.5, 15.0, delivered=False, pages=2)],
    "the earlier call has not ended": [
        dataclasses.replace(GOOD.calls[1], ended_at=None), *GOOD.calls[::2],
    ],
}  # fmt: skip


@pytest.mark.parametrize("how", LOST)
def test_a_lost_fax_is_found(how: str) -> None:
    """A 250 without a fax that ended as it had to is named by its number."""
    verdict = changed(**LOST[how])
    assert set(verdict.lost) == {ONE}
    assert not verdict.clean


@pytest.mark.parametrize("how", DOUBLED)
def test_a_fax_sent_twice_is_found(how: str) -> None:
    """A number that is called again before its call has failed is named."""
    verdict = changed(calls=DOUBLED[how])
    assert set(verdict.doubled) in ({ONE}, {TWO})
    assert not verdict.clean


def test_a_mail_that_became_two_faxes_is_found() -> None:
    """A second fax of the same mail is a fault, unless the first one had failed."""
    twin = Stored("n-1", "n", ONE, "delivered", 9.5, 11.0)
    reply = Reply("<n-1>", "n-1", ONE, "delivered")
    verdict = changed(faxes=[*GOOD.faxes, twin], replies=[*GOOD.replies, reply])
    assert set(verdict.doubled) == {ONE}


def test_a_missing_reply_is_found() -> None:
    """A fax that ended without a word to its sender is named."""
    verdict = changed(replies=GOOD.replies[1:])
    assert set(verdict.missing) == {"m-1"}
    assert not verdict.clean


def test_a_fax_that_waits_for_a_person_is_counted_apart() -> None:
    """A held fax is neither lost nor unanswered, and yet not what a run should end with."""
    held = Stored("m-1", "m", ONE, "held", 9.0, None)
    verdict = changed(faxes=[held, *GOOD.faxes[1:]], replies=GOOD.replies[1:])
    assert not any(verdict.findings.values())
    assert verdict.held == ["m-1"]
    assert not verdict.clean


def test_a_reply_that_came_again_by_another_name_is_found() -> None:
    """Two final replies that no mail program can recognise as one are named."""
    verdict = changed(replies=[*GOOD.replies, Reply("<other>", "m-1", ONE, "delivered")])
    assert set(verdict.renamed) == {"m-1"}
    assert not verdict.clean


@pytest.mark.parametrize(
    ("ledger", "row"),
    [
        ("replies", Reply("<m-1>", "m-1", ONE, "failed")),
        ("faxes", Stored("x-1", "x", "+13125560003", "held", 9.0, None)),
        ("calls", Call("+13125560003", "d", 14.0, 15.0, delivered=True, pages=2)),
        ("mails", Mailed("<2@example.com>", ("+13125560003",), 1, ())),
    ],
)
def test_ledgers_at_odds_are_found(ledger: str, row: object) -> None:
    """A reply that says another end, and a fax, a call or a mail that nobody knows of, are named."""
    assert changed(**{ledger: [*getattr(GOOD, ledger), row]}).strange


def test_a_document_that_went_to_the_wrong_number_is_found() -> None:
    """A fax with another number of pages than was mailed is named."""
    calls = [dataclasses.replace(GOOD.calls[0], pages=3), *GOOD.calls[1:]]
    assert set(changed(calls=calls).strange) == {ONE}


def test_the_same_seed_makes_the_same_mails() -> None:
    """A run is repeated by its seed: the same mails, and the same faults of the carrier."""
    one, same, other = Plan(1, 50), Plan(1, 50), Plan(2, 50)
    assert (one.fates, one.script) == (same.fates, same.script)
    assert [letter.numbers for letter in one.letters()] == [letter.numbers for letter in same.letters()]
    assert one.script != other.script

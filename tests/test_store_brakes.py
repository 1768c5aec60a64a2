"""What stops the queue and how it goes on: pauses, holds of the account, the operator's hold, probes."""

from dataclasses import replace

import pytest
import stores
from faxes import DAY, FROM, HOUR, NOW, Maker
from stores import SETTINGS, TriedStore, newest, numbers, reported

from gateway import store_brakes
from gateway.records import (
    Blame,
    Brake,
    Fax,
    HeldFor,
    NotTaken,
    Proof,
    Rejected,
    Stage,
    State,
    Withdrawn,
)
from gateway.store_work import CallSettings

store = stores.store

CAUSE = "HTTP 401 10009"
ELSEWHERE = replace(SETTINGS, from_number="+442071234567")


def too_many(fax: Fax, retry_after: float | None = None) -> NotTaken:
    """Make a 429."""
    return NotTaken(newest(fax), "HTTP 429", retry_after)


def rejected(blame: Blame, cause: str = CAUSE) -> Maker:
    """Make a refusal."""
    return lambda fax: Rejected(newest(fax), blame, cause, "account_refused")


async def next_probe(store: TriedStore, settings: CallSettings = SETTINGS) -> tuple[float, Fax]:
    """Let time pass until a fax may be called; return the seconds and the fax."""
    start = store.clock.now
    while store.clock.now < start + DAY:
        due = [brake.probe_at for brake in (await store.count()).brakes if brake.probe_at is not None]
        if (fax := await store.claim_call(settings)) is not None:
            return store.clock.now - start, fax
        assert min(due) > store.clock.now, "a probe that is due was not let go"
        store.clock.now = max(due) - 1
        assert await store.claim_call(settings) is None
        store.clock.now += 1
    raise AssertionError("nothing may be called for a day")


async def waits_of(store: TriedStore, event: Maker, count: int) -> list[float]:
    """Let as many probes fail; return the seconds from one to the next."""
    waits = []
    fax = await store.claimed()
    for _ in range(count):
        await store.apply(fax.id, event(fax))
        seconds, fax = await next_probe(store)
        waits.append(seconds)
    return waits


async def test_too_many_requests_pause_the_queue(store: TriedStore) -> None:
    """After a 429 one fax is tried after a minute, then after two, four, at last every quarter of an hour."""
    await store.mail_in(*numbers(3))
    assert await waits_of(store, too_many, 6) == [60.0, 120.0, 240.0, 480.0, 900.0, 900.0]
    assert await store.brakes() == {("pause", "account")}


async def test_a_hold_of_the_account_is_probed_less_and_less_often(store: TriedStore) -> None:
    """A refused key is tried with one real fax after five minutes, at last every hour."""
    await store.mail_in(*numbers(3))
    assert await waits_of(store, rejected(Blame.ACCOUNT), 6) == [300.0, 600.0, 1200.0, 2400.0, 3600.0, 3600.0]
    assert await store.brakes() == {("hold", "account")}
    assert await store.mail_out() != []


async def test_only_one_fax_is_the_probe(store: TriedStore) -> None:
    """While a probe is under way no second fax is tried, whatever channels are free."""
    await store.mail_in(*numbers(3))
    fax = await store.claimed()
    await store.apply(fax.id, too_many(fax))
    store.clock.now += 60
    await store.claimed()
    store.clock.now += 119
    assert await store.claim_call(SETTINGS) is None
    store.clock.now += 1
    await store.claimed()


async def test_a_probe_that_was_never_posted_is_made_by_another_fax(store: TriedStore) -> None:
    """When the look before its call holds a probe back, the next fax is the probe, without another wait."""
    await store.mail_in(*numbers(3))
    fax = await store.claimed()
    await store.apply(fax.id, too_many(fax))
    store.clock.now += 60
    probe = await store.claimed()
    store.clock.now += 7
    await store.apply(probe.id, Withdrawn(newest(probe), "an earlier attempt", 120.0))
    other = await store.claimed()
    assert other.id != probe.id
    assert await store.claim_call(SETTINGS) is None
    await store.apply(other.id, too_many(other))
    assert (await next_probe(store))[0] == 120.0


async def test_a_probe_that_was_never_posted_shortens_no_other_wait(store: TriedStore) -> None:
    """A brake that waits for what the carrier said meanwhile keeps its time, and so does a number's hold."""
    await store.mail_in(*numbers(4))
    other, fax = await store.claimed(ELSEWHERE), await store.claimed()
    await store.apply(other.id, rejected(Blame.SENDER)(other))
    await store.apply(fax.id, too_many(fax))
    store.clock.now += 60
    probe = await store.claimed()
    await store.apply(fax.id, Withdrawn(newest(fax), "too late to say", 0.0))  # its call had ended
    held, paused = await probe_times(store)
    assert (held, paused) == (NOW + 300.0, NOW + 60.0 + 120.0)
    await store.apply(probe.id, Withdrawn(newest(probe), "an earlier attempt", 120.0))
    assert await probe_times(store) == (NOW + 300.0, NOW + 60.0)
    probe = await store.claimed()
    store.clock.now += 1
    await store._do(store_brakes.set_brake, Brake("pause", "account", "HTTP 429", Proof.TAKEN, 700.0))
    await store.apply(probe.id, Withdrawn(newest(probe), "an earlier attempt", 120.0))
    assert await probe_times(store) == (NOW + 300.0, NOW + 761.0)


async def probe_times(store: TriedStore) -> tuple[float | None, float | None]:
    """Return when a probe of the other number's hold, and one of the account's pause, may go."""
    due = {brake.kind: brake.probe_at for brake in (await store.count()).brakes}
    return due["hold"], due["pause"]


async def test_the_carrier_may_name_the_wait(store: TriedStore) -> None:
    """A Retry-After is obeyed."""
    await store.mail_in(*numbers(2))
    fax = await store.claimed()
    await store.apply(fax.id, too_many(fax, 17.0))
    assert (await next_probe(store))[0] == 17.0


async def test_a_carrier_that_always_names_a_second_is_asked_less_and_less_often(store: TriedStore) -> None:
    """A `Retry-After: 1` that turns out wrong each time is obeyed once, then our own waits are longer."""
    await store.mail_in(*numbers(3))
    waits = await waits_of(store, lambda fax: too_many(fax, 1.0), 6)
    assert waits == [1.0, 120.0, 240.0, 480.0, 900.0, 900.0]


async def test_a_longer_wait_that_the_carrier_names_is_kept(store: TriedStore) -> None:
    """The carrier knows best when it wants to be asked later than we would."""
    await store.mail_in(*numbers(2))
    fax = await store.claimed()
    for retry_after, wait in ((1.0, 1.0), (700.0, 700.0), (3600.0, 3600.0), (2.0, 480.0)):
        await store.apply(fax.id, too_many(fax, retry_after))
        seconds, fax = await next_probe(store)
        assert seconds == wait


async def test_a_probe_that_is_taken_sets_the_queue_free(store: TriedStore) -> None:
    """Once the carrier takes a fax again, all go on by themselves, and the next pause starts small."""
    await store.mail_in(*numbers(4))
    fax = await store.claimed()
    await store.apply(fax.id, too_many(fax))
    _, probe = await next_probe(store)
    await store.taken(probe)
    assert await store.brakes() == set()
    fax = await store.claimed()
    await store.apply(fax.id, too_many(fax))
    assert (await next_probe(store))[0] == 60.0


async def test_some_holds_end_only_with_a_call(store: TriedStore) -> None:
    """An account that refuses calls after taking faxes is proved well by a call that rings, not by a 202."""
    fax = await store.called("c1", numbers(1)[0])
    await store.mail_in(*numbers(3)[1:])
    await store.webhook(reported("c1", Stage.FAILED, number=fax.number, reason="account_disabled"))
    assert await store.brakes() == {("hold", "account")}
    _, probe = await next_probe(store)
    await store.taken(probe, "c2")
    assert await store.brakes() == {("hold", "account")}
    await store.webhook(reported("c2", Stage.DIALLED, number=probe.number))
    assert await store.brakes() == set()


async def test_a_call_from_before_proves_nothing(store: TriedStore) -> None:
    """News of a call that was already open when the account was held does not end the hold."""
    await store.mail_in(*numbers(3))
    before, refused = await store.claimed(), await store.claimed()
    store.clock.now += 1
    await store.apply(refused.id, rejected(Blame.ACCOUNT)(refused))
    await store.taken(before, "c1")
    await store.webhook(reported("c1", Stage.DELIVERED, number=before.number))
    assert await store.brakes() == {("hold", "account")}
    assert (await next_probe(store))[0] == 300.0


async def test_a_failed_call_to_a_busy_line_is_proof_enough(store: TriedStore) -> None:
    """The account is well when the other side was busy: the call was placed."""
    fax = await store.called("c1", numbers(1)[0])
    await store.mail_in(*numbers(3)[1:])
    await store.webhook(reported("c1", Stage.FAILED, number=fax.number, reason="user_channel_limit_exceeded"))
    assert await store.brakes() == {("pause", "account")}
    _, probe = await next_probe(store)
    await store.taken(probe, "c2")
    await store.webhook(reported("c2", Stage.FAILED, number=probe.number, reason="user_busy"))
    assert await store.brakes() == set()


async def test_a_hold_ends_though_the_clock_was_set_back(store: TriedStore) -> None:
    """A hold from what is now the future ends with the next call that succeeds, like any other."""
    await store.mail_in(*numbers(3))
    fax = await store.claimed()
    await store.apply(fax.id, rejected(Blame.ACCOUNT)(fax))
    store.clock.now -= 3 * HOUR
    await store.mail_in(*numbers(3))
    assert await store.claim_call(SETTINGS) is None
    seconds, probe = await next_probe(store)
    assert seconds == HOUR, "no probe is farther away than the longest wait"
    assert await store.claim_call(SETTINGS) is None
    await store.taken(probe)
    assert await store.brakes() == set()
    await store.claimed()


async def test_release_all_ends_a_hold_though_the_clock_was_set_back(store: TriedStore) -> None:
    """After `release --all` one fax that gets through is enough for all to go on, whatever the clock did."""
    await store.mail_in(*numbers(3))
    fax = await store.claimed()
    await store.apply(fax.id, rejected(Blame.ACCOUNT)(fax))
    store.clock.now -= 300.0
    await store.mail_in(*numbers(3))
    await store.release_all()
    await store.taken(await store.claimed())
    assert await store.brakes() == set()


async def test_a_pause_ends_though_the_clock_was_set_back(store: TriedStore) -> None:
    """A pause is over an hour later at most, which is the longest that a carrier may ask for."""
    await store.mail_in(*numbers(2))
    fax = await store.claimed()
    await store.apply(fax.id, too_many(fax))
    store.clock.now -= 10 * DAY
    await store.mail_in(*numbers(3))
    assert await store.claim_call(SETTINGS) is None
    assert (await next_probe(store))[0] == HOUR


async def test_a_spend_limit_ends_though_the_clock_was_set_back(store: TriedStore) -> None:
    """By whatever clock, the carrier's day is over at the next midnight."""
    await store.called()
    await store.webhook(reported("c1", Stage.FAILED, reason="outbound_profile_daily_spend_limit_exceeded"))
    store.clock.now -= 10 * DAY + HOUR
    await store.mail_in(*numbers(3))
    assert await store.claim_call(SETTINGS) is None
    assert (await next_probe(store))[0] == 13 * HOUR + 300


async def test_a_clock_set_back_does_not_end_what_an_operator_holds(store: TriedStore) -> None:
    """After `hold --all` nothing goes out by itself, whatever the clock does."""
    await store.mail_in(*numbers(2))
    await store.hold_all()
    store.clock.now -= 10 * DAY
    for _ in range(2):
        assert await store.claim_call(SETTINGS) is None
        store.clock.now += 2 * DAY
    assert await store.brakes() == {("operator", "account")}


async def test_a_spend_limit_waits_for_the_next_day(store: TriedStore) -> None:
    """The carrier's day ends at 00:00 UTC; until then nothing is tried."""
    await store.called()
    await store.webhook(reported("c1", Stage.FAILED, reason="outbound_profile_daily_spend_limit_exceeded"))
    assert (await next_probe(store))[0] == 12 * HOUR + 300


async def test_a_refused_from_number_stops_only_itself(store: TriedStore) -> None:
    """Another from number calls on, and its success proves nothing for the refused one."""
    await store.mail_in(*numbers(4))
    fax = await store.claimed()
    await store.apply(fax.id, rejected(Blame.SENDER)(fax))
    assert await store.brakes() == {("hold", FROM)}
    assert await store.claim_call(SETTINGS) is None
    other = await store.claimed(ELSEWHERE)
    await store.taken(other, "c1")
    assert await store.brakes() == {("hold", FROM)}
    _, probe = await next_probe(store)
    await store.taken(probe, "c2")
    assert await store.brakes() == set()


async def test_the_operators_hold_ends_only_by_the_operator(store: TriedStore) -> None:
    """After `hold --all` nothing is called, whatever succeeds, until `release --all`."""
    await store.mail_in(*numbers(3))
    open_call = await store.claimed()
    await store.hold_all()
    await store.hold_all()
    store.clock.now += DAY
    assert await store.claim_call(SETTINGS) is None
    await store.taken(open_call, "c1")
    await store.webhook(reported("c1", Stage.DELIVERED, number=open_call.number))
    assert await store.brakes() == {("operator", "account")}
    await store.release_all()
    assert await store.brakes() == set()
    await store.claimed()


async def test_release_all_lets_the_probe_go_at_once(store: TriedStore) -> None:
    """Who repaired the account need not wait for the next probe; if it was not repaired, the hold goes on."""
    await store.mail_in(*numbers(3))
    fax = await store.claimed()
    await store.apply(fax.id, rejected(Blame.ACCOUNT)(fax))
    assert await store.claim_call(SETTINGS) is None
    await store.release_all()
    probe = await store.claimed()
    assert await store.claim_call(SETTINGS) is None
    await store.apply(probe.id, rejected(Blame.ACCOUNT)(probe))
    assert (await next_probe(store))[0] == 600.0


async def test_senders_hear_of_a_hold_once(store: TriedStore) -> None:
    """All who wait are told "still trying" when the account is held, those who come later too, each once."""
    accepted = await store.mail_in(*numbers(2))
    fax = await store.claimed()
    await store.apply(fax.id, rejected(Blame.ACCOUNT)(fax))
    assert await store.pass_time() == 2
    late = await store.queued(numbers(3)[2])
    assert await store.pass_time() == 1
    assert await store.pass_time() == 0
    assert sorted(await store.mail_out()) == sorted(
        ["alert.account_held.2026-03-02", *(f"{fax_id}.delayed" for fax_id in (*accepted.fax_ids, late.id))]
    )


# --- suspects ----------------------------------------------------------------------------------------


async def refuse(store: TriedStore, cause: str = "HTTP 422 10015") -> Fax:
    """Claim a fax, and let the carrier refuse it in a way that may concern the account."""
    fax = await store.claimed()
    return await store.apply(fax.id, rejected(Blame.SUSPECT, cause)(fax))


async def test_the_second_number_puts_the_account_on_hold(store: TriedStore) -> None:
    """One odd refusal holds one fax; the same to another number holds the account instead."""
    await store.mail_in(*numbers(2))
    first = await refuse(store)
    assert (first.state, first.held_for) == (State.HELD, HeldFor.REFUSED)
    assert await store.brakes() == set()
    second = await refuse(store)
    assert second == await store.fax(second.id), "the answer is the fax as it is now"
    assert [(await store.fax(fax.id)).state for fax in (first, second)] == [State.QUEUED] * 2
    assert await store.brakes() == {("hold", "account")}
    told = {f"{fax.id}.delayed" for fax in (first, second)}
    alerts = {f"alert.{cause}.2026-03-02" for cause in ("account_held", "fax_held")}
    assert set(await store.mail_out()) == told | alerts


@pytest.mark.parametrize(
    ("called", "causes"),
    [([numbers(1)[0]] * 2, ("HTTP 422 10015",) * 2), (numbers(2), ("HTTP 422 10015", "HTTP 403 10010"))],
    ids=["same number", "other cause"],
)
async def test_what_does_not_repeat_holds_only_its_fax(
    store: TriedStore, called: list[str], causes: tuple[str, str]
) -> None:
    """Two faxes to one number, or two different refusals, say nothing about the account."""
    for number in called:
        await store.queued(number)
    faxes = [await refuse(store, cause) for cause in causes]
    assert [(await store.fax(fax.id)).state for fax in faxes] == [State.HELD] * 2
    assert await store.brakes() == set()


async def test_a_refused_probe_waits_with_the_others(store: TriedStore) -> None:
    """While the account is held for a refusal, a probe that meets it again is not held by itself."""
    await store.mail_in(*numbers(2))
    for _ in range(2):
        await refuse(store)
    seconds, probe = await next_probe(store)
    assert seconds == 300.0
    after = await store.apply(probe.id, rejected(Blame.SUSPECT, "HTTP 422 10015")(probe))
    assert after.state is State.QUEUED
    assert (await next_probe(store))[0] == 600.0
    assert store.clock.now == NOW + 900.0

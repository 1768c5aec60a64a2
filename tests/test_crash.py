"""kill -9 at every stage of a fax's way, then a restart: for every 250 one fax and one final reply."""

from collections.abc import AsyncIterator
from pathlib import Path
from signal import SIGKILL

import crashes
import pytest
import pytest_asyncio
import stages
from crashes import Theatre, rows
from stages import Stage, at_carrier, at_relay, before_webhook, in_doubt

pytestmark = pytest.mark.asyncio(loop_scope="module")

STAGES: dict[str, Stage] = {
    "while DATA is being received": stages.amid_data,
    "after the final dot, before the commit": stages.after_final_dot,
    "while a large document is being stored": stages.amid_chunks,
    "after the commit, before the 250 arrives": stages.before_250_arrives,
    "right after the 250": stages.after_250,
    "when the headers of the POST have arrived": at_carrier("request"),
    "in the middle of a large POST": stages.amid_post,
    "when the POST was read, and then is accepted": at_carrier("body_read"),
    "when the POST was read, and then is not": at_carrier("body_read", "cut-before-acceptance", "delivered"),
    "after acceptance, before the 202": at_carrier("accepted"),
    "after the 202, before it is recorded": stages.before_202_is_recorded,
    "before the first webhook": before_webhook("fax.queued"),
    "before the second webhook": before_webhook("fax.media.processed"),
    "before the third webhook": before_webhook("fax.sending.started"),
    "before the final webhook": before_webhook("fax.delivered"),
    "before the final webhook's 200 arrives": stages.before_200_arrives,
    "while a call runs whose webhooks are lost": stages.webhooks_lost,
    "after the final webhook, before the reply": at_relay("rcpt"),
    "in the middle of the reply's DATA": at_relay("data"),
    "when the relay has the reply, before its 250": at_relay("dot"),
    "after the relay's 250, before it is recorded": stages.before_reply_is_recorded,
    "while the fax waits for a retry": stages.awaiting_retry,
    "while it is in doubt, and was taken": in_doubt("answer-lost", "answer-lost"),
    "while it is in doubt, and was not taken": in_doubt("cut-before-acceptance", "delivered"),
    "while the account is on hold": stages.on_hold,
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def theatre(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Theatre]:
    """Open the theatre that all stages share, so that each costs one start only."""
    async with crashes.theatre(tmp_path_factory.mktemp("crash"), retries={"busy": ["1s"]}) as opened:
        yield opened


@pytest.mark.parametrize("name", STAGES)
async def test_a_gateway_killed_at_any_stage_still_sends_one_fax_and_one_final_reply(
    theatre: Theatre, name: str
) -> None:
    """However abruptly the gateway ends, after a restart each fax is sent once and answered once."""
    async with theatre.scene(mails_to=3 if name == "right after the 250" else 1) as s:
        async with STAGES[name](s):
            await s.kill()
        await s.restart()
        await s.check()


async def test_a_gateway_killed_again_while_it_restarts_loses_and_doubles_nothing(theatre: Theatre) -> None:
    """A gateway that is killed in a call, and again while it starts, still sends one fax and one reply."""
    async with theatre.scene() as s:
        async with at_carrier("accepted")(s):
            await s.kill()
        await s.end_starting(SIGKILL, lambda: s.world.gateway.said("started"))
        await s.restart()
        await s.check()


async def test_a_gateway_that_hears_no_webhooks_finds_a_call_in_doubt_by_asking(tmp_path: Path) -> None:
    """Without a public key for webhooks, a call cut off by a kill is found in the carrier's list."""
    shut = {"public_key": "", "poll_after": "300ms"}
    async with crashes.theatre(tmp_path, telnyx=shut) as theatre, theatre.scene() as s:
        async with in_doubt("answer-and-webhooks-lost", "answer-and-webhooks-lost")(s):
            await s.kill()
        await s.restart()
        await s.check()


async def test_a_first_start_cut_short_leaves_a_database_that_the_next_start_can_use(tmp_path: Path) -> None:
    """A gateway killed while it creates its database starts the next time as if nothing had been."""
    async with crashes.theatre(tmp_path) as theatre, theatre.scene() as s:
        assert await s.world.gateway.stop() == 0
        log = s.store.with_name("gateway.db-wal")
        for moment in (s.store.exists, lambda: log.exists() and log.stat().st_size):
            for file in s.store.parent.glob("gateway.db*"):
                file.unlink()
            await s.end_starting(SIGKILL, moment)
        await s.restart()
        await s.check()
        # What can only be set before the first table: that purged documents give their space back.
        assert rows(s.store, "PRAGMA auto_vacuum") == [(2,)]

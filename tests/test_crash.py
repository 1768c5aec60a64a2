"""kill -9 at every stage of a fax's way, then a restart: for every 250 one fax and one final reply."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import crashes
import pytest
import pytest_asyncio
from crashes import Stage, Theatre, at_carrier, at_relay, before_webhook, in_doubt

pytestmark = pytest.mark.asyncio(loop_scope="module")

STAGES: dict[str, Stage] = {
    "while DATA is being received": crashes.amid_data,
    "after the final dot, before the commit": crashes.after_final_dot,
    "while a large document is being stored": crashes.amid_chunks,
    "after the commit, before the 250 arrives": crashes.before_250_arrives,
    "right after the 250": crashes.after_250,
    "when the headers of the POST have arrived": at_carrier("request"),
    "in the middle of a large POST": crashes.amid_post,
    "when the POST was read, and then is accepted": at_carrier("body_read"),
    "when the POST was read, and then is not": at_carrier("body_read", "cut-before-acceptance", "delivered"),
    "after acceptance, before the 202": at_carrier("accepted"),
    "after the 202, before it is recorded": crashes.before_202_is_recorded,
    "before the first webhook": before_webhook("fax.queued"),
    "before the second webhook": before_webhook("fax.media.processed"),
    "before the third webhook": before_webhook("fax.sending.started"),
    "before the final webhook": before_webhook("fax.delivered"),
    "before the final webhook's 200 arrives": crashes.before_200_arrives,
    "while a call runs whose webhooks are lost": crashes.webhooks_lost,
    "after the final webhook, before the reply": at_relay("rcpt"),
    "in the middle of the reply's DATA": at_relay("data"),
    "when the relay has the reply, before its 250": at_relay("dot"),
    "after the relay's 250, before it is recorded": crashes.before_reply_is_recorded,
    "while the fax waits for a retry": crashes.awaiting_retry,
    "while it is in doubt, and was taken": in_doubt("answer-lost", "answer-lost"),
    "while it is in doubt, and was not taken": in_doubt("cut-before-acceptance", "delivered"),
    "while the account is on hold": crashes.on_hold,
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

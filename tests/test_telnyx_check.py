"""The read-only look at the carrier's set-up behind `check --online`."""

import pytest
from raw_http import CONNECTION, answering, raw_server, reply, telnyx

from gateway.telnyx import Finding


def application(**members: object) -> bytes:
    """Return the answer with a fax application in order, but for these members."""
    content = {
        "id": CONNECTION,
        "application_name": "Gateway",
        "active": True,
        "webhook_event_url": "https://fax.example.com/webhooks/telnyx",
        "outbound": {"channel_limit": 2, "outbound_voice_profile_id": "1293384261075731499"},
    }
    return reply("200 OK", {"data": content | members})


async def checked(answer: bytes) -> list[Finding]:
    """Return the findings with this answer; hold that only one question was asked, for the application."""
    async with raw_server(answering(answer)) as server, telnyx(server.base) as carrier:
        findings = await carrier.check()
        assert (server.request.method, server.request.path) == ("GET", f"/v2/fax_applications/{CONNECTION}")
    return findings


async def test_set_up_in_order_is_shown() -> None:
    """`check --online` shows that key and application are known, and where the events go."""
    assert await checked(application()) == [
        Finding("ok", "telnyx.api_key works; fax application: Gateway"),
        Finding("ok", "events go to https://fax.example.com/webhooks/telnyx"),
    ]


@pytest.mark.parametrize(
    ("answer", "level", "word"),
    [
        (application(active=False), "error", "not active"),
        (application(outbound={"outbound_voice_profile_id": None}), "error", "no_outbound_profile"),
        (application(outbound=None), "error", "no_outbound_profile"),
        (application(webhook_event_url=""), "warning", "no webhook_event_url"),
        (application(application_name=None), "ok", "without a name"),
        (reply("401 Unauthorized"), "error", "telnyx.api_key is not accepted (HTTP 401)"),
        (reply("403 Forbidden"), "error", "telnyx.api_key is not accepted (HTTP 403)"),
        (reply("404 Not Found"), "error", "telnyx.connection_id is no fax application"),
        (reply("503 Down"), "error", "telnyx.api_base gives no answer: HTTP 503"),
        (reply("200 OK", b"<html>"), "error", "telnyx.api_base gives an unreadable answer"),
    ],
)
async def test_fault_of_the_set_up_is_named(answer: bytes, level: str, word: str) -> None:
    """Each fault that would stop faxes is told with the key to change."""
    assert any(found.level == level and word in found.text for found in await checked(answer))

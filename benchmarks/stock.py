"""The gateway with aiosmtpd's own way to read a mail, for comparison: `stock.py serve --config FILE`.

All else is the gateway's: sessions, limits, what the handler does with the mail and the commit before the
250.
"""

from typing import Any

from aiosmtpd.smtp import SMTP
from aiosmtpd.smtp import Session as Peer

from gateway import cli, daemon, smtp
from gateway.smtp import MailDoor
from gateway.smtp_session import MailEnvelope, SmtpSession


class StockSession(SmtpSession):
    """A session that takes the octets of a mail as aiosmtpd does: line by line."""

    # aiosmtpd types its methods loosely.
    smtp_DATA: Any = SMTP.smtp_DATA  # noqa: N815 -- aiosmtpd's name
    data_received: Any = SMTP.data_received


class StockDoor(MailDoor):
    """The gateway's handler, asked by aiosmtpd's method."""

    async def handle_DATA(  # noqa: N802 -- aiosmtpd's name
        self, server: SmtpSession, session: Peer, envelope: MailEnvelope
    ) -> str:
        """Take the mail that aiosmtpd has collected."""
        if (busy := self.busy()) is not None:
            return busy
        server.answering = True
        try:
            received = self.receive()
            received.file.write(envelope.original_content or b"")
            received.file.flush()
            return await self.take(session, envelope, received)
        finally:
            server.answering = False


vars(smtp)["SmtpSession"] = StockSession  # what the session factory makes
vars(daemon)["MailDoor"] = StockDoor  # what the daemon makes

if __name__ == "__main__":
    cli.main()

"""The mail server that takes what the gateway sends.

In charge of: one SMTP client that hands over one mail on one connection, and that knows which faults pass
and which stay, which are about the mail and which about the relay.

Promises: `send` returns only after the relay's 250 to the final dot. Where TLS is asked for, no mail and no
password goes out in clear and the certificate must fit; there is no way back to plain text. Addresses that
could end the envelope's line are refused before the client library sees them.

Fails: `RelayRefused` and `RelayAway`, nothing else; their texts are for the log. A relay that falls silent
after the final dot may have taken the mail (RFC 1047): that is a refusal for now, and the next try carries
the same Message-ID.
"""

import asyncio
import contextlib
import re
from email.message import EmailMessage
from email.utils import parseaddr
from enum import IntEnum
from typing import Literal

import aiosmtplib

from gateway.compose_text import clean

HAND_OVER_LIMIT = 240.0  # seconds for a mail; the outbox leases it for longer
QUIT_LIMIT = 2.0  # seconds for a relay to answer our goodbye


class RelayRefused(Exception):
    """The relay refused this mail, or lost it on the way; `permanent` means that no later try can help."""

    def __init__(self, text: str, *, permanent: bool) -> None:
        super().__init__(text)
        self.text = text
        self.permanent = permanent


class RelayAway(Exception):
    """The relay takes no mail at all at present: not there, not trusted, or not willing to serve us."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


class _Stage(IntEnum):
    """How far a session came; until its end, a fault is about the relay, not about the mail."""

    GREETING = 1
    SENDER = 2
    RECIPIENT = 3
    CONTENT = 4


class Relay:
    """The mail server that takes what the gateway sends."""

    def __init__(
        self,
        security: Literal["none", "tls", "starttls"],
        host: str,
        port: int,
        *,
        hostname: str,
        user: str | None = None,
        password: str | None = None,
        timeout: float = HAND_OVER_LIMIT,
    ) -> None:
        """Take the relay's place; `tls` from the start, `starttls` or nothing; there is no way in between.

        `hostname` is how we introduce ourselves; `timeout` are the seconds for a whole hand-over.
        """
        self._security = security
        self._host = host
        self._port = port
        self.name = f"{host}:{port}"  # for the log
        self._hostname = hostname
        self._user = user
        self._password = password
        self._timeout = timeout

    async def send(self, recipient: str, message: EmailMessage | bytes) -> None:
        """Hand one mail over, from the null sender (RFC 3834, 3.3). Raises RelayRefused or RelayAway.

        When it returns the relay has answered 250 to the final dot.
        """
        check_recipient(recipient)
        data = message if isinstance(message, bytes) else message.as_bytes()
        client = aiosmtplib.SMTP(
            hostname=self._host, port=self._port, local_hostname=self._hostname, timeout=None,
            username=self._user, password=self._password,
            use_tls=self._security == "tls", start_tls=self._security == "starttls",
        )  # fmt: skip
        stage = _Stage.GREETING
        try:
            async with asyncio.timeout(self._timeout):
                await client.connect()  # with STARTTLS and AUTH
                if client.is_ehlo_or_helo_needed:
                    await client.ehlo()
                options = _options(client, recipient, data)
                stage = _Stage.SENDER
                await client.mail("", options=options, encoding="utf-8")
                stage = _Stage.RECIPIENT
                await client.rcpt(recipient, encoding="utf-8")
                stage = _Stage.CONTENT
                await client.data(data)
            await _leave(client)
        except aiosmtplib.SMTPResponseException as error:
            await _leave(client)
            raise _judge(stage, error) from error
        except (aiosmtplib.SMTPException, OSError, UnicodeError) as error:  # a TimeoutError is an OSError
            text = clean(f"{type(error).__name__}: {str(error) or 'no answer in time'}")
            if stage is _Stage.GREETING:
                raise RelayAway(text) from error
            raise RelayRefused(text, permanent=False) from error
        finally:
            client.close()


def check_recipient(recipient: str) -> None:
    """Refuse an address before the client library sees it: from one with a comment it would make another."""
    sound = (
        recipient != ""
        and all(char.isprintable() and not char.isspace() for char in recipient)
        and parseaddr(recipient)[1] == recipient
    )
    if not sound:
        raise RelayRefused("the address cannot stand in an envelope", permanent=True)


def _options(client: aiosmtplib.SMTP, recipient: str, data: bytes) -> list[str]:
    """Return the parameters of MAIL that this mail needs and the relay knows."""
    options = []
    if client.supports_extension("size"):
        options.append(f"SIZE={len(data)}")  # RFC 1870
    if not data.isascii() and client.supports_extension("8bitmime"):
        options.append("BODY=8BITMIME")  # RFC 6152
    if not recipient.isascii():
        if not client.supports_extension("smtputf8"):
            raise RelayRefused("the relay does not know SMTPUTF8, which the address needs", permanent=True)
        options.append("SMTPUTF8")  # RFC 6531
    return options


async def _leave(client: aiosmtplib.SMTP) -> None:
    """Say goodbye (RFC 5321, 4.1.1.10); what comes of it changes nothing."""
    with contextlib.suppress(aiosmtplib.SMTPException, OSError):
        async with asyncio.timeout(QUIT_LIMIT):
            await client.quit()


_CLOSING = 421  # RFC 5321, 3.8
_LOG_IN_FIRST = 530  # RFC 4954, 6
_TOO_LARGE = 552  # at MAIL as well: this relay will never take it (RFC 1870, 6.1)
_PERMANENT = 5  # first digit (RFC 5321, 4.2.1)


def _judge(stage: _Stage, error: aiosmtplib.SMTPResponseException) -> RelayRefused | RelayAway:
    """Say what a reply means: a refusal before RCPT is about us, one after it about the mail."""
    text = clean(f"{error.code} {error.message}")
    if error.code == _TOO_LARGE:
        return RelayRefused(text, permanent=True)
    if error.code == _CLOSING or stage < _Stage.RECIPIENT:
        return RelayAway(text)
    # "We do not relay for you" and "log in first" are about our set-up, which somebody may correct.
    about_us = stage is _Stage.RECIPIENT and (
        error.code == _LOG_IN_FIRST or re.match(r"5\.7\.", error.message)
    )
    return RelayRefused(text, permanent=error.code // 100 == _PERMANENT and not about_us)

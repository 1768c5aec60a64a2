"""Mail that is put off since nothing can be written, and sent again: what client and store have to say."""

import contextlib
import email.policy
from email.message import EmailMessage
from pathlib import Path
from typing import Any

from crashes import Client, rows
from harness import SENDER, World


async def to_data(w: World, number: str, clients: contextlib.AsyncExitStack) -> Client:
    """Return a client that was told to send its mail."""
    client = clients.enter_context(contextlib.closing(await Client.connect(w.gateway.smtp_port)))
    await client.begin(number)
    return client


async def send(client: Client, message: EmailMessage) -> str:
    """Send the mail with its final dot; return the answer."""
    await client.send(message.as_bytes(policy=email.policy.SMTP) + b".\r\n")
    return await client.answer()


def contents(folder: Path) -> list[tuple[Any, ...]]:
    """Return what the store holds of mails: how many rows, and which states."""
    tables = ("mails", "documents", "document_chunks", "duplicates", "faxes", "outbox")
    counts = " UNION ALL ".join(f"SELECT '{table}', count(*) FROM {table}" for table in tables)  # noqa: S608 -- ours
    return rows(folder / "gateway.db", counts)


async def mail_again(client: Client, w: World, number: str, message: EmailMessage) -> None:
    """Mail it on the same connection, and wait until it is delivered."""
    for command in (f"MAIL FROM:<{SENDER}>", f"RCPT TO:<{number}@fax.local>", "DATA"):
        await client.send(command.encode() + b"\r\n")
        answer = await client.answer()
        assert answer[:1] in {"2", "3"}, answer
    await taken_in(w, await send(client, message))


async def taken_in(w: World, answer: str) -> None:
    """See that a mail was taken, and wait until it is delivered."""
    assert answer.startswith("250 2.0.0 queued as "), answer
    mail_id = answer.rpartition(" ")[2]
    w.accepted[mail_id] = 1
    assert (await w.reply(f"{mail_id}-1"))["X-Fax-Outcome"] == "delivered"

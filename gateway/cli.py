"""The command line: `fax-gateway`, also `python -m gateway`.

In charge of: words and exit codes; what a command does is done by the part that it calls.

Promises: operators' commands go through the same door as everything else, beside a running daemon. Exit codes
follow sysexits(3): 64 usage, 65 no such fax or not possible for it, 69 no answer, 75 try later, 78
configuration. Heavy parts are loaded only by the commands that need them.

Fails: with one line on standard error that says what to do.
"""

import asyncio
import atexit
import errno
import gc
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from gateway import __version__

if TYPE_CHECKING:
    from gateway.config import Fault, Settings
    from gateway.reasons import Reason
    from gateway.telnyx import Finding

EX_USAGE, EX_DATAERR, EX_UNAVAILABLE, EX_IOERR, EX_TEMPFAIL, EX_CONFIG = 64, 65, 69, 74, 75, 78
DEFAULT_CONFIG = Path("/etc/email-fax-gateway/config.toml")

app = typer.Typer(
    name="fax-gateway",
    help="Mail a PDF to a telephone number, get a fax and an answer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Config = Annotated[
    Path | None,
    typer.Option("--config", "-c", help=f"The settings; else $FAX_GATEWAY_CONFIG, else {DEFAULT_CONFIG}."),
]


def _tell_version(wanted: bool) -> None:  # noqa: FBT001 -- typer's form of a callback
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", is_eager=True, callback=_tell_version),
    ] = False,
) -> None:
    del version  # told, and ended, before any command is looked for


# --- the daemon and its settings -------------------------------------------------------------------


@app.command()
def serve(
    config: Config = None,
    held: Annotated[
        bool,
        typer.Option("--held", help="Call nothing until `release --all`: the database is a restored backup."),
    ] = False,
) -> None:
    """Run the daemon: mail in, calls, webhooks in, replies out.

    Example: fax-gateway serve --config /etc/email-fax-gateway/config.toml
    """
    import uvloop

    from gateway import daemon, log
    from gateway.children import ChildFailed
    from gateway.database import StoreError, WrongDatabase

    settings, warnings = load_settings(config)
    log.configure(
        format=settings.log.format,
        level=settings.log.level,
        mask_numbers=settings.log.mask_numbers,
        stream=sys.stdout,
    )
    for warning in warnings:
        log.get_logger().warning("configuration_warning", key=warning.key, text=warning.text)
    try:
        uvloop.run(daemon.serve(settings, os.environ, held=held))
    except WrongDatabase as error:
        end(EX_CONFIG, f"store.url: {error}")
    except daemon.StoreEnded as error:
        end(EX_IOERR, f"the store can keep nothing more, and was closed: {error}")
    except StoreError as error:
        end(EX_UNAVAILABLE, f"cannot start: the database cannot be used now: {error}")
    except (OSError, ChildFailed) as error:
        taken = isinstance(error, OSError) and error.errno in {errno.EADDRINUSE, errno.EACCES}
        where = "smtp.listen or http.listen: " if taken else ""
        end(EX_UNAVAILABLE, f"cannot start: {where}{error}")


@app.command()
def check(
    config: Config = None,
    online: Annotated[
        bool, typer.Option("--online", help="Also ask carrier and database, read-only.")
    ] = False,
) -> None:
    """Validate the configuration and print every fault at once.

    Example: fax-gateway check --online
    """
    settings, warnings = load_settings(config)
    for warning in warnings:
        typer.echo(f"warning: {warning}")
    typer.echo("configuration: good")
    if online:
        raise typer.Exit(asyncio.run(_check_online(settings)))


async def _check_online(settings: "Settings") -> int:
    from gateway.daemon import carrier_of

    async with carrier_of(settings) as carrier:
        findings = await carrier.check()
    findings.append(await _check_store(settings))
    for finding in findings:
        typer.echo(f"{finding.level}: {finding.text}")
    return EX_CONFIG if any(finding.level == "error" for finding in findings) else 0


async def _check_store(settings: "Settings") -> "Finding":
    """Open the database as the operators' commands do: nothing in it, and no file, is made or changed."""
    from gateway.database import NotYet, StoreError
    from gateway.telnyx import Finding
    from gateway.wiring import open_store

    try:
        store = open_store(settings, serve=False)
        try:
            await store.count()
        finally:
            await store.close()
    except NotYet as error:  # so it is before the first start, and after an upgrade
        return Finding("warning", f"store.url: {error}")
    except (OSError, StoreError) as error:
        return Finding("error", f"store.url: {error}")
    return Finding("ok", "store.url: the database can be used")


@app.command()
def health(config: Config = None) -> None:
    """Ask the running daemon whether it is ready; exit code 0 or 1. For container health checks.

    Example: fax-gateway health
    """
    from urllib.error import URLError
    from urllib.request import urlopen

    settings, _ = load_settings(config, secrets=False)
    host, port = settings.http.listen.host, settings.http.listen.port
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 -- asked, not bound
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/readyz"
    try:
        with urlopen(url, timeout=5) as answer:
            typer.echo(answer.read().decode())
    except (URLError, OSError) as error:
        end(1, f"not ready: {error}")


# --- trying it out ---------------------------------------------------------------------------------


@app.command()
def demo(
    once: Annotated[bool, typer.Option("--once", help="End when the reply is there.")] = False,
) -> None:
    """Show the whole way on this machine, with no account: gateway, stand-in carrier and a mailbox.

    Example: fax-gateway demo --once
    """
    from gateway import demo as demonstration

    try:
        code = asyncio.run(demonstration.run(once=once, show=typer.echo))
    except (KeyboardInterrupt, asyncio.CancelledError):
        code = 0
    raise typer.Exit(code)


@app.command()
def sandbox(
    listen: Annotated[str, typer.Option(help="Address and port of the API.")] = "127.0.0.1:8089",
    webhooks: Annotated[str | None, typer.Option(help="Where the signed webhooks go, a URL.")] = None,
    call_time: Annotated[float, typer.Option(help="Seconds that a call takes.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Draw outcomes for other numbers, repeatably.")] = None,
    script: Annotated[
        Path | None, typer.Option(help="TOML: behaviours by number.", exists=True, dir_okay=False)
    ] = None,
) -> None:
    """Run the stand-in carrier: Telnyx's HTTP API, with numbers that fail on purpose (docs/sandbox.md).

    Example: fax-gateway sandbox --webhooks http://127.0.0.1:8080/webhooks/telnyx
    """
    from gateway import sandbox as stand_in
    from gateway.sandbox_script import ScriptError, read_script

    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit():  # without an address it would listen on all of them
        end(EX_USAGE, "--listen takes an address and a port, as in 127.0.0.1:8089")
    if webhooks is not None and not webhooks.startswith(("http://", "https://")):
        end(EX_USAGE, "--webhooks takes a URL, as in http://127.0.0.1:8080/webhooks/telnyx")
    try:
        options = stand_in.SandboxOptions(
            host=host.strip("[]"),
            port=int(port),
            webhook_url=webhooks,
            call_time=call_time,
            seed=seed,
            script=read_script(script) if script else {},
        )
        asyncio.run(stand_in.serve(options, typer.echo))
    except KeyboardInterrupt:
        return
    except (OSError, ScriptError) as error:
        end(EX_UNAVAILABLE, str(error))


@app.command()
def send(
    file: Annotated[Path, typer.Argument(help="The PDF.", exists=True, dir_okay=False, readable=True)],
    to: Annotated[str, typer.Option(help="The number, as in +13127367276.")],
    sender: Annotated[str, typer.Option("--from", help="Your mail address: the reply goes there.")],
    config: Config = None,
) -> None:
    """Send one fax from the shell, through the SMTP door and its rules.

    Example: fax-gateway send letter.pdf --to +13127367276 --from me@example.com
    """
    import smtplib
    from email import policy
    from email.message import EmailMessage
    from email.utils import formatdate, make_msgid

    settings, _ = load_settings(config, secrets=False)
    message = EmailMessage(policy.SMTP)  # lines end with CRLF; without, a document would be one long line
    domain = settings.smtp.domains[0]
    if not to.isprintable() or '"' in to:
        end(EX_USAGE, "--to takes a telephone number, as in +13127367276")
    recipient = f'"{to}"@{domain}' if " " in to else f"{to}@{domain}"
    message["From"], message["To"] = sender, f"fax@{domain}"
    message["Subject"], message["Date"] = file.name, formatdate()
    message["Message-ID"] = make_msgid(domain=domain)
    message.set_content("Sent by fax-gateway send.")
    message.add_attachment(file.read_bytes(), maintype="application", subtype="pdf", filename=file.name)
    endpoint = settings.smtp.listen[0]
    try:
        with smtplib.SMTP(endpoint.host, endpoint.port, timeout=60) as door:
            door.ehlo()
            code, text = door.mail(sender)
            if code < 400:  # noqa: PLR2004 -- RFC 5321, 4.2.1
                # As written: smtplib would drop parentheses as a comment, and so dial another number.
                code, text = door.docmd("RCPT", f"TO:<{recipient}>")
            if code < 400:  # noqa: PLR2004 -- as above
                code, text = door.data(message.as_bytes())
    except (OSError, smtplib.SMTPException) as error:
        end(EX_TEMPFAIL, f"the gateway does not answer on {endpoint.host}:{endpoint.port}: {error}")
    answer = text.decode(errors="replace")
    if code >= 400:  # noqa: PLR2004 -- as above
        end(EX_DATAERR if code >= 500 else EX_TEMPFAIL, f"{code} {answer}")  # noqa: PLR2004 -- as above
    typer.echo(answer)


@app.command()
def explain(
    reason: Annotated[str, typer.Argument(help="A failure_reason, as in user_busy.")],
    config: Config = None,
) -> None:
    """Print what a failure reason means, whether it is called again, and what the sender is told.

    Example: fax-gateway explain receiver_no_answer
    """
    from gateway import reasons
    from gateway.config import Retries

    known = {row.name for row in (*reasons.TABLE, *reasons.LOCAL)}
    configured = config or os.environ.get("FAX_GATEWAY_CONFIG") or DEFAULT_CONFIG.exists()
    retries = load_settings(config, secrets=False)[0].retries if configured else Retries()
    row = reasons.lookup(reason)
    if row.name not in known:
        near = ", ".join(reasons.nearest(reason))
        typer.echo(f"{reason!r} is not in the table{f'; did you mean {near}?' if near else ''}", err=True)
        typer.echo("A reason that is not known is treated like this:", err=True)
    plan = getattr(retries, row.kind.value, None)
    typer.echo(f"reason:    {row.name}")
    typer.echo(f"class:     {row.kind}")
    typer.echo(f"retries:   {_plan(row, plan, retries.max_calls)}")
    typer.echo(f"told:      {row.sentence}")
    typer.echo(f"advice:    {row.advice}")
    typer.echo(f"status:    {row.status}")
    if row.pages_may_have_arrived:
        typer.echo("note:      pages may have arrived")
    if row.alert:
        typer.echo("note:      the postmaster is told")
    if row.name not in known:
        raise typer.Exit(EX_DATAERR)


def _plan(row: "Reason", waits: tuple[float, ...] | None, max_calls: int) -> str:
    if waits is None:
        return {
            "capacity": "when the queue goes on; not counted as a call",
            "account": "when the account's hold ends (a probe every 5 min to 1 h)",
            "sender": "when the number's hold ends (a probe every 5 min to 1 h)",
            "spend": "after 00:00 UTC",
            "contradiction": "none by itself: the carrier is asked again, then an operator",
        }.get(row.kind.value, "none")
    used = waits[: max_calls - 1 if row.cap is None else min(row.cap, max_calls - 1)]
    if not used:
        return "none"
    waits_told = ", ".join(f"{wait / 60:g} min" if wait % 60 == 0 else f"{wait:g} s" for wait in used)
    return f"after {waits_told}" + (
        f" ({row.adjust.value.replace('_', ' ')})" if row.adjust.value != "none" else ""
    )


# --- what the commands share -----------------------------------------------------------------------


def load_settings(path: Path | None, *, secrets: bool = True) -> "tuple[Settings, list[Fault]]":
    """Return the settings and what is odd about them; end with 78 and every fault.

    Without `secrets`, for a command that needs none, they may be missing.
    """
    from gateway.config import ConfigurationError, load

    named = path or os.environ.get("FAX_GATEWAY_CONFIG")
    try:
        return load(Path(named or DEFAULT_CONFIG), os.environ, named=bool(named), secrets=secrets)
    except ConfigurationError as error:
        for fault in error.faults:
            typer.echo(f"{fault}", err=True)
        raise typer.Exit(EX_CONFIG) from None


def end(code: int, text: str) -> NoReturn:
    """Say one line and end with `code`."""
    typer.echo(f"fax-gateway: {text}", err=True)
    raise typer.Exit(code)


def main() -> None:
    """Run the command line; a usage error ends with 64 instead of typer's 2."""
    from gateway import cli_queue

    cli_queue.register(app)
    atexit.register(gc.freeze)  # or the interpreter looks once more through all that it loaded: 0.1 s
    try:
        app()
    except SystemExit as end:
        sys.exit(EX_USAGE if end.code == 2 else end.code)  # noqa: PLR2004

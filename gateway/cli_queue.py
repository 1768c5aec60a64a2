"""The operators' commands over the queue: list, show, hold, release, cancel, retry.

In charge of: asking the store, and telling the answer to a person or, with `--json`, to a program.

Promises: a change goes through the same door as every event; the daemon notices it within about a second.

Fails: 65 with one line when there is no such fax or it cannot be done to it; 75 when the database cannot be
used now, or a restored one may not be released yet; 78 when there is no database.
"""

import asyncio
import dataclasses
import json
from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from gateway.cli import EX_CONFIG, EX_DATAERR, EX_TEMPFAIL, EX_USAGE, Config, end, load_settings

if TYPE_CHECKING:
    from gateway.records import Event
    from gateway.store import Store
    from gateway.store_desk import Counts, Dossier, Listed, StandingBrake

T = TypeVar("T")

Json = Annotated[bool, typer.Option("--json", help="For a program: JSON on standard output.")]
Name = Annotated[
    str, typer.Argument(metavar="ID", help="A fax (ends in -1, -2, …), or a mail: all its faxes.")
]
NameOrAll = Annotated[str | None, typer.Argument(metavar="[ID]", help="A fax, or a mail: all its faxes.")]
All = Annotated[bool, typer.Option("--all", help="The whole queue.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    for name, command in (
        ("list", list_faxes),
        ("show", show),
        ("hold", hold),
        ("release", release),
        ("cancel", cancel),
        ("retry", retry),
    ):
        app.command(name)(command)


def list_faxes(
    config: Config = None,
    state: Annotated[list[str] | None, typer.Option("--state", help="Only these; may be repeated.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Also faxes that have ended.")] = False,
    most: Annotated[int, typer.Option("--most", help="Rows at the most, newest first.", min=1)] = 100,
    as_json: Json = False,
) -> None:
    """List the faxes that have not ended, and what keeps the queue from going on.

    Example: fax-gateway list --state held --json
    """
    from gateway.records import State

    states = tuple(state or ()) or (tuple(State) if everything else ())
    if wrong := [name for name in states if name not in set(State)]:
        end(EX_USAGE, f"--state {wrong[0]}: the states are {', '.join(State)}")

    async def ask(store: "Store") -> "tuple[list[Listed], Counts]":
        return await store.list_faxes(states, most + 1), await store.count()

    faxes, counts = _run(config, ask)
    if len(faxes) > most:
        faxes.pop()
        typer.echo(f"fax-gateway: these are the newest {most}; --most {10 * most} shows more", err=True)
    if as_json:
        brakes = [dataclasses.asdict(brake) for brake in counts.brakes]
        _print_json({"faxes": [dataclasses.asdict(fax) for fax in faxes], "holds": brakes})
        return
    for brake in counts.brakes:
        typer.echo(f"! {brake.kind} since {_time(brake.since)}: {brake.cause} ({_end_of(brake)})")
    rows: list[tuple[str, ...]] = [("ID", "STATE", "NUMBER", "PAGES", "CALLS", "ACCEPTED", "NEXT", "SENDER")]
    rows += [
        (
            fax.id,
            f"{fax.state}:{fax.held_for}" if fax.held_for else fax.state,
            fax.number,
            str(fax.pages),
            str(fax.calls),
            _time(fax.accepted_at),
            fax.reason or (_time(fax.due_at) if fax.state in {"queued", "sending", "in_doubt"} else ""),
            fax.sender,
        )
        for fax in faxes
    ]
    _print_table(rows)


def _end_of(brake: "StandingBrake") -> str:
    if brake.kind == "restore":
        return "until the carrier has answered"
    return f"next probe {_time(brake.probe_at)}" if brake.probe_at else "until released"


def show(fax_id: Name, config: Config = None, as_json: Json = False) -> None:
    """Print a fax and its whole history.

    Example: fax-gateway show 1m7yp667vw0v3-1
    """

    async def ask(store: "Store") -> "list[Dossier]":
        return [await store.show(name) for name in await _names(store, fax_id)]

    files = _run(config, ask)
    if as_json:
        _print_json([_file_values(file) for file in files])
        return
    for file in files:
        for line in _file_lines(file):
            typer.echo(line)


def _file_values(file: "Dossier") -> dict[str, Any]:
    values = dataclasses.asdict(file)
    values["mail"].pop("original_headers")
    return values


def _file_lines(file: "Dossier") -> Iterable[str]:
    fax, mail = file.fax, file.mail
    yield f"fax       {fax.id}" + (f" (renews {fax.renews})" if fax.renews else "")
    yield f"state     {fax.state}" + (f" ({fax.held_for}: {fax.held_detail})" if fax.held_for else "")
    yield f"number    {fax.number}"
    yield f"sender    {mail.sender}"
    yield f"pages     {fax.pages}"
    yield f"accepted  {_time(fax.accepted_at)}, given up {_time(fax.give_up_at)} at the latest"
    if fax.reason:
        yield f"reason    {fax.reason}"
    for attempt in fax.attempts:
        fate = attempt.end or ("open" if attempt.carrier_id else "in doubt")
        detail = " ".join(filter(None, (attempt.reason, attempt.internal_reason)))
        begun = _time(attempt.started_at)
        yield f"call {attempt.ordinal}    {begun} {attempt.carrier_id or '-'} {fate} {detail}".rstrip()
    for notice, fate in file.replies:
        yield f"reply     {notice}: {fate}"
    for moment in file.moments:
        detail = " ".join(f"{name}={_short(value)}" for name, value in moment.detail.items())
        yield f"  {_time(moment.at)} {moment.event:<12} -> {moment.state:<10} {detail}".rstrip()


def hold(fax_id: NameOrAll = None, everything: All = False, config: Config = None) -> None:
    """Stop a queued fax, or with --all the whole queue, until it is released.

    Example: fax-gateway hold --all
    """
    from gateway.records import HoldAsked

    _one_or_all(fax_id, everything=everything)
    if everything:
        _run(config, lambda store: store.hold_all())
        typer.echo("held: nothing is called until `fax-gateway release --all`; mail is still taken")
        return
    _apply(config, fax_id or "", HoldAsked())


def release(fax_id: NameOrAll = None, everything: All = False, config: Config = None) -> None:
    """Let a held fax go on, or with --all end the queue's hold and probe the account at once.

    Example: fax-gateway release 1m7yp667vw0v3-1
    """
    from gateway.records import ReleaseAsked

    _one_or_all(fax_id, everything=everything)
    if everything:
        _run(config, lambda store: store.release_all())
        typer.echo("released: the next fax goes out as soon as a channel is free")
        return
    _apply(config, fax_id or "", ReleaseAsked())


def cancel(fax_id: Name, config: Config = None) -> None:
    """Cancel a fax: a queued one ends at once; for an open call the carrier is asked, the outcome decides.

    Example: fax-gateway cancel 1m7yp667vw0v3-1
    """
    from gateway.records import CancelAsked

    _apply(config, fax_id, CancelAsked())


def retry(
    fax_id: Name,
    even_if_twice: Annotated[
        bool, typer.Option("--even-if-twice", help="Although it was, or may have been, delivered.")
    ] = False,
    config: Config = None,
) -> None:
    """Call a waiting fax now; send an ended one again as a new fax.

    Example: fax-gateway retry 1m7yp667vw0v3-1
    """
    from gateway.records import RetryAsked

    async def again(store: "Store", name: str) -> str:
        if (await store.show(name)).fax.final:
            fax = await store.renew(name, even_if_twice=even_if_twice)
            return f"{fax.id}: queued, renews {name}"
        fax = await store.apply(name, RetryAsked(even_if_twice))
        return f"{fax.id}: {fax.state}"

    _each(config, fax_id, again)


# --- what they share -------------------------------------------------------------------------------


def _one_or_all(fax_id: str | None, *, everything: bool) -> None:
    if (fax_id is None) == (not everything):
        end(EX_USAGE, "name one fax or mail, or say --all")


async def _names(store: "Store", name: str) -> list[str]:
    from gateway.store_apply import UnknownFax

    names = await store.fax_ids_of(name)
    if not names:
        raise UnknownFax(f"there is no fax or mail {name}")
    return names


def _apply(config: Any, name: str, event: "Event") -> None:
    async def wish(store: "Store", fax_id: str) -> str:
        fax = await store.apply(fax_id, event)
        open_call = fax.cancel_asked and not fax.final
        return f"{fax.id}: {fax.state}" + (" (cancel asked, the outcome decides)" if open_call else "")

    _each(config, name, wish)


def _each(config: Any, name: str, wish: "Callable[[Store, str], Awaitable[str]]") -> None:
    """Do it to the fax, or to each fax of the mail: one that cannot does not spare the others."""
    from gateway.fax_steps import Misfit
    from gateway.store_intake import NotRenewable

    async def ask(store: "Store") -> tuple[int, int]:
        names, done = await _names(store, name), 0
        for fax_id in names:
            try:
                typer.echo(await wish(store, fax_id))
                done += 1
            except (Misfit, NotRenewable) as error:
                typer.echo(f"fax-gateway: {error}", err=True)
        return done, len(names)

    done, faxes = _run(config, ask)
    if done < faxes:
        if faxes > 1:
            typer.echo(f"fax-gateway: done to {done} of {faxes} faxes", err=True)
        raise typer.Exit(EX_DATAERR)


def _run(config: Any, ask: "Callable[[Store], Awaitable[T]]") -> T:
    from gateway.database import StoreError, WrongDatabase
    from gateway.store_apply import UnknownFax
    from gateway.store_brakes import StillRestoring
    from gateway.wiring import open_store

    settings, _ = load_settings(config, secrets=False)

    async def work() -> T:
        store = open_store(settings, serve=False)
        try:
            return await ask(store)
        finally:
            await store.close()

    try:
        return asyncio.run(work())
    except WrongDatabase as error:
        end(EX_CONFIG, f"store.url: {error}")
    except UnknownFax as error:
        end(EX_DATAERR, str(error))
    except StillRestoring as error:
        end(EX_TEMPFAIL, str(error))
    except StoreError as error:
        end(EX_TEMPFAIL, f"the database cannot be used now: {error}")


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2, default=str))


def _print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def _short(value: object) -> str:
    if isinstance(value, dict):
        return ",".join(f"{name}:{inner}" for name, inner in value.items() if inner not in (None, False))
    return str(value)

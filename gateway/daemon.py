"""The daemon's life: open, wire, listen, ready, drain, close.

In charge of: making the parts, giving each what it needs, starting and stopping them in order.

Promises: "ready" is said when the store is open, the children live and the doors listen; the carrier need not
answer for that. On the first SIGTERM or SIGINT no new mail is begun, what was begun is finished, and the
POSTs that are open are awaited; a second signal stops at once, and the next start puts things right.

Fails: `WrongDatabase`, `StoreError`, `ChildFailed` or `OSError` at the start, each with what is in the way;
later only by `StoreEnded`, when the disk no longer confirms what is written.
"""

import asyncio
import contextlib
import errno
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass
from email.utils import parseaddr
from functools import partial
from pathlib import Path
from typing import Any

from aiohttp import web

from gateway import __version__, notify
from gateway.address import Policy
from gateway.bell import Bell
from gateway.children import Pool
from gateway.compose import Letterhead
from gateway.config import Settings
from gateway.dispatch import Dispatcher
from gateway.log import get_logger
from gateway.metrics import Metrics
from gateway.prepare import COMMAND, Preparer
from gateway.records import Alert, Brake, Fax, State
from gateway.relay import Relay
from gateway.smtp import MailDoor, session_factory
from gateway.smtp_session import Sessions
from gateway.store import Store
from gateway.store_unit import Change, News
from gateway.store_work import CallSettings
from gateway.systemd import Supervisor
from gateway.telnyx import POST_LIMIT, Telnyx
from gateway.web import Doorway, connection_factory
from gateway.wiring import hostname_of, open_store, rules_of, workplace

CALL_LEASE = POST_LIMIT + 30.0
"""Seconds for which a claim to call holds: the longest POST, the questions before it, and a margin."""
DRAIN_LIMIT = POST_LIMIT + 10.0
"""Seconds that a stop waits for open POSTs; systemd waits longer."""
_DATA_LIMIT = 20.0  # seconds that a stop waits for the final dots of mails that are coming in
_ACCEPT_LIMIT = 35.0  # seconds that a stop waits for mails after their final dot
_NOTICES_LIMIT = 15.0  # seconds that a stop waits for replies on their way to the relay
_SPARE_LOOK_UPS = 16  # names looked up at a time, beside one for each call: for questions and replies
_MOST_THREADS = 200  # systemd lets the unit have 512 with all else; libuv ends the process if it gets no more
_TURN_LIMIT = 300.0  # seconds without coming round after which a loop counts as dead


log = get_logger()


class StoreEnded(Exception):
    """Nothing can be kept any more; a new start may mend it. The text says why."""


@dataclass(frozen=True, slots=True)
class Doors:
    """Where the daemon listens."""

    smtp: tuple[str, ...]
    http: str


async def serve(settings: Settings, environ: Mapping[str, str], *, held: bool = False) -> None:
    """Run the gateway until it is told to stop; `held`: call nothing, the database is a restored backup."""
    supervisor = Supervisor(environ)
    broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    stop, listening = _stop_on_signal(), asyncio.Event()
    # A name server that does not answer keeps a thread for each look-up, and libuv lets look-ups have half of
    # its threads. Their number is read, and all are started, with the first of them.
    threads = 2 * (settings.telnyx.channels + _SPARE_LOOK_UPS)
    os.environ["UV_THREADPOOL_SIZE"] = str(min(threads, _MOST_THREADS))
    async with contextlib.AsyncExitStack() as stack:
        bell, metrics = Bell(), Metrics()
        store = await stack.enter_async_context(_opened_store(settings, bell, metrics, broken))
        log.info("started", version=__version__, store=str(store.place))
        folder = stack.enter_context(workplace(settings, environ))
        carrier = await stack.enter_async_context(carrier_of(settings))
        preparer = await stack.enter_async_context(_preparer(settings, folder))
        if held:
            await store.begin_restore()
        doubts = await store.take_over(settings.telnyx.from_number)
        if doubts:
            log.warning(
                "call_in_doubt", faxes=doubts, cause="the gateway stopped in the middle of these calls"
            )
        http = await stack.enter_async_context(
            _http(settings, store, carrier, metrics, ready=lambda: listening.is_set() and not stop.is_set())
        )
        door, sessions = _mail_door(settings, store, preparer, metrics, folder)
        smtp = await stack.enter_async_context(_smtp(settings, door, sessions))
        # After the doors: a start that fails for a port in use must not leave calls in doubt.
        dispatcher = _dispatcher(settings, store, carrier, metrics)
        notices = _notices(settings, store, preparer, metrics, bell)
        tasks = await stack.enter_async_context(_tasks(bell, dispatcher, notices))
        listening.set()
        doors = Doors(smtp, http)
        log.info("ready", smtp=list(doors.smtp), http=doors.http)
        supervisor.tell("READY=1", f"STATUS=mail on {', '.join(doors.smtp)}, HTTP on {doors.http}")
        tasks.append(asyncio.create_task(_beat(supervisor, bell)))
        await _first(stop, broken)
        begun = time.monotonic()
        supervisor.tell("STOPPING=1", "STATUS=finishing what was begun")
        log.info("stopping")
        await _drain(door, sessions, dispatcher)
    log.info("stopped", seconds=round(time.monotonic() - begun, 1))


# --- opening: each part is closed when the stack unwinds, in reverse -------------------------------


def _stop_on_signal() -> asyncio.Event:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def told() -> None:
        if stop.is_set():
            os._exit(1)  # told twice: at once; the store takes no harm from it
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told)
    return stop


@contextlib.asynccontextmanager
async def _opened_store(
    settings: Settings, bell: Bell, metrics: Metrics, broken: asyncio.Future[None]
) -> AsyncIterator[Store]:
    loop = asyncio.get_running_loop()

    def end(error: Exception) -> None:
        if not broken.done():
            broken.set_exception(StoreEnded(str(error)))

    store = await asyncio.to_thread(
        open_store,
        settings,
        serve=True,
        news=lambda: _from_thread(loop, bell.ring),
        broken=lambda error: _from_thread(loop, partial(end, error)),
        observe=partial(_observe, metrics),
    )
    try:
        yield store
    finally:
        await store.close()


def _from_thread(loop: asyncio.AbstractEventLoop, ring: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed already
        loop.call_soon_threadsafe(ring)


def carrier_of(settings: Settings) -> Telnyx:
    """Return the carrier; it is opened as a context."""
    telnyx = settings.telnyx
    return Telnyx(
        api_base=telnyx.api_base,
        api_key=telnyx.api_key.get_secret_value(),
        connection_id=telnyx.connection_id,
        public_key=telnyx.public_key,
        monochrome=telnyx.monochrome,
        version=__version__,
    )


@contextlib.asynccontextmanager
async def _preparer(settings: Settings, folder: Path) -> AsyncIterator[Preparer]:
    size = max(2, os.cpu_count() or 2)
    pool = Pool(COMMAND, size=size)
    documents = settings.documents
    preparer = Preparer(pool, folder, max_pages=documents.max_pages, max_size=documents.max_size)
    preparer.sweep()
    await pool.start()
    try:
        yield preparer
    finally:
        await pool.close()


def _dispatcher(settings: Settings, store: Store, carrier: Telnyx, metrics: Metrics) -> Dispatcher:
    telnyx = settings.telnyx
    return Dispatcher(
        store,
        carrier,
        settings=CallSettings(
            from_number=telnyx.from_number,
            connection_id=telnyx.connection_id,
            quality=telnyx.quality,
            t38=telnyx.t38_enabled,
            channels=telnyx.channels,
            lease=CALL_LEASE,
        ),
        rules=rules_of(settings),
        metrics=metrics,
        keep_documents=settings.store.keep_documents,
        keep_records=settings.store.keep_records,
        longest_post=POST_LIMIT,
    )


def _notices(
    settings: Settings, store: Store, preparer: Preparer, metrics: Metrics, bell: Bell
) -> Coroutine[Any, Any, None]:
    replies, hostname = settings.replies, hostname_of(settings)
    relay = Relay(
        replies.relay.security,
        replies.relay.host,
        replies.relay.port,
        hostname=hostname,
        user=replies.relay_user or None,
        password=replies.relay_password.get_secret_value() or None,
    )
    return notify.run(
        store,
        relay,
        Letterhead(replies.sender, replies.postmaster, hostname, replies.format),
        clock=time.time,
        wake=bell.listener(),
        picture=preparer.picture if replies.attach_first_page else None,
        give_up_after=replies.give_up_after,
        count=metrics.reply,
    )


@contextlib.asynccontextmanager
async def _tasks(
    bell: Bell, dispatcher: Dispatcher, notices: Coroutine[Any, Any, None]
) -> AsyncIterator[list[asyncio.Task[None]]]:
    tasks = [
        asyncio.create_task(dispatcher.run_calls(bell.listener()), name="calls"),
        # What these two look for comes with time: looking after each commit would cost more than the commit.
        asyncio.create_task(dispatcher.run_questions(bell.listener(woken=False)), name="questions"),
        asyncio.create_task(dispatcher.run_caretaker(bell.listener(woken=False)), name="caretaker"),
        asyncio.create_task(notices, name="notices"),
    ]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        _, late = await asyncio.wait(tasks, timeout=_NOTICES_LIMIT)  # mails on their way may arrive
        for task in late:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# --- the doors -------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _http(
    settings: Settings, store: Store, carrier: Telnyx, metrics: Metrics, *, ready: Callable[[], bool]
) -> AsyncIterator[str]:
    doorway = Doorway(
        store,
        carrier,
        connection_id=settings.telnyx.connection_id,
        webhooks=bool(settings.telnyx.public_key),
        clock=time.time,
        metrics=metrics,
        ready=ready,
    )
    application = doorway.application(settings.http.webhook_path)
    runner = web.AppRunner(application, handle_signals=False)
    await runner.setup()
    try:
        if runner.server is None:
            raise OSError("the HTTP server could not be made")
        listen = settings.http.listen
        async with _listening(connection_factory(runner.server), listen.host, listen.port) as addresses:
            yield addresses[0]
    finally:
        await runner.cleanup()


def _mail_door(
    settings: Settings, store: Store, preparer: Preparer, metrics: Metrics, folder: Path
) -> tuple[MailDoor, Sessions]:
    smtp, senders, destinations = settings.smtp, settings.senders, settings.destinations
    policy = Policy(
        domains=smtp.domains,
        default_region=destinations.default_region,
        countries=frozenset(destinations.countries),
        allow=destinations.allow,
        deny=destinations.deny,
        premium=destinations.premium,
        sender_networks=senders.networks,
        sender_addresses=senders.addresses,
        own_address=parseaddr(settings.replies.sender)[1],
    )
    door = MailDoor(
        store,
        preparer,
        policy=policy,
        hostname=hostname_of(settings),
        max_recipients=smtp.max_recipients,
        duplicate_window=settings.store.duplicate_window,
        folder=folder.parent,  # where the database grows, if it is SQLite
        metrics=metrics,
    )
    return door, Sessions(smtp.max_connections, smtp.max_connections_per_host)


@contextlib.asynccontextmanager
async def _smtp(settings: Settings, door: MailDoor, sessions: Sessions) -> AsyncIterator[tuple[str, ...]]:
    factory = session_factory(
        door,
        sessions,
        size_limit=settings.smtp.max_message_size,
        hostname=hostname_of(settings),
        timeout=settings.smtp.timeout,
    )
    async with contextlib.AsyncExitStack() as stack:
        addresses: list[str] = []
        for endpoint in settings.smtp.listen:
            addresses += await stack.enter_async_context(_listening(factory, endpoint.host, endpoint.port))
        yield tuple(addresses)


@contextlib.asynccontextmanager
async def _listening(
    factory: Callable[[], asyncio.Protocol], host: str, port: int
) -> AsyncIterator[list[str]]:
    """Listen, and give the addresses; what is connected already outlives this. Raises OSError."""
    server = await asyncio.get_running_loop().create_server(factory, host, port)
    try:
        # uvloop says nothing of a listen(2) that fails: it closes that socket, and has None in its place.
        if not all(server.sockets):
            raise OSError(errno.EADDRINUSE, f"{os.strerror(errno.EADDRINUSE)}: {host} port {port}")
        yield [_address(listening.getsockname()) for listening in server.sockets]
    finally:
        server.close()


def _address(name: tuple[object, ...]) -> str:
    host = f"[{name[0]}]" if ":" in str(name[0]) else name[0]
    return f"{host}:{name[1]}"


# --- living and stopping ---------------------------------------------------------------------------


async def _first(stop: asyncio.Event, broken: asyncio.Future[None]) -> None:
    """Return when told to stop. Raises StoreEnded."""
    told = asyncio.create_task(stop.wait())
    either: set[asyncio.Future[Any]] = {told, broken}
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    told.cancel()
    if broken.done():
        broken.result()


async def _beat(supervisor: Supervisor, bell: Bell) -> None:
    """Tell the watchdog that the event loop and every loop of ours come round."""
    while supervisor.beat is not None:
        late = bell.longest_turn()
        if late < _TURN_LIMIT:
            supervisor.tell("WATCHDOG=1")
        else:
            log.error("watchdog_missed", late=round(late))
        await asyncio.sleep(supervisor.beat)


async def _drain(door: MailDoor, sessions: Sessions, dispatcher: Dispatcher) -> None:
    """Finish what was begun: the mails that are coming in, and meanwhile the POSTs that are open."""
    await asyncio.gather(_finish_mails(door, sessions), dispatcher.drain(DRAIN_LIMIT))


async def _finish_mails(door: MailDoor, sessions: Sessions) -> None:
    await sessions.finish(_DATA_LIMIT)
    if door.accepting:
        await asyncio.wait(door.accepting, timeout=_ACCEPT_LIMIT)


def _observe(metrics: Metrics, news: News) -> None:
    """Write the log line and count: for each change of a fax, each mail to the postmaster, each brake."""
    match news:
        case Change():
            _observe_change(metrics, news.before, news.after)
        case Alert(cause):
            metrics.alert(cause)
            log.warning("alert_raised", cause=cause, text=news.text)
        case Brake(kind, scope, cause):
            where = "account" if scope == "account" else "number"
            log.warning("account_held", kind=kind, scope=where, cause=cause)


def _observe_change(metrics: Metrics, before: Fax, after: Fax) -> None:
    if after.final and not before.final:
        metrics.fax(after.state.value)  # type: ignore[arg-type]  # a final state is one of its outcomes
        seconds = round((after.ended_at or after.accepted_at) - after.accepted_at, 1)
        about = {"fax": after.id, "number": after.number, "reason": after.reason, "calls": len(after.calls)}
        log.info("fax_ended", outcome=after.state.value, seconds=seconds, **about)
    elif after.state is State.HELD and before.state is not State.HELD:
        log.warning("fax_held", fax=after.id, cause=after.held_for, detail=after.held_detail)
    elif after.state is State.QUEUED and before.state is not State.QUEUED:
        reason = after.calls[-1].reason if after.calls else None
        due = max(0.0, round(after.due_at - time.time(), 1))
        log.info("fax_requeued", fax=after.id, reason=reason, due=due)

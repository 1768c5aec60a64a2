"""The whole way: from a mail to its reply in the relay, with calls that take no time.

The carrier, the relay and the client are processes of their own and take their share of the same cores, which
is told with the figures. `rates`: faxes a second and CPU a fax. `webhooks`: events a second of faxes that are
on their way, checked and committed. `replies`: from an event to the reply, when nothing else happens.
"""

import asyncio
import itertools
import json
import shutil
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from events import event, request
from fill import sending
from gateways import Gateway
from plan import Plan
from ports import free_port
from processes import Failed, Process, cpu_seconds, until
from results import Results
from samples import SIZES, letter_file
from sink import Sink
from stalls import percentiles

from gateway.schema import attempts

SESSIONS = 10
_WEBHOOK_CONNECTIONS = 20
_TRIAL = 60  # faxes
_PATIENCE = 120.0


@dataclass
class Surroundings:
    """Whom the gateways talk to: `carrier` and `relay` are running processes; `used`: numbers called."""

    carrier: Process
    relay: Process
    relay_port: int
    folder: Path
    used: int = 0

    def replies(self) -> tuple[int, float]:
        """Return how many replies the relay took, and the time of the last."""
        with (
            socket.create_connection(("127.0.0.1", self.relay_port), 10) as client,
            client.makefile("rwb") as talk,
        ):
            talk.readline()
            talk.write(b"XCOUNT\r\n")
            talk.flush()
            _, count, last = talk.readline().split()
        return int(count), float(last)


def wire(
    stack: ExitStack, folder: Path, gateways: Sequence[Gateway], *, webhooks: bool = True
) -> Surroundings:
    """Start carrier and relay for gateways that do not run yet."""
    carrier_port, relay_port = free_port(), free_port()
    for gateway in gateways:
        gateway.settings["telnyx"]["api_base"] = f"http://127.0.0.1:{carrier_port}/v2"
        gateway.settings["replies"]["relay"] = f"smtp://127.0.0.1:{relay_port}"
    urls = [gateway.webhook_url for gateway in gateways] if webhooks else []
    logs = folder / "carrier.log", folder / "relay.log"
    for log in logs:
        log.unlink(missing_ok=True)
    carrier = stack.enter_context(Process.of_ours("standin", carrier_port, *urls, log=logs[0]))
    relay = stack.enter_context(Process.of_ours("sink", relay_port, log=logs[1]))
    carrier.wait_for("ready")
    relay.wait_for("ready")
    return Surroundings(carrier, relay, relay_port, folder)


def measure(results: Results, plan: Plan, folder: Path) -> None:
    """Measure all three."""
    with ExitStack() as stack:
        gateway = Gateway(fresh(stack, folder / "way"))
        around = wire(stack, folder, [gateway])
        stack.enter_context(gateway)
        letter = letter_file(folder, SIZES["100 KB"])
        rate = run([gateway], around, letter, _TRIAL)["rate"]
        for turn in range(plan.rounds):
            plan.say(f"way: round {turn + 1} of {plan.rounds}")
            row = run([gateway], around, letter, max(SESSIONS, round(rate * plan.way_seconds)))
            results.add("way", **row)
    for turn in range(plan.rounds):
        plan.say(f"webhooks: round {turn + 1} of {plan.rounds}")
        with ExitStack() as stack:
            gateways = [Gateway(fresh(stack, folder / "webhooks"))]
            known = on_their_way(gateways, folder, plan.webhooks)
            stack.enter_context(gateways[0])
            results.add("webhooks", **webhooks(gateways, known, folder))
    for turn in range(plan.rounds):
        plan.say(f"replies: round {turn + 1} of {plan.rounds}")
        with ExitStack() as stack:
            gateways = [Gateway(fresh(stack, folder / "replies"))]
            results.add("replies", **replies(gateways, folder, plan.replies))


def fresh(stack: ExitStack, folder: Path) -> Path:
    """Return the folder, empty; the stack removes it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    stack.callback(shutil.rmtree, folder)
    return folder


def run(gateways: Sequence[Gateway], around: Surroundings, letter: Path, count: int) -> dict[str, float]:
    """Mail so many faxes, wait for the reply of each; return faxes a second and milliseconds of CPU a fax."""
    replied, faxes = around.replies()[0], gateways[0].count("faxes WHERE state = 'delivered'")
    parts = {
        "cpu": [gateway.pid for gateway in gateways],
        "carrier": [around.carrier.pid],
        "relay": [around.relay.pid],
    }
    before = {name: sum(map(cpu_seconds, pids)) for name, pids in parts.items()}
    log = around.folder / "mailer.log"
    log.unlink(missing_ok=True)
    ports = [gateway.smtp_port for gateway in gateways]
    with Process.of_ours("mailer", letter, around.used, count, SESSIONS, *ports, log=log) as mailer:
        said = mailer.result(_PATIENCE)
    around.used += count
    until(lambda: around.replies()[0] >= replied + count, f"{count} replies", _PATIENCE)
    seconds = around.replies()[1] - float(said.split()[0])
    delivered = gateways[0].count("faxes WHERE state = 'delivered'") - faxes
    if delivered != count or around.replies()[0] != replied + count:
        raise Failed(f"{count} mails, {delivered} faxes delivered, {around.replies()[0] - replied} replies")
    spent = {name: sum(map(cpu_seconds, pids)) - before[name] for name, pids in parts.items()}
    per_fax = {name: round(each / count * 1000, 3) for name, each in spent.items()}
    return {"rate": round(count / seconds, 2), "faxes": count} | per_fax


def on_their_way(gateways: Sequence[Gateway], folder: Path, count: int) -> Path:
    """Give gateways that do not run so many faxes that the carrier has; return a file that names these."""
    for gateway in gateways:
        gateway.settings["telnyx"]["channels"] = count
    with gateways[0]:
        pass  # makes the store
    with gateways[0].opened() as connection:
        known = sending(connection, count)
    file = folder / "known"
    file.write_text("".join(f"{carrier_id} {to}\n" for carrier_id, to in known))
    return file


def webhooks(gateways: Sequence[Gateway], known: Path, folder: Path) -> dict[str, float]:
    """Send an event of each fax of `on_their_way`, to the gateways in turn.

    Return events a second, milliseconds of CPU an event, and the middle and longest time of an answer.
    """
    count = len(known.read_text().splitlines())
    before, log = sum(cpu_seconds(gateway.pid) for gateway in gateways), folder / "generator.log"
    log.unlink(missing_ok=True)
    ports = [gateway.http_port for gateway in gateways]
    words = (_WEBHOOK_CONNECTIONS, "fax.sending.started")
    with Process.of_ours("webhooks", *words, known, *ports, log=log) as generator:
        told: dict[str, float] = json.loads(generator.result(_PATIENCE))
    cpu = sum(cpu_seconds(gateway.pid) for gateway in gateways) - before
    kept = gateways[0].count("carrier_events WHERE fax_id IS NOT NULL")
    moved = gateways[0].count(f"attempts WHERE stage = {_SENDING}")
    if (kept, moved) != (count, count):
        raise Failed(f"{count} webhooks answered 200, {kept} in the store, {moved} applied")
    return {
        "rate": round(count / told["seconds"], 1),
        "webhooks": count,
        "cpu": round(cpu / count * 1000, 3),
        "middle": round(told["middle"], 2),
        "longest": round(told["longest"], 2),
    }


_SENDING = 4  # `Stage.SENDING`


def replies(gateways: Sequence[Gateway], folder: Path, count: int) -> dict[str, float]:
    """Start the gateways and time the replies to so many faxes, whose ends they are told of in turn."""
    with ExitStack() as stack:
        for gateway in gateways:
            gateway.settings["telnyx"]["channels"] = count
        around = wire(stack, folder, gateways, webhooks=False)
        port = free_port()
        for gateway in gateways:
            gateway.settings["replies"]["relay"] = f"smtp://127.0.0.1:{port}"
            stack.enter_context(gateway)
        log = folder / "mailer.log"
        log.unlink(missing_ok=True)
        letter, smtp_ports = letter_file(folder, SIZES["2 KB"]), [gateway.smtp_port for gateway in gateways]
        with Process.of_ours("mailer", letter, around.used, count, SESSIONS, *smtp_ports, log=log) as mailer:
            mailer.result(_PATIENCE)
        gateways[0].until_count("faxes WHERE state = 'sending'", count)
        with gateways[0].opened() as connection:
            known = connection.execute(sa.select(attempts.c.carrier_id, attempts.c.number)).tuples().all()
        times = asyncio.run(_time_replies([gateway.http_port for gateway in gateways], port, known))
        gateways[0].until_count("outbox WHERE sent_at IS NOT NULL", count)
    return percentiles(times)


async def _time_replies(
    http_ports: Sequence[int], relay_port: int, known: Sequence[tuple[str, str]]
) -> list[float]:
    """Tell the gateways of the end of one fax after the other; return the milliseconds to each reply."""
    came: asyncio.Queue[float] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: Sink(lambda _mail: came.put_nowait(time.perf_counter())), "127.0.0.1", relay_port
    )
    times = []
    async with server, asyncio.timeout(_PATIENCE):
        for row, http_port in zip(known, itertools.cycle(http_ports), strict=False):
            reader, writer = await asyncio.open_connection("127.0.0.1", http_port)
            webhook = request(event("fax.delivered", *row), http_port)
            begun = time.perf_counter()
            writer.write(webhook)
            times.append((await came.get() - begun) * 1000)
            answer = await reader.readline()
            if b" 200 " not in answer:
                raise Failed(f"a webhook was answered {answer!r}")
            writer.close()
            await asyncio.sleep(0.03)  # idle again
        server.close()
    return times

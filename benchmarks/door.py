"""The door: mails a second that are taken for good, against Postfix and against stock aiosmtpd.

Ours parses the mail, checks the PDF and commits both before the 250; Postfix writes the mail into its queue.
For each size the peers take turns, each with an empty store: one round is every peer with every number of
sessions. How many mails a run sends follows from a trial that is thrown away; as many mails as in the trial
warm each peer up after its start.
"""

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import postfix
from gateways import OURS, STOCK, Gateway, Template
from load import Sent, send
from plan import Plan
from processes import Failed, cpu_seconds, until
from results import Results
from samples import SIZES, letter_file

_TRIAL = {"2 KB": 100, "100 KB": 60, "1 MB": 20, "20 MB": 4}  # mails of a trial
_TRIAL_SESSIONS = 4


@dataclass
class Server:
    """A running peer: where it listens, its process, how many mails and carrier's events it holds."""

    port: int
    pid: int
    accepted: Callable[[], int]
    http_port: int = 0
    events: Callable[[], int] = lambda: 0


@dataclass
class Peers:
    """Starts a peer by its name, in a folder of its own with an empty store."""

    folder: Path
    template: Template

    def start(self, name: str, stack: ExitStack) -> Server:
        """Start one; the stack ends it."""
        if name == "postfix":
            queue = stack.enter_context(postfix.Postfix(self.folder / "postfix"))
            return Server(queue.smtp_port, queue.pid, queue.accepted)
        folder = self.folder / name
        self.template.copy(folder)
        stack.callback(shutil.rmtree, folder)
        gateway = stack.enter_context(Gateway(folder, program=STOCK if name == "stock" else OURS))
        return Server(
            gateway.smtp_port, gateway.pid, lambda: gateway.count("faxes"),
            gateway.http_port, lambda: gateway.count("carrier_events"),
        )  # fmt: skip


def available(results: Results, folder: Path) -> list[str]:
    """Return the peers that can be measured here; the others are noted with the reason."""
    reason = postfix.missing(folder)
    if reason:
        results.skipped["Postfix"] = reason
    else:
        results.machine["Postfix"] = postfix.version()
    return ["ours", "stock", *([] if reason else ["postfix"])]


def measure(results: Results, plan: Plan, folder: Path) -> None:
    """Measure every size."""
    peers = Peers(folder, Template(folder))
    names = available(results, folder)
    for size in plan.sizes:
        letter = letter_file(folder, SIZES[size])
        results.add("mails", size=size, octets=letter.stat().st_size)
        rates: dict[str, float] = {}
        for turn in range(plan.rounds + 1):
            for name in names:
                plan.say(f"door, {size}, {name}: " + (f"round {turn} of {plan.rounds}" if turn else "trial"))
                with ExitStack() as stack:
                    server = peers.start(name, stack)
                    if not turn:
                        rates[name] = run(server, letter, _TRIAL_SESSIONS, _TRIAL[size])["rate"]
                        continue
                    run(server, letter, _TRIAL_SESSIONS, _TRIAL[size])  # all processes of a peer run by then
                    # There and back again, so that no number of sessions always finds the fullest store.
                    for sessions in plan.sessions[:: 1 if turn % 2 else -1]:
                        count = max(least(sessions), round(rates[name] * plan.seconds))
                        row = run(server, letter, sessions, count)
                        results.add("door", peer=name, size=size, sessions=sessions, **row)


def least(sessions: int) -> int:
    """Return how many mails at least make a run: three for each session, but 60 of 20 MB take long enough."""
    return max(5, sessions, min(3 * sessions, 60))


def run(server: Server, letter: Path, sessions: int, count: int) -> dict[str, float]:
    """Send `count` mails; what was answered 250 must be in the store."""
    before, cpu = server.accepted(), cpu_seconds(server.pid)
    sent = send(server.port, letter, sessions, count)
    try:
        until(lambda: server.accepted() - before >= sent.taken, "the mails to be in the store", 30)
    except Failed:
        raise Failed(f"answered 250: {sent.taken}, in the store: {server.accepted() - before}") from None
    cpu = cpu_seconds(server.pid) - cpu
    if server.accepted() - before != sent.taken:
        raise Failed(f"answered 250: {sent.taken}, in the store: {server.accepted() - before}")
    return figures(sent, cpu)


def figures(sent: Sent, cpu: float) -> dict[str, float]:
    """Return a run's figures: mails a second, CPU milliseconds a mail, and the share turned away."""
    if not sent.taken:
        raise Failed("not one mail was taken")
    return {
        "rate": round(sent.taken / sent.seconds, 2),
        "cpu": round(cpu / sent.taken * 1000, 3),
        "mails": sent.taken,
        "rejected": sent.rejected,
    }

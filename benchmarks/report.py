"""The report: medians in tables, each goal with what was measured."""

import statistics
from pathlib import Path
from typing import Any

from results import Results
from samples import SIZES
from several import VARIANTS

BEGIN, END = "<!-- figures: written by `make bench` -->", "<!-- figures end -->"
PEERS = {"ours": "gateway", "postfix": "Postfix", "stock": "stock aiosmtpd"}


def put(text: str, page: Path) -> None:
    """Write the report between the two marks of a page."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} does not hold the lines {BEGIN} and {END}")
    page.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}")


def written(results: Results) -> str:
    """Return the whole report as Markdown."""
    parts = [
        _machine(results),
        _goals(results),
        _door(results),
        _stalls(results),
        _way(results),
        _scale(results),
    ]
    return "\n".join(part for part in (*parts, _several(results)) if part)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _told(value: float | None, unit: str = "") -> str:
    if value is None:
        return "-"
    digits = 0 if value >= 100 else 1 if value >= 10 else 2  # noqa: PLR2004 -- three digits
    return f"{value:,.{digits}f}{unit}"


def _ratio(value: float | None, to: float | None) -> float | None:
    return value / to if value is not None and to else None


def _made(results: Results, group: str) -> str:
    """Say of which commit the figures are, where that is not the report's own."""
    made = results.made.get(group, "")
    own = f"{results.machine['Date']}, commit {results.machine['Commit']}"
    return "" if made == own else f"Measured {made}.\n\n"


def _machine(results: Results) -> str:
    rows = [[name, text] for name, text in results.machine.items()]
    rows.append(
        [
            "fdatasync",
            f"{_told(results.median('bounds', 'fsync'))}/s: pages of 16 KB, each confirmed",
        ]
    )
    rows.append(
        [
            "Loopback",
            f"{_told(results.median('bounds', 'loopback'))} MB/s, read by Python that does nothing else",
        ]
    )
    rows += [[f"Not measured: {name}", reason] for name, reason in results.skipped.items()]
    return "### The machine\n\n" + _table(["", ""], rows)


# --- goals ---------------------------------------------------------------------------------------------


def _goals(results: Results) -> str:
    door = [
        (
            f"Door, {size}, {sessions} sessions: at least as many as Postfix",
            _times(results, "postfix", size, sessions),
            1.0,
        )
        for size, sessions in (("100 KB", 10), ("1 MB", 10), ("20 MB", 10))
    ]
    door.append(
        (
            "Door, 1 MB, 10 sessions: at least 5 times stock aiosmtpd",
            _times(results, "stock", "1 MB", 10),
            5.0,
        )
    )
    least = [
        *((name, value, goal, " times") for name, value, goal in door),
        ("Way: at least 150 faxes of 100 KB a second", results.median("way", "rate"), 150.0, "/s"),
        ("At least 1,000 webhooks a second", results.median("webhooks", "rate"), 1000.0, "/s"),
    ]
    purge = _ratio(results.median("purge", "after"), results.median("purge", "before"))
    most = [
        (
            "Stalls: NOOP within 20 ms (p99)",
            results.median("stalls", "p99", peer="ours", kind="noop"),
            20.0,
            " ms",
        ),
        (
            "Stalls: webhook within 20 ms (p99)",
            results.median("stalls", "p99", peer="ours", kind="webhook"),
            20.0,
            " ms",
        ),
        ("Webhook to reply, idle, within 50 ms (p99)", results.median("replies", "p99"), 50.0, " ms"),
        ("CPU of a fax with a long past or queue: at most 1.2 times", _worst_past(results), 1.2, " times"),
        ("Memory idle: below 150 MB", results.median("memory", "idle"), 150.0, " MB"),
        (
            "Memory with 50 sessions of 20 MB: below 400 MB",
            max(results.values("memory", "peak"), default=None),
            400.0,
            " MB",
        ),
        ("The file is smaller after a purge", purge, 0.999, " of its size"),
    ]
    rows = [
        [name, _told(value, unit), _verdict(value is not None and value >= goal, value)]
        for name, value, goal, unit in least
    ]
    rows += [
        [name, _told(value, unit), _verdict(value is not None and value <= goal, value)]
        for name, value, goal, unit in most
    ]
    return "### Goals\n\n" + _table(["Goal", "Measured", "Met"], rows)


def _verdict(met: bool, value: float | None) -> str:  # noqa: FBT001 -- of one table
    return "-" if value is None else "yes" if met else "**no**"


def _times(results: Results, peer: str, size: str, sessions: int) -> float | None:
    return _ratio(
        results.median("door", "rate", peer="ours", size=size, sessions=sessions),
        results.median("door", "rate", peer=peer, size=size, sessions=sessions),
    )


def _worst_past(results: Results) -> float | None:
    costs = [results.median("past", "cpu", past=past) for past in results.different("past", "past")]
    known = [cost for cost in costs if cost is not None]
    return max(known) / known[0] if known else None


# --- tables --------------------------------------------------------------------------------------------


def _door(results: Results) -> str:
    rows = []
    for size in results.different("door", "size"):
        for sessions in results.different("door", "sessions"):
            cell = {"size": size, "sessions": sessions}
            rates = [results.median("door", "rate", peer=peer, **cell) for peer in PEERS]
            cpu = [results.median("door", "cpu", peer=peer, **cell) for peer in PEERS]
            ratios = [_ratio(rates[0], other) for other in rates[1:]]
            rejected = sum(results.values("door", "rejected", peer="ours", **cell))
            sent = sum(results.values("door", "mails", peer="ours", **cell)) + rejected
            rows.append([
                size, str(sessions), *map(_told, rates), *map(_told, ratios), *map(_told, cpu),
                f"{_ratio(rejected, sent) or 0:.1%}", *_bounds(results, size, rates[0]),
            ])  # fmt: skip
    if not rows:
        return ""
    names = list(PEERS.values())
    head = [
        "PDF", "sessions", *names, "to Postfix", "to stock", *(f"CPU ms, {name}" for name in names),
        "put off", "of fdatasync", "of loopback",
    ]  # fmt: skip
    title = "### The door: mails a second\n\n"
    return f"{title}{_made(results, 'door')}{_table(head, rows)}\n{_door_spread(results)}"


def _bounds(results: Results, size: str, rate: float | None) -> list[str]:
    """Return which share of the machine's bare fsyncs and of its bare loopback read a rate of ours is."""
    octets = results.median("mails", "octets", size=size)
    moved = rate * octets / 1e6 if rate and octets else None
    shares = (
        _ratio(rate, results.median("bounds", "fsync")), _ratio(moved, results.median("bounds", "loopback"))
    )  # fmt: skip
    return ["-" if share is None else f"{share:.1%}" for share in shares]


def _door_spread(results: Results) -> str:
    spreads = []
    for peer in PEERS:
        for size in SIZES:
            for sessions in results.different("door", "sessions"):
                values = results.values("door", "rate", peer=peer, size=size, sessions=sessions)
                if values:
                    spreads.append((max(values) - min(values)) / statistics.median(values))
    spread = statistics.median(spreads)
    return f"Between its slowest and fastest round a rate differs by {spread:.0%} (median of all).\n"


def _stalls(results: Results) -> str:
    rows = []
    for peer, name in PEERS.items():
        for kind, told in (("noop", "NOOP"), ("webhook", "webhook")):
            where: dict[str, Any] = {"peer": peer, "kind": kind}
            if results.values("stalls", "p99", **where):
                found = [
                    results.median("stalls", figure, **where)
                    for figure in ("mails", "answers", "p50", "p99", "max")
                ]
                rows.append(
                    [name, told, *map(_told, found), _told(max(results.values("stalls", "max", **where)))]
                )
    head = [
        "", "asked for", "mails a second meanwhile", "answers a round", "p50 ms", "p99 ms", "max ms, median",
        "max of all rounds",
    ]  # fmt: skip
    title = "### Stalls: answers to others while ten sessions send 20 MB each\n\n"
    return f"{title}{_made(results, 'stalls')}{_table(head, rows)}" if rows else ""


def _way(results: Results) -> str:
    rows = []
    if results.values("way", "rate"):
        cpu = {name: _told(results.median("way", name)) for name in ("cpu", "carrier", "relay")}
        rows += [
            ["Faxes of 100 KB a second, mail to reply in the relay", _told(results.median("way", "rate"))],
            ["CPU a fax, the gateway", f"{cpu['cpu']} ms"],
            ["CPU a fax, the carrier and the relay beside it", f"{cpu['carrier']} ms and {cpu['relay']} ms"],
        ]
    if results.values("webhooks", "rate"):
        longest = _told(max(results.values("webhooks", "longest")))
        rows += [
            ["Webhooks a second, checked, applied and committed", _told(results.median("webhooks", "rate"))],
            ["CPU a webhook", f"{_told(results.median('webhooks', 'cpu'))} ms"],
            [
                "The same: answered within",
                f"{_told(results.median('webhooks', 'middle'))} ms (p50), {longest} ms at worst",
            ],
        ]
    if results.values("replies", "p50"):
        found = " / ".join(_told(results.median("replies", figure)) for figure in ("p50", "p99", "max"))
        rows.append(["Webhook to reply in the relay, idle: p50 / p99 / max", f"{found} ms"])
    return f"### The whole way\n\n{_made(results, 'way')}{_table(['', ''], rows)}" if rows else ""


def _scale(results: Results) -> str:
    pasts = results.different("past", "past")
    if not pasts:
        return ""
    first = results.median("past", "cpu", past=pasts[0])
    rows = []
    for past in pasts:
        cpu = results.median("past", "cpu", past=past)
        found = [results.median("past", "rate", past=past), cpu, _ratio(cpu, first)]
        rows.append([past, _told(results.median("store", "megabytes", past=past)), *map(_told, found)])
    head = ["In the store", "its file, MB", "faxes/s", "CPU ms a fax", "CPU to the first"]
    text = _table(head, rows) + "\n"
    idle, peak = results.median("memory", "idle"), max(results.values("memory", "peak"), default=None)
    sessions, later = results.median("memory", "sessions"), results.median("memory", "after")
    text += (
        f"Memory of all processes: {_told(idle)} MB idle, at most {_told(peak)} MB while"
        f" {sessions or 0:.0f} sessions send 20 MB each, {_told(later)} MB after.\n"
    )
    faxes, before, after = (results.median("purge", figure) for figure in ("faxes", "before", "after"))
    text += (
        f"The file after {faxes or 0:.0f} faxes of 100 KB: {_told(before)} MB; purged: {_told(after)} MB.\n"
    )
    return f"### What grows\n\n{_made(results, 'scale')}{text}"


def _several(results: Results) -> str:
    servers = [name for name, count in VARIANTS.items() if count]
    columns = [*(("rate", name) for name in VARIANTS), *(("cpu", name) for name in VARIANTS)]
    columns += [("server", name) for name in servers]
    door = []
    for size in results.different("several door", "size"):
        for sessions in results.different("several door", "sessions"):
            cell = {"size": size, "sessions": sessions}
            if results.values("several door", "rate", **cell):
                found = [results.median("several door", key, variant=name, **cell) for key, name in columns]
                door.append([size, str(sessions), *map(_told, found)])
    if not door:
        return ""
    head = [
        "PDF", "sessions", *VARIANTS, *(f"CPU ms, {name}" for name in VARIANTS),
        *(f"the server's CPU ms, {name}" for name in servers),
    ]  # fmt: skip
    rejected, taken = (sum(results.values("several door", key)) for key in ("rejected", "mails"))
    title = "### PostgreSQL: the door (mails a second) and the way\n\n"
    put_off = f"Of these mails {_ratio(rejected, taken + rejected) or 0:.1%} were put off.\n"
    made = _made(results, "postgresql")
    return f"{title}{made}{_table(head, door)}\n{put_off}\n{_several_way(results)}"


def _several_way(results: Results) -> str:
    lines = [
        ("Faxes of 100 KB a second", "several way", "rate"),
        ("CPU ms a fax, gateways", "several way", "cpu"),
        ("CPU ms a fax, the server", "several way", "server"),
        ("Webhooks a second", "several webhooks", "rate"),
        ("CPU ms a webhook, gateways", "several webhooks", "cpu"),
        ("CPU ms a webhook, the server", "several webhooks", "server"),
        ("A webhook answered within, ms: p50", "several webhooks", "middle"),
        ("Webhook to reply, idle, ms: p50", "several replies", "p50"),
        ("The same: p99", "several replies", "p99"),
        ("The same: max", "several replies", "max"),
    ]
    rows = [
        [text, *(_told(results.median(table, figure, variant=name)) for name in VARIANTS)]
        for text, table, figure in lines
    ]
    return _table(["", *VARIANTS], rows)

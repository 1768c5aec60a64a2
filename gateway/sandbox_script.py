"""Which behaviour a fax to the sandbox meets: the table of numbers, scripts and seeds.

In charge of: the telephone numbers that stand for behaviours, reading and checking a script, and the choice
among script, number and seed for each POST.
Promises: nothing here reads a clock or a socket; the same script, seed and order of POSTs choose the same.
Fails: a script that cannot be used raises `ScriptError` with every fault in it, and changes nothing.
"""

import difflib
import random
import re
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from gateway.sandbox_behaviours import BEHAVIOURS, REASONS

E164 = re.compile(r"\+[1-9][0-9]{6,14}")


class ScriptError(ValueError):
    """A script cannot be used; the text names every fault, one a line."""


_FROM_0150_ON: tuple[tuple[str, ...], ...] = (
    ("invented-reason",),
    ("no-reason",),
    ("user_busy", "delivered"),
    ("user_busy", "user_busy", "delivered"),
    ("never-ends",),
    ("webhooks-before-answer",),
    ("webhooks-twice",),
    ("webhooks-backwards",),
    ("webhooks-lost",),
    ("answer-lost",),
    ("answer-and-webhooks-lost",),
    ("answer-lost-and-hidden",),
    ("cut-before-acceptance", "delivered"),
    ("failed-then-delivered",),
    ("delivered-then-failed",),
    ("401",),
    ("402",),
    ("403",),
    ("404",),
    ("422-to",),
    ("422-from",),
    ("422-contents",),
    ("429-retry-after", "delivered"),
    ("429-reset", "delivered"),
    ("429",),
    ("500-before-acceptance", "delivered"),
    ("500-after-acceptance",),
    ("202-without-id",),
    ("202-html",),
    ("202-huge",),
    ("307",),
    ("slow-answer",),
    ("silence", "delivered"),
    ("silence-after-acceptance",),
    ("webhooks-forged",),
    ("webhooks-stale",),
    ("unknown-event",),
    ("no-page-count",),
    ("503-html", "delivered"),
)

NUMBERS: Mapping[str, tuple[str, ...]] = {
    "+13125550100": ("delivered",),
    **{f"+1312555{last:04}": (reason,) for last, reason in enumerate(REASONS, start=101)},
    **{f"+1312555{last:04}": names for last, names in enumerate(_FROM_0150_ON, start=150)},
}
"""Number -> behaviours in order of calls; the last one repeats. New rows go to the end: people dial these."""

WEIGHTS: Mapping[str, int] = {
    "delivered": 70,
    "user_busy": 9,
    "receiver_no_answer": 6,
    "fax_signaling_error": 4,
    "receiver_call_dropped": 3,
    "receiver_unallocated_number": 2,
    "service_unavailable": 1,
    "webhooks-twice": 2,
    "webhooks-lost": 2,
    "answer-lost": 1,
}
"""With a seed: of a hundred faxes to numbers outside the table, so many meet each of these."""


class Choices:
    """Chooses the behaviour of each POST: the script, then the number table, then the seed, else `delivered`.

    Calls are counted by number and document (SHA-256), so that "busy, then delivered" means the second call
    with the same document, and tests that run side by side do not use up each other's steps.
    """

    def __init__(self, script: Mapping[str, str | Sequence[str]], seed: int | None) -> None:
        self._script = checked_script(script)
        self._random = None if seed is None else random.Random(seed)  # noqa: S311 - repeatable on purpose
        self._calls: Counter[tuple[str, str]] = Counter()

    def replace_script(self, script: Mapping[str, str | Sequence[str]]) -> None:
        """Put another script in place; its numbers begin at their first step. Raises `ScriptError`."""
        self._script = checked_script(script)
        for call in [call for call in self._calls if call[0] in self._script]:
            del self._calls[call]

    def next(self, to: str, document: str) -> str:
        """Name the behaviour for this call of `to` with the document of this SHA-256."""
        names = self._script.get(to) or NUMBERS.get(to)
        if names is None:
            if self._random is None:
                return "delivered"
            return self._random.choices(list(WEIGHTS), weights=list(WEIGHTS.values()))[0]
        step = self._calls[to, document]
        self._calls[to, document] += 1
        return names[min(step, len(names) - 1)]


def checked_script(script: Mapping[str, str | Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Check a mapping of numbers to a name or a list of names; return number -> names.

    Raises `ScriptError` with each number not in E.164 and each name not known, beside the nearest known one.
    """
    faults: list[str] = []
    checked: dict[str, tuple[str, ...]] = {}
    for number, value in script.items():
        names = (value,) if isinstance(value, str) else value
        if not E164.fullmatch(number):
            faults.append(f"{number!r} is not a number like +13125550123")
        if not isinstance(names, list | tuple) or not names:
            faults.append(f"{number}: expected the name of a behaviour or a list of names")
            continue
        for name in names:
            if name not in BEHAVIOURS:
                near = difflib.get_close_matches(str(name), BEHAVIOURS, n=1)
                faults.append(
                    f"{number}: no behaviour {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
                )
        checked[number] = tuple(names)
    if faults:
        raise ScriptError("\n".join(faults))
    return checked


def read_script(path: Path) -> dict[str, tuple[str, ...]]:
    """Read a script from a TOML file of lines such as `"+13125550123" = ["user_busy", "delivered"]`.

    Raises `ScriptError` for a fault in the text, `OSError` where the file cannot be read.
    """
    try:
        script = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ScriptError(f"{path}: {error}") from error
    return checked_script(script)

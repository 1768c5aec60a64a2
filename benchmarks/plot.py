"""The plot beside the tables: bars, drawn with Pillow, which the gateway has anyway."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from results import Results

_WIDTH, _PANEL = 1100, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 62, 50  # around a panel's bars
_SCALE = 2  # drawn larger, so that it is sharp on any screen
_COLOURS = ("#1f6fb2", "#e08a1e", "#8a8f98")
_INK, _FAINT, _LIMIT = "#222222", "#dddddd", "#c0392b"
_STEPS = 4  # lines across a panel


@dataclass(frozen=True, slots=True)
class Panel:
    """Bars in groups: `series` holds for each name a value for each group; `limit` is the goal's line."""

    title: str
    groups: Sequence[str]
    series: dict[str, list[float | None]]
    limit: float
    limit_text: str


def draw(results: Results, path: Path) -> None:
    """Draw what there is of the panels."""
    panels = [panel for panel in (_door(results), _stalls(results), _past(results)) if panel is not None]
    image = Image.new("RGB", (_WIDTH * _SCALE, (_PANEL * max(1, len(panels)) + 24) * _SCALE), "white")
    canvas = _Canvas(ImageDraw.Draw(image))
    for place, panel in enumerate(panels):
        canvas.panel(panel, place * _PANEL)
    made = f"{results.machine['Date']}, commit {results.machine['Commit']}, {results.machine['Processor']}"
    canvas.text((_LEFT, _PANEL * max(1, len(panels)) + 2), made, 11, _INK)
    image.save(path, optimize=True)


def _door(results: Results) -> Panel | None:
    base = "postfix" if results.values("door", "rate", peer="postfix") else "stock"
    others = {"gateway": "ours"} | ({"stock aiosmtpd, same handler": "stock"} if base == "postfix" else {})
    cells = [
        {"size": size, "sessions": sessions}
        for size in results.different("door", "size")
        for sessions in results.different("door", "sessions")
    ]
    if not cells:
        return None

    def ratio(peer: str, cell: dict[str, object]) -> float | None:
        one = results.median("door", "rate", peer=peer, **cell)
        other = results.median("door", "rate", peer=base, **cell)
        return one / other if one and other else None

    name = "Postfix" if base == "postfix" else "stock aiosmtpd"
    return Panel(
        f"The door by size and sessions: mails a second, as a multiple of {name}'s",
        [f"{cell['size']}, {cell['sessions']}" for cell in cells],
        {label: [ratio(peer, cell) for cell in cells] for label, peer in others.items()},
        1.0,
        name,
    )


def _stalls(results: Results) -> Panel | None:
    kinds = {"NOOP, p50": ("noop", "p50"), "NOOP, p99": ("noop", "p99"), "webhook, p50": ("webhook", "p50"),
             "webhook, p99": ("webhook", "p99")}  # fmt: skip
    peers = {"gateway": "ours", "stock aiosmtpd, same handler": "stock", "Postfix": "postfix"}
    series: dict[str, list[float | None]] = {
        name: [results.median("stalls", figure, peer=peer, kind=kind) for kind, figure in kinds.values()]
        for name, peer in peers.items()
    }
    if not results.values("stalls", "p99"):
        return None
    title = "Milliseconds that others wait while ten sessions send 20 MB each"
    return Panel(title, list(kinds), series, 20.0, "goal")


def _past(results: Results) -> Panel | None:
    pasts = results.different("past", "past")
    if not pasts:
        return None
    costs = [results.median("past", "cpu", past=past) for past in pasts]
    goal = 1.2 * (costs[0] or 0.0)
    return Panel("CPU milliseconds a fax, by what is in the store", pasts, {"gateway": costs}, goal, "goal")


class _Canvas:
    """Draws in points; the image is larger by `_SCALE`."""

    def __init__(self, on: ImageDraw.ImageDraw) -> None:
        self._draw = on

    def text(self, at: tuple[float, float], words: str, size: int, ink: str, anchor: str = "la") -> None:
        font = ImageFont.load_default(size * _SCALE)
        self._draw.text((at[0] * _SCALE, at[1] * _SCALE), words, fill=ink, font=font, anchor=anchor)

    def _line(self, left: float, right: float, height: float, ink: str, width: int = 1) -> None:
        ends = [(left * _SCALE, height * _SCALE), (right * _SCALE, height * _SCALE)]
        self._draw.line(ends, fill=ink, width=width * _SCALE)

    def panel(self, panel: Panel, top: float) -> None:
        """Draw one below `top`."""
        bottom, height = top + _PANEL - _BOTTOM, _PANEL - _TOP - _BOTTOM
        known = [value for values in panel.series.values() for value in values if value is not None]
        most = _round_up(max([*known, panel.limit]))
        self.text((_LEFT, top + 8), panel.title, 16, _INK)
        for step in range(_STEPS + 1):
            level = bottom - height * step / _STEPS
            self._line(_LEFT, _WIDTH - _RIGHT, level, _FAINT)
            self.text((_LEFT - 8, level), f"{most * step / _STEPS:g}", 11, _INK, "rm")
        left = float(_LEFT)
        for name, colour in zip(panel.series, _COLOURS, strict=False):
            self._box(left, top + 36, left + 11, top + 47, colour)
            self.text((left + 16, top + 35), name, 11, _INK)
            left += 32 + 6.2 * len(name)
        values = self._bars(panel, bottom, height / most)
        level = bottom - panel.limit * height / most
        self._line(_LEFT, _WIDTH - _RIGHT, level, _LIMIT, 2)
        self.text((_WIDTH - _RIGHT, level - 3), panel.limit_text, 11, _LIMIT, "rb")
        for at, value in values:
            self.text(at, f"{value:.3g}", 10, _INK, "mb")

    def _bars(self, panel: Panel, bottom: float, per_unit: float) -> list[tuple[tuple[float, float], float]]:
        """Draw the bars; return their values and where these belong, above all lines."""
        told = []
        group_width = (_WIDTH - _LEFT - _RIGHT) / len(panel.groups)
        width = min(60.0, group_width * 0.75 / len(panel.series))
        for place, group in enumerate(panel.groups):
            middle = _LEFT + group_width * (place + 0.5)
            self.text((middle, bottom + 8), group, 11, _INK, "ma")
            left = middle - width * len(panel.series) / 2
            for values, colour in zip(panel.series.values(), _COLOURS, strict=False):
                value = values[place]
                if value is not None:
                    self._box(left, bottom - value * per_unit, left + width - 2, bottom, colour)
                    told.append(((left + width / 2 - 1, bottom - value * per_unit - 2), value))
                left += width
        return told

    def _box(self, left: float, top: float, right: float, bottom: float, colour: str) -> None:
        self._draw.rectangle([edge * _SCALE for edge in (left, min(top, bottom), right, bottom)], fill=colour)


def _round_up(value: float) -> float:
    """Return the next number above that reads well."""
    unit = 10.0 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return next(
        step * unit for step in (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10, 12) if step * unit >= value * 1.1
    )

"""What was measured: every single run as a row, and the medians over them."""

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self


@dataclass
class Results:
    """The rows of all benchmarks.

    `made`: for each benchmark when and of which commit its rows are; `skipped`: what was not measured, and
    why; `machine`: where all this was.
    """

    machine: dict[str, str] = field(default_factory=dict)
    made: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    _group: str = field(default="", init=False)

    def begin(self, group: str) -> None:
        """Forget the rows of an earlier run of a benchmark; what is added from now on is of the new one."""
        self.rows = [row for row in self.rows if row["of"] != group]
        self._group = group
        self.made[group] = f"{self.machine['Date']}, commit {self.machine['Commit']}"

    def add(self, table: str, /, **row: Any) -> None:
        """Keep one run."""
        self.rows.append({"of": self._group, "table": table} | row)

    def values(self, table: str, figure: str, /, **where: Any) -> list[float]:
        """Return a figure of each run to which all of `where` applies."""
        wanted = {"table": table} | where
        return [row[figure] for row in self.rows if figure in row and wanted.items() <= row.items()]

    def median(self, table: str, figure: str, /, **where: Any) -> float | None:
        """Return the median over these runs, None where there are none."""
        values = self.values(table, figure, **where)
        return statistics.median(values) if values else None

    def different(self, table: str, key: str) -> list[Any]:
        """Return what stands under a key in the rows of a table, each once, in their order."""
        return list(dict.fromkeys(row[key] for row in self.rows if row["table"] == table and key in row))

    def save(self, path: Path) -> None:
        """Write everything down, a run on each line."""
        path.parent.mkdir(exist_ok=True)
        head = {"machine": self.machine, "made": self.made, "skipped": self.skipped}
        rows = ",\n".join(json.dumps(row) for row in self.rows)
        path.write_text(json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{rows}\n]}}\n')

    @classmethod
    def load(cls, path: Path) -> Self:
        """Return what an earlier run wrote down; nothing if there was none."""
        return cls(**json.loads(path.read_text())) if path.exists() else cls()
